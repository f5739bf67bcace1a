import os
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from gist.errors import CheckpointError
from gist.execution.tensorfile import (
    DTYPES,
    FileLayout,
    copy_file,
    read_tensors,
    replace_file,
    write_tensors,
)

PLAIN = [d for d in DTYPES if d.itemsize > 1 or d in (torch.bool, torch.int8, torch.uint8)]


@st.composite
def sets_of_tensors(draw: st.DrawFn):
    tensors = {}
    for i in range(draw(st.integers(1, 6))):
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
        name = f"{draw(st.sampled_from('äxyz'))}.{i}"
        tensors[name] = (torch.rand(shape) * 100).to(draw(st.sampled_from(PLAIN)))
    return tensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


def same(ours, theirs) -> bool:
    return ours.keys() == theirs.keys() and all(
        t.dtype == theirs[n].dtype
        and t.shape == theirs[n].shape
        and t.numpy(force=True).tobytes() == theirs[n].numpy(force=True).tobytes()
        if t.dtype != torch.bfloat16
        else torch.equal(t, theirs[n])
        for n, t in ours.items()
    )


@given(sets_of_tensors())
def test_safetensors_reads_what_was_written_and_the_other_way(folder, tensors):
    path, theirs = folder / "ours.safetensors", folder / "theirs.safetensors"
    path.unlink(missing_ok=True)
    write_tensors(path, tensors)
    assert same(load_file(path), tensors)
    assert path.stat().st_size == FileLayout.of(tensors).nbytes
    save_file(tensors, theirs)
    for file in (path, theirs):
        into = {name: torch.ones_like(tensor) for name, tensor in tensors.items()}
        read_tensors(file, into)
        assert same(into, tensors)


@given(sets_of_tensors())
def test_the_layout_needs_shapes_alone_and_aligns_every_tensor(tensors):
    layout = FileLayout.of(tensors)
    assert layout == FileLayout.of({name: t.to("meta") for name, t in tensors.items()})
    places = sorted(layout.places.values(), key=lambda place: place.offset)
    assert len(layout.header) % 4096 == 0
    end = len(layout.header)
    for place in places:
        assert place.offset == end, "no gaps"
        assert place.nbytes == 0 or place.offset % place.dtype.itemsize == 0
        end += place.nbytes
    assert end == layout.nbytes


def test_wide_matrices_begin_at_whole_pages():
    odd = {"a.count": torch.tensor(3), "b.bias": torch.zeros(47), "c.mask": torch.ones(5).bool()}
    layout = FileLayout.of({**odd, "z.weight": torch.zeros(64, 1024)})
    assert layout.places["z.weight"].offset % 4096 == 0


def test_an_unknown_dtype_is_refused_by_name(tmp_path):
    tensors = {"fine": torch.zeros(2), "wave": torch.zeros(2, dtype=torch.complex64)}
    with pytest.raises(CheckpointError, match=r"wave of torch\.complex64"):
        write_tensors(tmp_path / "x.safetensors", tensors)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("into", "named"),
    [
        ({"w": torch.zeros(2, 3)}, r"w \(3, 2\)"),
        ({"w": torch.zeros(3, 2), "b": torch.zeros(1)}, "b missing"),
        ({"v": torch.zeros(3, 2)}, "w none"),
    ],
)
def test_a_file_of_another_model_is_refused_and_nothing_is_read(tmp_path, into, named):
    path = tmp_path / "model.safetensors"
    write_tensors(path, {"w": torch.ones(3, 2)})
    with pytest.raises(CheckpointError, match=named):
        read_tensors(path, into)
    assert not any(tensor.any() for tensor in into.values())


def test_another_dtype_is_converted(tmp_path):
    path, into = tmp_path / "model.safetensors", {"w": torch.zeros(3, dtype=torch.float64)}
    write_tensors(path, {"w": torch.arange(3.0)})
    read_tensors(path, into)
    assert into["w"].tolist() == [0, 1, 2]


def test_a_damaged_or_missing_file_is_refused(tmp_path):
    path, into = tmp_path / "model.safetensors", {"w": torch.zeros(300)}
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_tensors(path, into)
    write_tensors(path, {"w": torch.ones(300)})
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_tensors(path, into)


def refuse(number: int, *args: object) -> int:
    raise OSError(number, "not here")


@pytest.mark.parametrize("number", [None, 18, 95])
def test_a_copy_is_a_copy_also_where_the_kernel_cannot(tmp_path, monkeypatch, number):
    source, target = tmp_path / "a", tmp_path / "b"
    data = os.urandom(300_001)
    source.write_bytes(data)
    if number is not None:
        monkeypatch.setattr(os, "copy_file_range", partial(refuse, number))
    copy_file(source, target)
    assert target.read_bytes() == data
    with pytest.raises(FileExistsError):
        copy_file(source, target)


def test_a_full_disk_comes_up_in_a_copy(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"x")
    monkeypatch.setattr(os, "copy_file_range", partial(refuse, 28))
    with pytest.raises(OSError, match="not here"):
        copy_file(tmp_path / "a", tmp_path / "b")


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "file"
    with replace_file(path) as new:
        new.write_text("first")

    def fail() -> None:
        with replace_file(path) as new:
            new.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert path.read_text() == "first"
    assert [file.name for file in path.parent.iterdir()] == ["file"]
