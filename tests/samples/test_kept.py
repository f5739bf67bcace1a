"""Arrays that were kept are those that were made, of these raw files and no others."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from gist.samples.kept import kept_arrays


class Writer:
    """Writes one array, counts how often, and can be made to fail."""

    def __init__(self, value=1.0):
        self.value, self.calls, self.error = value, 0, None

    def __call__(self, folder):
        self.calls += 1
        np.save(folder / "x.npy", np.full((3, 2), self.value, np.float32))
        if self.error:
            raise self.error
        np.save(folder / "y.npy", np.arange(3))


def kept(root, write, *, name="some", **source):
    return kept_arrays(name, root, source or {"a": "1"}, ("x", "y"), write)


def test_arrays_are_made_once_and_mapped(tmp_path):
    write = Writer()
    first, second = kept(tmp_path, write), kept(tmp_path, write)
    assert write.calls == 1
    for arrays in (first, second):
        assert torch.equal(arrays["x"], torch.ones(3, 2))
        assert arrays["y"].tolist() == [0, 1, 2]
    (folder,) = (tmp_path / "processed").iterdir()
    assert folder.name.startswith("some-")
    assert sorted(path.name for path in folder.iterdir()) == ["x.npy", "y.npy"]


def test_changes_in_place_do_not_reach_the_files(tmp_path):
    write = Writer()
    kept(tmp_path, write)["x"].zero_()
    assert torch.equal(kept(tmp_path, write)["x"], torch.ones(3, 2))


def test_other_raw_files_give_other_arrays(tmp_path):
    made = [
        kept(tmp_path, Writer(1), a="1"),
        kept(tmp_path, Writer(2), a="2"),
        kept(tmp_path, Writer(3), b="1"),
        kept(tmp_path, Writer(4), a="1", b="1"),
        kept(tmp_path, Writer(5), name="other", a="1"),
    ]
    assert [float(arrays["x"][0, 0]) for arrays in made] == [1, 2, 3, 4, 5]
    assert float(kept(tmp_path, Writer(9), b="1", a="1")["x"][0, 0]) == 4, "in any order"


def test_what_fails_leaves_nothing(tmp_path):
    write = Writer()
    write.error = ValueError("bad image")
    with pytest.raises(ValueError, match="bad image"):
        kept(tmp_path, write)
    assert list((tmp_path / "processed").iterdir()) == []


@pytest.mark.parametrize("damage", ["missing", "cut", "text"])
def test_damaged_arrays_are_made_again(tmp_path, damage):
    kept(tmp_path, Writer(1))
    ((folder),) = (tmp_path / "processed").iterdir()
    file = folder / "x.npy"
    content = {"cut": file.read_bytes()[:-4], "text": b"text"}.get(damage)
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    write = Writer(2)
    assert float(kept(tmp_path, write)["x"][0, 0]) == 2
    assert float(kept(tmp_path, write)["x"][0, 0]) == 2
    assert write.calls == 1


def test_what_an_interrupted_process_left_is_no_hindrance(tmp_path):
    kept(tmp_path, Writer(1))
    (folder,) = (tmp_path / "processed").iterdir()
    left = folder.with_name(f".{folder.name}-{os.getpid()}")
    folder.rename(left)
    assert float(kept(tmp_path, Writer(2))["x"][0, 0]) == 2
    assert [path.name for path in (tmp_path / "processed").iterdir()] == [folder.name]


def test_gist_data_is_read_and_the_cache_written(tmp_path, monkeypatch):
    data, cache = tmp_path / "data", tmp_path / "cache"
    monkeypatch.setenv("GIST_DATA", str(data))
    monkeypatch.setenv("GIST_CACHE", str(cache))
    data.mkdir()
    kept(None, Writer(1))
    assert list(data.iterdir()) == []
    (cache / "processed").rename(data / "processed")
    assert float(kept(None, Writer(2))["x"][0, 0]) == 1


def test_where_nothing_can_be_kept_arrays_are_made_each_time(tmp_path, monkeypatch):
    monkeypatch.setattr("gist.samples.kept.may_write", lambda path: False)
    write = Writer()
    first, second = kept(tmp_path, write), kept(tmp_path, write)
    assert write.calls == 2
    assert torch.equal(first["x"], second["x"])
    assert list(tmp_path.iterdir()) == []
