"""Features in files: they hold what was written, stay out of memory, and leave nothing behind."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import pytest
import torch

from gist.errors import ConfigError
from gist.graph.hidden import Hidden

SHAPE = 4096, 1024  # 16 MiB in float32


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def resident_bytes(rows: torch.Tensor) -> int:
    """Of the mapping behind a tensor, as the kernel counts them for this process."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start <= rows.data_ptr() < end
        elif inside and first == "Rss:":
            return int(line.split()[1]) * 1024
    raise AssertionError("no mapping holds the tensor")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_was_written_is_read_back_after_it_was_let_go_of(folder, dtype):
    hidden = Hidden.in_file((50, 300), dtype, allowance=10_000)
    expected = torch.randn(50, 300).to(dtype)
    for i in range(50):
        hidden.rows[i] = expected[i]
        hidden.touched(1)
    assert torch.equal(hidden.rows, expected)
    assert hidden.is_in_file
    assert hidden.bytes == 10_000


def test_no_more_is_resident_than_allowed(folder):
    hidden = Hidden.in_file(SHAPE, torch.float32, allowance=2**20)
    assert hidden.most_rows == 256
    peak = 0
    for rows in hidden.rows.split(hidden.most_rows):
        rows.fill_(1.0)
        peak = max(peak, resident_bytes(hidden.rows))
        hidden.touched(len(rows))
    assert peak <= 2 * 2**20  # around a page the kernel maps its neighbours
    assert resident_bytes(hidden.rows) == 0
    assert hidden.rows[::64].sum() == 64 * 1024


def test_it_is_in_the_folder_that_the_user_chose_and_leaves_nothing(folder):
    hidden = Hidden.in_file(SHAPE, torch.float32, allowance=0)
    hidden.rows.fill_(1.0)
    assert list(folder.iterdir()) == []  # it has no name
    assert str(folder) in Path("/proc/self/maps").read_text()
    del hidden
    assert str(folder) not in Path("/proc/self/maps").read_text()


def test_a_full_disk_is_told_before_anything_is_written(folder, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ConfigError, match=r"no room on disk.*16,777,216 bytes in .*TMPDIR"):
        Hidden.in_file(SHAPE, torch.float32, allowance=0)
    assert list(folder.iterdir()) == []


def test_features_in_memory_are_used_at_once():
    hidden = Hidden(torch.zeros(7, 3))
    hidden.touched(7)
    assert not hidden.is_in_file
    assert hidden.bytes == 7 * 12
    assert hidden.row_bytes == 12
    assert hidden.most_rows == 7
