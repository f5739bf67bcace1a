"""Bytes that workers exchange in a round: closed formulas, for GIST and what it is compared with.

Nothing is measured here, and nothing sent: one process exchanges nothing. Shape legend: ``m``
subnets, ``W`` workers, ``ζ`` local steps, ``P`` bytes of the whole model's trainable parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from gist.partition.assignment import Assignment
from gist.partition.spec import PartitionSpec
from gist.partition.transfer import Selection


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


def exchange_per_round(
    spec: PartitionSpec,
    assignment: Assignment,
    item_bytes: dict[str, int],
    trained: Iterable[str],
    *,
    workers: int,
    local_steps: int,
) -> dict[str, Exchange]:
    """What a round costs under four schemes, all of which see the same ``m ζ`` batches in it.

    Subnet ``i`` runs on worker ``i mod W``. With GIST, each worker is home to ``1 / W`` of every
    tensor's rows, dealt without regard to who will hold them, so that an entry's home is another
    worker than its holder's with probability ``1 - 1 / W``:

    - entries that units index along two dims or more (hidden to hidden) go from home to holder
      before a round and back after it; only those held in the round move;
    - entries that units index along one dim (first layer, last layer, biases) are all held in
      every round, and go straight from one holder to the next: once in a round;
    - entries that all subnets hold (the output bias) are averaged: each worker sends those of its
      subnets to all others.

    The others move the whole model: data parallel training sums the gradients of all ``P`` after
    each of its ``m ζ / W`` steps, local SGD averages ``P`` once in ``ζ`` steps of each worker, both
    by a ring, which sends ``2 (W - 1) / W`` of ``P`` from each worker; with a central server, as in
    the GIST authors' release, worker 0 sends out and takes back the subnets of all others.

    Args:
        spec: Partition spec of the model.
        assignment: Which units each subnet holds; any round will do.
        item_bytes: Bytes of one entry of each parameter and buffer, by full name.
        trained: Names of the parameters that are trained.
        workers: ``W``.
        local_steps: ``ζ``.
    """
    m = assignment.num_subnets
    subnets = [0] * m
    moving, whole, shared = 0, 0, 0
    for i in range(m):
        selection = Selection(spec, assignment, i)
        for name, size in item_bytes.items():
            layout = spec.layouts[name]
            if not selection.holds(layout):
                continue
            held = selection.numel(layout) * size
            subnets[i] += held
            dims = len({slot.dim for slot in layout.slots}) or (layout.owner is not None)
            if dims >= 2:
                moving += held
            elif dims == 1:
                whole += held
            else:
                shared += held
    away = 1 - 1 / workers
    peer = round(away * (2 * moving + whole)) + (workers - 1) * shared
    model = sum(math.prod(spec.layouts[name].shape) * item_bytes[name] for name in trained)
    ring = 2 * (workers - 1) * model
    served = 2 * sum(size for i, size in enumerate(subnets) if i % workers)
    averages = m / workers
    schemes = {
        "gist": (peer, 2 * peer / workers, "held entries that change worker"),
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
