"""Independent random streams, named by a key instead of by the order in which they are used."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch


def stream_seed(*key: int | str) -> int:
    """A 63-bit seed that depends on every part of ``key`` and on nothing else.

    Two keys that differ anywhere give unrelated seeds, so a run's random numbers do not depend on
    which executor drew them, in which order, or on how many workers.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in key)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextmanager
def seeded(*key: int | str, device: torch.device | None = None) -> Iterator[None]:
    """Draws torch's global random numbers from the stream of ``key``, on the CPU and ``device``.

    The states of both generators are as they were on leaving; no other device is touched.
    """
    cuda = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(stream_seed(*key))
        for each in cuda:
            with torch.cuda.device(each):
                torch.cuda.manual_seed(stream_seed(*key))
        yield


class ResumedStream:
    """The stream of :func:`seeded` with the same key, drawn from bit by bit, others in between.

    Args:
        *key: Names it.
        device: See :func:`seeded`.
    """

    def __init__(self, *key: int | str, device: torch.device | None = None) -> None:
        self._key, self._device = key, device
        self._states: tuple[torch.Tensor, torch.Tensor | None] | None = None

    @contextmanager
    def resumed(self) -> Iterator[None]:
        """Draws torch's global random numbers from where it was left the last time."""
        cuda = self._device if self._device is not None and self._device.type == "cuda" else None
        with seeded(*self._key, device=self._device):
            if self._states is not None:
                torch.set_rng_state(self._states[0])
                if cuda is not None:
                    assert self._states[1] is not None
                    torch.cuda.set_rng_state(self._states[1], cuda)
            yield
            on_cuda = None if cuda is None else torch.cuda.get_rng_state(cuda)
            self._states = torch.get_rng_state(), on_cuda


_EACH: ContextVar[tuple[torch.Generator, ...]] = ContextVar("generators of stacked subnets")


@contextmanager
def seeded_each(*keys: tuple[int | str, ...], device: torch.device) -> Iterator[None]:
    """One stream per stacked subnet, for layers that draw apart for each, as dropout does.

    :func:`each_generator` gives them: in the state that :func:`seeded` with the same key gives the
    global generator. What draws from the global generator nevertheless has a stream of its own.
    """
    generators = tuple(torch.Generator(device).manual_seed(stream_seed(*key)) for key in keys)
    token = _EACH.set(generators)
    try:
        with seeded("stacked", *(part for key in keys for part in key), device=device):
            yield
    finally:
        _EACH.reset(token)


def each_generator() -> tuple[torch.Generator, ...] | None:
    """The generators of the stacked subnets that are being trained; None outside of that."""
    return _EACH.get(None)


def stream(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by :func:`stream_seed`."""
    return torch.Generator().manual_seed(stream_seed(*key))
