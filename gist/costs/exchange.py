"""Bytes that workers exchange in a round: closed formulas, for subnets and other schemes.

Nothing is measured here, and nothing sent. Shape legend: ``m`` subnets, ``W`` workers, ``ζ`` local
steps, ``P`` bytes of the whole model's trainable parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gist.execution.shards import piece
from gist.partition.assignment import Assignment
from gist.partition.spec import ParamLayout, PartitionSpec
from gist.partition.transfer import Selection, is_exclusive

_LOSS_BYTES = 8
"""Of each subnet's loss, which every worker is told."""

_STEP_BYTES = 4
"""Of an optimiser's count of steps, one for each parameter."""


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """Bytes of one round's exchange under one scheme.

    Attributes:
        total: Sent by all workers together.
        busiest: Sent and received by the worker that sends and receives most.
        formula: How they are counted.
    """

    total: int
    busiest: int
    formula: str


class Traffic:
    """Bytes that each worker sends and receives in a round of subnets, round by round.

    Subnet ``i`` is trained by worker ``i mod W``. Let ``h_i(w)`` be the bytes that subnet ``i``
    holds of rows that worker ``w`` has:

    - of a tensor that units index along two dims or more (hidden to hidden), worker ``w`` has
      every ``W``-th part of the rows, in order. ``h_i(w)`` travels from ``w`` to the worker of
      ``i`` before the round, and back after it;
    - of a tensor that units index along one dim (first layer, last layer, biases), or that belongs
      to one unit, a worker has what it trained last (before the first round: as above). ``h_i(w)``
      travels once. Where a round's subnets overlap in it, it travels as above;
    - what all subnets hold (the output bias; what of a ResNet is not partitioned) is averaged piece
      by piece, a ``W``-th of each tensor by every worker: it goes from the worker of ``i`` to all
      others, and the mean from these to all. Of ``f`` bytes ``(m / W + 1) (W - 1) f`` are sent, for
      ``m = W`` as many as by a ring. The loss of ``i`` is told to all.

    What stays with a worker is not sent, and not counted. Optimiser state that is carried travels
    as its parameter does, from the second round on, and back from the first.

    Args:
        spec: Partition spec of the model.
        item_bytes: Bytes of one entry of each parameter and buffer, by full name.
        workers: ``W``.
        state_bytes: Bytes of carried optimiser state for one entry of each trained parameter.
        counts_steps: Whether that state has a count of steps.
    """

    def __init__(
        self,
        spec: PartitionSpec,
        item_bytes: Mapping[str, int],
        *,
        workers: int,
        state_bytes: Mapping[str, int] | None = None,
        counts_steps: bool = False,
    ) -> None:
        self.spec, self.workers = spec, workers
        self.item_bytes, self.state_bytes = item_bytes, state_bytes or {}
        self.counts_steps = counts_steps
        self._owners: dict[str, Tensor] = {}
        self._rounds = 0

    def round(self, assignment: Assignment) -> list[tuple[int, int]]:
        """``(sent, received)`` of each worker in the next round."""
        size, m = self.workers, assignment.num_subnets
        moved = torch.zeros(size, size, dtype=torch.long)
        selections = [Selection(self.spec, assignment, i) for i in range(m)]
        for name, each in self.item_bytes.items():
            layout = self.spec.layouts[name]
            state = self.state_bytes.get(name, 0)
            steps = _STEP_BYTES if state and self.counts_steps else 0
            there, back = each + (state if self._rounds else 0), each + state
            exclusive = is_exclusive(layout, self.spec, assignment)
            owner = self._owner(layout)
            if steps and layout.owner is None:
                self._average(moved, m, 1, steps)
            if owner is None:
                self._average(moved, m, math.prod(layout.shape), back)
                continue
            for i, selection in enumerate(selections):
                if not selection.holds(layout):
                    continue
                worker = i % size
                rows = _rows(layout, selection)
                entries = selection.numel(layout) // max(rows.numel(), 1)
                held = torch.bincount(owner[rows], minlength=size) * entries
                counts = (held > 0) * (steps if layout.owner is not None else 0)
                moved[:, worker] += held * there + counts * (self._rounds > 0)
                if not (exclusive and _moves(layout)):
                    moved[worker] += held * back + counts
            if exclusive and _moves(layout):
                for i, selection in enumerate(selections):
                    if selection.holds(layout):
                        owner[_rows(layout, selection)] = i % size
        for i in range(m):
            moved[i % size] += _LOSS_BYTES
        moved.fill_diagonal_(0)
        self._rounds += 1
        return list(zip(moved.sum(dim=1).tolist(), moved.sum(dim=0).tolist(), strict=True))

    def _average(self, moved: Tensor, m: int, entries: int, item_bytes: int) -> None:
        """Adds what averaging ``m`` copies of so many entries moves between workers."""
        size = self.workers
        ends = [piece(entries, worker, size) for worker in range(size)]
        pieces = torch.tensor([(stop - start) * item_bytes for start, stop in ends])
        for i in range(m):
            moved[i % size] += pieces
        moved += pieces[:, None]

    def _owner(self, layout: ParamLayout) -> Tensor | None:
        """Which worker has each row; None for what every worker has."""
        if layout.is_shared:
            return None
        if layout.name not in self._owners:
            if layout.owner is not None:
                self._owners[layout.name] = torch.tensor([layout.owner[1] % self.workers])
            else:
                length = layout.shape[_dim(layout)]
                parts = torch.arange(length).tensor_split(self.workers)
                owner = [torch.full_like(part, worker) for worker, part in enumerate(parts)]
                self._owners[layout.name] = torch.cat(owner)
        return self._owners[layout.name]


def _dim(layout: ParamLayout) -> int:
    return min(slot.dim for slot in layout.slots)


def _moves(layout: ParamLayout) -> bool:
    return layout.owner is not None or len({slot.dim for slot in layout.slots}) == 1


def _rows(layout: ParamLayout, selection: Selection) -> Tensor:
    if layout.owner is not None:
        return torch.zeros(1, dtype=torch.long)
    rows = selection.index(layout)[_dim(layout)]
    return torch.arange(layout.shape[_dim(layout)]) if rows is None else rows


def exchange_per_round(
    spec: PartitionSpec,
    assignments: Iterable[Assignment],
    item_bytes: Mapping[str, int],
    trained: Iterable[str],
    *,
    workers: int,
    local_steps: int,
    state_bytes: Mapping[str, int] | None = None,
    counts_steps: bool = False,
) -> dict[str, Exchange]:
    """What a round costs under four schemes, all of which see the same ``m ζ`` batches in it.

    Under ``"gist"``, subnets of any method, workers exchange what changes hands: see
    :class:`Traffic`. The others move the whole model: data parallel training sums the gradients of
    all ``P`` after each of its ``m ζ / W`` steps, local SGD averages ``P`` once in ``ζ`` steps of
    each worker, both by a ring, which sends ``2 (W - 1) / W`` of ``P`` from each worker; with a
    central server, as in the GIST authors' release, worker 0 sends out and takes back the subnets
    of all others.

    Args:
        spec: Partition spec of the model.
        assignments: Which units each subnet holds, in the first rounds of a run; the last of them
            is the one that is counted. Two are enough: entries then travel from where the round
            before has left them.
        item_bytes: As for :class:`Traffic`.
        trained: Names of the parameters that are trained.
        workers: ``W``.
        local_steps: ``ζ``.
        state_bytes: As for :class:`Traffic`.
        counts_steps: As for :class:`Traffic`.
    """
    traffic = Traffic(
        spec, item_bytes, workers=workers, state_bytes=state_bytes, counts_steps=counts_steps
    )
    each: list[tuple[int, int]] = []
    for assignment in assignments:
        each = traffic.round(assignment)
    m = assignment.num_subnets
    model = sum(math.prod(spec.layouts[name].shape) * item_bytes[name] for name in trained)
    ring = 2 * (workers - 1) * model
    away = [Selection(spec, assignment, i) for i in range(m) if i % workers]
    served = 2 * sum(
        selection.numel(spec.layouts[name]) * size
        for selection in away
        for name, size in item_bytes.items()
        if selection.holds(spec.layouts[name])
    )
    averages = m / workers
    schemes = {
        "gist": (
            sum(sent for sent, _ in each),
            max(sent + received for sent, received in each),
            "held entries that change worker",
        ),
        "data_parallel": (
            ring * averages * local_steps,
            2 * ring * averages * local_steps / workers,
            "all gradients after each step",
        ),
        "local_sgd": (ring * averages, 2 * ring * averages / workers, "the whole model"),
        "central_server": (served, served, "every subnet through worker 0"),
    }
    return {
        name: Exchange(total=round(total), busiest=round(busiest), formula=formula)
        for name, (total, busiest, formula) in schemes.items()
    }
