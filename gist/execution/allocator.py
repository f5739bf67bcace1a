"""Freed memory that is kept for the next step, instead of being given back and asked for again.

glibc maps every large block anew and unmaps it when it is freed, so that every tensor of every step
is handed out page by page by the kernel, each page cleared first: on a CPU with large batches that
takes up to half of a training step. Kept in the heap, pages are handed out once.

The price is resident memory. PyTorch asks for aligned blocks, which glibc takes from slightly
larger ones, so that a hole seldom fits the next tensor of the same size: a run then takes up to
twice the memory that its tensors do (:data:`GROWTH`). So memory is kept only where there is room.

Transparent huge pages serve the same end at no such price, but PyTorch decides on them when it
makes its first tensor: set ``THP_MEM_ALLOC_ENABLE=1`` before the program starts.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

GROWTH = 2.0
"""Resident memory over what tensors take, at most, where freed memory is kept."""

# Parameters of mallopt(3), and what glibc's own adjustment of its thresholds ends at on 64 bits.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_LARGEST_MMAP_THRESHOLD = 32 * 2**20
_MMAP_MAX_DEFAULT = 65536

Mode = dict[int, int]
_KEPT: Mode = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1}
_GIVEN_BACK: Mode = {
    _MMAP_MAX: _MMAP_MAX_DEFAULT,
    _MMAP_THRESHOLD: 2**20,
    _TRIM_THRESHOLD: 2**20,
}
_USUAL: Mode = {
    _MMAP_MAX: _MMAP_MAX_DEFAULT,
    _MMAP_THRESHOLD: _LARGEST_MMAP_THRESHOLD,
    _TRIM_THRESHOLD: 2 * _LARGEST_MMAP_THRESHOLD,
}

_lock = threading.Lock()
_entered: list[Mode] = []
"""The modes that are entered and not yet left, by all threads."""


@contextmanager
def keeps_freed_memory(needed_bytes: int, limit_bytes: int) -> Iterator[bool]:
    """Keeps what is freed inside it for later, where there is room; gives it back on leaving.

    May be nested, and entered by several threads; the last one that leaves gives back. It concerns
    the whole process, and there the large blocks of the main thread, which also runs the backward
    pass of what is on the CPU. Afterwards glibc's thresholds stand where its own adjustment takes
    them in a process that frees large blocks, and stay there.

    Does nothing without glibc, with another allocator loaded into the process, or where the user
    has set glibc's thresholds (``MALLOC_MMAP_THRESHOLD_`` and its like, or ``GLIBC_TUNABLES``): see
    :func:`obstacle`.

    Args:
        needed_bytes: What the process takes at its peak without this.
        limit_bytes: What it may take. Nothing is kept if :data:`GROWTH` times the need exceeds it.

    Yields:
        Whether freed memory is kept.
    """
    if needed_bytes * GROWTH > limit_bytes or obstacle() is not None:
        yield _KEPT in _entered
        return
    with _in_mode(_KEPT):
        yield True


@contextmanager
def gives_back_freed_memory() -> Iterator[None]:
    """Gives back blocks of 1 MiB and more as soon as they are freed inside it.

    By itself glibc keeps blocks of up to 32 MiB in its heap, where the holes between them may come
    to as much as the tensors take. Here the process takes what its tensors take, at the price of
    the time that :func:`keeps_freed_memory` saves. Does nothing while memory is kept by that, or
    where there is an :func:`obstacle`. May be nested, and entered by several threads.
    """
    if obstacle() is not None:
        yield
        return
    with _in_mode(_GIVEN_BACK):
        yield


@contextmanager
def _in_mode(mode: Mode) -> Iterator[None]:
    """Counts a mode in while it runs; what is then in force follows from all that are."""
    libc = ctypes.CDLL("libc.so.6")
    with _lock:
        before = _in_force()
        _entered.append(mode)
        _change(libc, before, _in_force())
    try:
        yield
    finally:
        with _lock:
            before = _in_force()
            _entered.remove(mode)
            _change(libc, before, _in_force())


def _in_force() -> Mode:
    """To keep goes before to give back: whoever keeps has made sure that there is room."""
    return next((mode for mode in (_KEPT, _GIVEN_BACK) if mode in _entered), _USUAL)


def _change(libc: ctypes.CDLL, before: Mode, after: Mode) -> None:
    if after != before:
        _set(libc, after)
        if before is _KEPT:
            libc.malloc_trim(0)


def _set(libc: ctypes.CDLL, options: Mode) -> None:
    for name, value in options.items():
        libc.mallopt(name, value)


def obstacle() -> str | None:
    """Why freed memory cannot be kept in this process; None where it can."""
    if sys.platform != "linux":
        return "this needs glibc on Linux"
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    for name in ("mmap_threshold", "mmap_max", "trim_threshold", "top_pad"):
        variable = f"MALLOC_{name.upper()}_"
        if variable in os.environ or f"glibc.malloc.{name}=" in tunables:
            return f"{variable if variable in os.environ else 'GLIBC_TUNABLES'} is set"
    try:
        libc, process = ctypes.CDLL("libc.so.6"), ctypes.CDLL(None)
        functions = [ctypes.cast(each.malloc, ctypes.c_void_p).value for each in (libc, process)]
    except (OSError, AttributeError):
        return "the C library is not glibc"
    if not all(hasattr(libc, name) for name in ("gnu_get_libc_version", "malloc_trim")):
        return "the C library is not glibc"
    return None if functions[0] == functions[1] else "another allocator than glibc's is loaded"
