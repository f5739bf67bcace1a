"""Making items ahead: order, errors, and no thread left behind."""

from __future__ import annotations

import threading
import time

import pytest

from gist.graph import prefetch
from gist.graph.prefetch import prefetched


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "gist-batches"]


def gone(within: float = 10.0) -> bool:
    end = time.monotonic() + within
    while threads() and time.monotonic() < end:
        time.sleep(0.01)
    return not threads()


@pytest.fixture(params=[1, 8], ids=["one core", "cores"])
def cores(request, monkeypatch):
    monkeypatch.setattr(prefetch, "_cores", lambda: request.param)
    return request.param


def test_made_ahead_is_the_same_in_the_same_order(cores):
    assert list(prefetched(iter(range(50)))) == list(range(50))
    assert list(prefetched(iter(()))) == []
    assert threads() == []


def test_the_next_item_is_made_while_one_is_in_use(monkeypatch):
    monkeypatch.setattr(prefetch, "_cores", lambda: 2)
    made = [threading.Event() for _ in range(3)]

    def items():
        for i in range(3):
            made[i].set()
            yield threading.current_thread()

    iterator = prefetched(items())
    maker = next(iterator)
    assert made[1].wait(10)
    assert not made[2].is_set(), "one ahead, not all"
    assert maker is not threading.main_thread()
    iterator.close()
    assert threads() == []


def test_errors_of_the_maker_reach_the_user(cores):
    def items():
        yield 1
        raise ValueError("no second")

    iterator = prefetched(items())
    assert next(iterator) == 1
    with pytest.raises(ValueError, match="no second"):
        next(iterator)
    assert threads() == []
    assert list(iterator) == []


def test_a_user_who_stops_early_or_raises_leaves_no_thread():
    for _ in prefetched(iter(range(9))):
        break
    assert gone()

    def fails():
        for item in prefetched(iter(range(9))):
            raise RuntimeError(item)

    with pytest.raises(RuntimeError):
        fails()
    assert gone()


def test_an_iterator_that_somebody_holds_keeps_no_thread_but_goes_on(monkeypatch):
    monkeypatch.setattr(prefetch, "_cores", lambda: 2)
    monkeypatch.setattr(prefetch, "_IDLE_SECONDS", 0.02)
    held = prefetched(iter(range(5)))
    assert [next(held), next(held)] == [0, 1]
    assert gone()
    assert list(held) == [2, 3, 4]
    assert threads() == []
