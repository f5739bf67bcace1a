"""Whole tensors that are trained, instead of units."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from gist.federated.selection.base import (
    Request,
    Selection,
    ServerView,
    State,
    Units,
    Widths,
    drawn,
    rounded,
)


@dataclass(frozen=True, kw_only=True)
class PartialTensors(Selection):
    """Partial variable training: all units are sent, some of the tensors are trained and come back.

    Yang et al., "Partial Variable Training for Efficient On-Device Federated Learning", 2021
    (arXiv 2110.05607). ``round(p T)`` of the ``T`` parameters, at least one, uniformly drawn for
    every task; the others are constants in its local steps. Buffers come back with them. Merged by
    :class:`~gist.partition.merging.CountMean`, a mean over those who trained a tensor.

    The capacity is the share of tensors here, and in expectation that of the bytes that come back,
    with which the clock reckons.
    """

    def count(self, size: int, request: Request) -> int:
        """All of them."""
        return size

    def choose(self, widths: Widths, request: Request, view: ServerView, state: State) -> Units:
        """Never asked, as every group is sent whole."""
        return {}

    def trained(self, names: Iterable[str], request: Request) -> frozenset[str]:
        """See :meth:`Selection.trained`."""
        known = sorted(names)
        count = rounded(len(known), request.capacity)
        chosen = drawn(len(known), count, request.seed, request.task, "tensors")
        return frozenset(known[number] for number in chosen.tolist())

    def uploaded(self, request: Request) -> float:
        """See :meth:`Selection.uploaded`."""
        return request.capacity
