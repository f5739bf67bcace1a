"""What memory is in use, free and at its peak."""

from __future__ import annotations

import mmap
from pathlib import Path

import psutil
import pytest
import torch

from gist.execution import memory
from gist.execution.memory import PeakMemory, free_memory, memory_in_use

CPU = torch.device("cpu")
MIB = 2**20

needs_reset = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the kernel keeps no high-water mark"
)


@needs_reset
def test_a_peak_counts_from_its_start():
    big = torch.ones(200 * MIB // 4)
    del big
    measured = PeakMemory(CPU)
    before = memory_in_use(CPU)
    middle = torch.ones(80 * MIB // 4)
    del middle
    assert 75 * MIB < measured.bytes() - before < 150 * MIB


def test_what_is_allocated_is_in_use():
    before = memory_in_use(CPU)
    fresh = mmap.mmap(-1, 64 * MIB)  # what torch allocates may be memory that was kept
    torch.frombuffer(fresh, dtype=torch.uint8).fill_(1)
    assert memory_in_use(CPU) - before > 60 * MIB


def test_free_memory_is_part_of_the_machines():
    assert 0 < free_memory(CPU) <= psutil.virtual_memory().total


def group(folder: Path, **values: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in values.items():
        (folder / f"memory.{name}").write_text(value + "\n")


def test_limits_of_control_groups_version_2(tmp_path):
    stat = "anon 5\ninactive_file 30"
    group(tmp_path / "a", max="1000", current="200", stat=stat)
    group(tmp_path / "a/b", max="max", current="100", stat=stat)
    group(tmp_path / "a/b/c", max="500", current="100", stat=stat)
    (tmp_path / "membership").write_text("0::/a/b/c\n")
    left = memory._left_in_groups(tmp_path, tmp_path / "membership")
    assert sorted(left) == [430, 830], "what files take can be dropped; no limit is none"


def test_limits_of_control_groups_version_1(tmp_path):
    stat = "inactive_file 10\ntotal_inactive_file 25"
    group(tmp_path / "memory", limit_in_bytes="2000", usage_in_bytes="500", stat=stat)
    group(tmp_path / "memory/job", limit_in_bytes="800", usage_in_bytes="300", stat=stat)
    (tmp_path / "membership").write_text("3:cpu,cpuacct:/job\n4:memory:/job\nnonsense\n")
    assert sorted(memory._left_in_groups(tmp_path, tmp_path / "membership")) == [525, 1525]


def test_the_root_group_counts_where_the_path_is_the_hosts(tmp_path):
    group(tmp_path, max="700", current="100", stat="inactive_file 0")
    (tmp_path / "membership").write_text("0::/system.slice/docker-1234.scope\n")
    assert memory._left_in_groups(tmp_path, tmp_path / "membership") == [600]


def test_no_control_groups_no_limit(tmp_path):
    assert memory._left_in_groups(tmp_path, tmp_path / "missing") == []


def test_a_group_that_is_full_leaves_nothing(monkeypatch):
    monkeypatch.setattr(memory, "_left_in_groups", lambda: [-5])
    assert free_memory(CPU) == 0
