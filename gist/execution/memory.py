"""Memory of this process: what is in use, what is free, and the peak from a moment on."""

from __future__ import annotations

import ctypes
import gc
import resource
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch


class PeakMemory:
    """Measures the peak resident memory (CUDA: allocated memory) from its creation on.

    What was left behind before is let go of first: garbage is collected, and the C library gives
    freed memory back where it can (glibc). On Linux the kernel's high-water mark is reset;
    elsewhere the peak is that of the whole process. Pages of files that are mapped into memory
    count while they are resident, although the kernel drops them whenever it needs room.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        release_freed_memory()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return

    def bytes(self) -> int:
        """The peak: device memory on CUDA, resident memory on the CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        try:
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        except OSError:
            pass
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def release_freed_memory() -> None:
    """Collects garbage, and gives memory that was freed back to the system where that is known."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # not glibc
        return


def memory_in_use(device: torch.device) -> int:
    """Resident bytes of this process; of a CUDA device, those that its tensors take."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take: of the machine and of its control groups.

    On CUDA, those that the device has free, with what torch keeps for reuse.
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    return max(0, min([int(psutil.virtual_memory().available), *_left_in_groups()]))


_ROOT = Path("/sys/fs/cgroup")
_V1, _V2 = ("limit_in_bytes", "usage_in_bytes"), ("max", "current")


def _left_in_groups(root: Path = _ROOT, membership: Path = Path("/proc/self/cgroup")) -> list[int]:
    """What each control group around this process has left; files' pages are taken for free."""
    try:
        lines = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        return []
    left = []
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if controllers and "memory" not in controllers.split(","):
            continue
        names = _V1 if controllers else _V2
        for group in _ancestors(root / "memory" if controllers else root, path):
            try:
                limit, used = ((group / f"memory.{name}").read_text().strip() for name in names)
                stat = dict(
                    line.split() for line in (group / "memory.stat").read_text().splitlines()
                )
            except (OSError, ValueError):
                continue
            if limit != "max":
                droppable = stat.get("total_inactive_file", stat.get("inactive_file", 0))
                left.append(int(limit) - int(used) + int(droppable))
    return left


def _ancestors(root: Path, path: str) -> Iterator[Path]:
    # Inside a container the path may be one of the host, of which only the root is mounted.
    group = root / path.strip("/")
    yield from (place for place in (group, *group.parents) if place.is_relative_to(root))
