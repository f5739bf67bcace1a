"""Freed memory is kept where there is room: seen by counting the pages that are handed out."""

from __future__ import annotations

import ctypes
import resource
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import SimpleNamespace

import psutil
import pytest
import torch

from gist.execution import allocator
from gist.execution.allocator import GROWTH, gives_back_freed_memory, keeps_freed_memory
from gist.execution.memory import release_freed_memory

BLOCK = 48 * 2**20  # more than glibc keeps by itself, once it has adjusted its thresholds
ROOM = {"needed_bytes": 1, "limit_bytes": 2**40}

needs_glibc = pytest.mark.skipif(allocator.obstacle() is not None, reason=str(allocator.obstacle()))


def is_mapped_anew() -> bool:
    """Whether glibc maps a large block apart from its heap: a bit in front of the block says so."""
    libc = ctypes.CDLL("libc.so.6")
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    block = libc.malloc(4 * 2**30)
    try:
        return bool(ctypes.c_size_t.from_address(block - 8).value & 2)
    finally:
        libc.free(block)


def pages(steps: int = 8) -> int:
    """Pages that the kernel hands out for a step that makes and frees tensors, at the least.

    The first ones also pay for the heap to grow, until the holes between its blocks suffice.
    """

    def handed_out() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    counts = []
    for _ in range(steps):
        before = handed_out()
        x = torch.ones(BLOCK // 4, requires_grad=True)
        (x * 2).sum().backward()
        counts.append(handed_out() - before)
        del x
    return min(counts)


def resident() -> int:
    return psutil.Process().memory_info().rss


@needs_glibc
def test_pages_are_handed_out_once_and_given_back_at_the_end():
    release_freed_memory()  # of earlier tests, whose pages would serve
    before = resident()
    with keeps_freed_memory(**ROOM) as kept:
        assert kept
        assert pages() < 10, "of 36,864, or of 72 huge ones"
        assert resident() - before > BLOCK
    assert resident() - before < BLOCK / 2


@needs_glibc
def test_only_the_outermost_ends_it():
    assert is_mapped_anew()
    with keeps_freed_memory(**ROOM):
        with keeps_freed_memory(**ROOM):
            assert not is_mapped_anew()
        with keeps_freed_memory(needed_bytes=2, limit_bytes=1) as kept:
            assert kept, "an outer one keeps"
        assert not is_mapped_anew()
    assert is_mapped_anew()


@needs_glibc
def test_an_error_ends_it_too():
    with pytest.raises(KeyError), keeps_freed_memory(**ROOM):
        raise KeyError
    assert is_mapped_anew()


@needs_glibc
def test_nothing_is_kept_where_there_is_no_room():
    need = 10**9
    with keeps_freed_memory(need, int(need * GROWTH) - 1) as kept:
        assert not kept
        assert is_mapped_anew()
    with keeps_freed_memory(need, int(need * GROWTH)) as kept:
        assert kept


@needs_glibc
def test_where_it_matters_smaller_blocks_are_given_back_too(monkeypatch):
    # Holes of the heap are used first, so whether a block is mapped anew says little here.
    calls = []
    monkeypatch.setattr(allocator, "_set", lambda _, options: calls.append(options))
    with gives_back_freed_memory():
        assert calls == [allocator._GIVEN_BACK]
        assert max(calls[0].values()) < allocator._LARGEST_MMAP_THRESHOLD
    assert calls[1:] == [allocator._USUAL]
    calls.clear()
    with keeps_freed_memory(**ROOM), gives_back_freed_memory():
        assert calls == [allocator._KEPT], "who keeps decides"


@pytest.fixture
def modes(monkeypatch) -> list[dict[int, int]]:
    """What glibc is told, in order."""
    calls: list[dict[int, int]] = []
    monkeypatch.setattr(allocator, "_set", lambda _, options: calls.append(options))
    return calls


@needs_glibc
def test_giving_back_ends_with_the_outermost(modes):
    with gives_back_freed_memory():
        with gives_back_freed_memory():
            pass
        assert modes == [allocator._GIVEN_BACK]
    assert modes == [allocator._GIVEN_BACK, allocator._USUAL]


@needs_glibc
def test_after_keeping_inside_of_it_memory_is_given_back_again(modes):
    with gives_back_freed_memory():
        with keeps_freed_memory(**ROOM), keeps_freed_memory(**ROOM):
            assert modes[-1] == allocator._KEPT
        assert modes == [allocator._GIVEN_BACK, allocator._KEPT, allocator._GIVEN_BACK]
    assert modes[3:] == [allocator._USUAL]


def test_each_way_of_giving_back_undoes_all_that_keeping_sets():
    assert allocator._KEPT.keys() <= allocator._GIVEN_BACK.keys() == allocator._USUAL.keys()


@needs_glibc
def test_runs_side_by_side_may_leave_in_any_order(modes):
    kept, given, again = keeps_freed_memory(**ROOM), gives_back_freed_memory(), ExitStack()
    kept.__enter__()
    given.__enter__()
    again.enter_context(gives_back_freed_memory())
    assert modes == [allocator._KEPT]
    kept.__exit__(None, None, None)
    assert modes[1:] == [allocator._GIVEN_BACK]
    given.__exit__(None, None, None)
    assert modes[2:] == []
    again.close()
    assert modes[2:] == [allocator._USUAL]
    assert allocator._entered == []


@needs_glibc
def test_threads_that_enter_and_leave_at_once_lose_no_mode(modes):
    start = threading.Barrier(4)

    def work(kind: int) -> None:
        start.wait()
        for _ in range(200):
            with keeps_freed_memory(**ROOM) if kind % 2 else gives_back_freed_memory():
                pass

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert modes[-1] == allocator._USUAL
    assert allocator._entered == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MALLOC_TRIM_THRESHOLD_", "100000"),
        ("MALLOC_MMAP_MAX_", "3"),
        ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=1000000"),
    ],
)
def test_what_the_user_sets_stays(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(allocator, "_set", lambda *_: pytest.fail("mallopt was called"))
    with keeps_freed_memory(**ROOM) as kept:
        assert not kept
    assert allocator.obstacle() == f"{name} is set"


@needs_glibc
def test_what_the_user_sets_elsewhere_plays_no_part(monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "4")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    with keeps_freed_memory(**ROOM) as kept:
        assert kept


def other_system(monkeypatch):
    monkeypatch.setattr(allocator.sys, "platform", "darwin")
    return "glibc on Linux"


def no_libc(monkeypatch):
    def fail(name):
        raise OSError

    monkeypatch.setattr(allocator.ctypes, "CDLL", fail)
    return "not glibc"


def function():
    return ctypes.CFUNCTYPE(None)(lambda: None)


def other_libc(monkeypatch):
    library = SimpleNamespace(malloc=function())
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: library)
    return "not glibc"


def other_malloc(monkeypatch):
    libraries = {
        name: SimpleNamespace(malloc=function(), gnu_get_libc_version=None, malloc_trim=None)
        for name in (None, "libc.so.6")
    }
    monkeypatch.setattr(allocator.ctypes, "CDLL", libraries.__getitem__)
    return "another allocator"


@pytest.mark.parametrize("there", [other_system, no_libc, other_libc, other_malloc])
def test_other_allocators_are_left_alone(there, monkeypatch):
    why = there(monkeypatch)
    with keeps_freed_memory(**ROOM) as kept:
        assert not kept
    assert why in allocator.obstacle()
