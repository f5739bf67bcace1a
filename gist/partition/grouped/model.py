"""From m subnets of one shape to one grouped model with the same forward pass."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import nn
from torch_geometric.nn.models.basic_gnn import BasicGNN

from gist.partition.grouped.grouping import Grouping, NotGroupableError
from gist.partition.grouped.pyg import takes_matrices
from gist.partition.rules.registry import has_rule, without_caches
from gist.partition.spec import PartitionSpec, model_tensors
from gist.partition.subnet import scale_input_of


def group_model(
    narrow: nn.Module, spec: PartitionSpec, scales: Mapping[str, float], num_subnets: int
) -> nn.Module:
    """The grouped form of a narrow model: the same forward pass over m subnets at once.

    Args:
        narrow: One subnet, as :func:`~gist.partition.subnet.build_subnet` gives it; left as it is.
        spec: Partition spec of the whole model.
        scales: Width correction by module path, as
            :func:`~gist.partition.subnet.width_scales` gives it.
        num_subnets: m.

    Returns:
        A model of the same class, whose tensors are named as those of ``narrow``, with a leading
        dim ``m``, and empty.

    Raises:
        NotGroupableError: a layer has no grouped form.
    """
    with without_caches(narrow):
        model = copy.deepcopy(narrow)
    absent = [path for path in spec.blocks if not has_rule(model.get_submodule(path))]
    if absent:
        raise NotGroupableError("subnets lack whole modules", got=absent[0])
    grouping = Grouping(num_subnets)
    grouped = grouping.layer(model) if has_rule(model) else grouping.children(model)
    for path, factor in scales.items():
        scale_input_of(grouped.get_submodule(path), factor)
    if isinstance(grouped, BasicGNN) and all(takes_matrices(conv) for conv in grouped.convs):
        grouped.accepts_adjacency = True
    shapes = {name: tuple(tensor.shape) for name, tensor in model_tensors(grouped).items()}
    wanted = {n: (num_subnets, *t.shape) for n, t in model_tensors(narrow).items()}
    wrong = [name for name in wanted if shapes.get(name) != wanted[name]]
    if wrong or shapes.keys() - wanted.keys():
        first = wrong[0] if wrong else min(shapes.keys() - wanted.keys())
        raise NotGroupableError(
            "the grouped form does not have the tensors of its subnets",
            got=f"{first}: {shapes.get(first)}",
            expected=wanted.get(first),
        )
    return grouped
