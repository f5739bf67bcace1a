"""What one of several workers has of a model that is spread over them, and what is on its way."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from gist.execution.shards import Home, exchange_groups
from gist.partition.assignment import Assignment
from gist.partition.spec import PartitionSpec
from gist.partition.transfer import Selection


def share_of_model(
    tensors: Mapping[str, Tensor], spec: PartitionSpec, *, num_subnets: int, workers: int
) -> float:
    """The share of its bytes that one of the workers has.

    Rows of most tensors are dealt evenly; those that stay with the worker that trained them last
    are as many as its subnets hold. What all subnets hold, every worker has.

    Args:
        tensors: Parameters and buffers of the model by full name.
        spec: Its partition spec.
        num_subnets: m.
        workers: W.
    """
    if workers == 1:
        return 1.0
    mine = 0.0
    for name, tensor in tensors.items():
        home = Home.of(spec.layouts[name])
        if home is None:
            mine += tensor.nbytes
        elif home.moves:
            mine += tensor.nbytes * -(-num_subnets // workers) / num_subnets
        else:
            mine += tensor.nbytes * -(-home.size // workers) / home.size
    return min(mine / max(sum(tensor.nbytes for tensor in tensors.values()), 1), 1.0)


def bytes_of_exchange(
    tensors: Mapping[str, Tensor], spec: PartitionSpec, assignment: Assignment, *, workers: int
) -> tuple[int, int]:
    """A worker's subnets while they wait or are done, in bytes; and what is on its way at a time.

    Args:
        tensors: Parameters and buffers of the model by full name.
        spec: Its partition spec.
        assignment: Of which the first subnet holds most.
        workers: W.
    """
    if workers == 1:
        return 0, 0
    selection = Selection(spec, assignment, 0)
    own = -(-assignment.num_subnets // workers)
    held = {
        name: own * selection.numel(layout) * tensor.element_size()
        for name, tensor in tensors.items()
        if selection.holds(layout := spec.layouts[name])
    }
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    groups = exchange_groups(tensors, spec, dtypes)
    sizes = sorted(sum(held.get(name, 0) for name in group) for group in groups)
    waiting = sum(held.values()) if own > 1 else 0
    return waiting, 2 * sum(sizes[-2:]) + sum(held.values()) - waiting
