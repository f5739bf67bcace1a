"""Evaluation of a network whose residual blocks are units: branches scaled by how often they ran.

A subnet trains with a share of a stage's blocks; the whole network has all of them. Scaling the
branch of each partitioned block by that share keeps what the stage adds alike in expectation, as
dropout does (ResIST, Dun et al., 2022; ``max(1/S, min_blocks/total)`` there).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gist.errors import PartitionError
from gist.partition.assignment import Assignment
from gist.partition.rules.registry import has_rule, rule_of
from gist.partition.rules.residual import ResidualRule
from gist.partition.spec import PartitionSpec
from gist.partition.subnet import Absent


def block_shares(spec: PartitionSpec, assignment: Assignment) -> dict[str, float]:
    """Share of its blocks that a subnet holds, averaged over the subnets, by group of blocks."""
    groups = dict.fromkeys(group for group, _ in spec.blocks.values())
    return {
        group: sum(units.numel() for units in assignment.held[group])
        / (assignment.num_subnets * spec.groups[group].size)
        for group in groups
    }


@contextmanager
def scaled_blocks(
    model: nn.Module, spec: PartitionSpec, shares: Mapping[str, float]
) -> Iterator[None]:
    """While open, every partitioned block of ``model`` scales its branch by its group's share.

    Args:
        model: The model of ``spec``, or a copy or subnet of it; absent blocks are passed over.
        spec: Says which modules are blocks.
        shares: By group, in (0, 1]; as :func:`block_shares` gives them.

    Raises:
        PartitionError: a block whose type has no
            :class:`~gist.partition.rules.residual.ResidualRule`, or a share that is missing or
            out of range.
    """
    hooks = [
        end.register_forward_hook(partial(_scale, share))
        for _, end, share in _branch_ends(model, spec, shares)
        if share != 1
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def fold_depth(model: nn.Module, spec: PartitionSpec, shares: Mapping[str, float]) -> None:
    """Scales the branches for good: multiplies weight and bias of each branch's last layer.

    The function of the model is then that under :func:`scaled_blocks`, to rounding, without hooks:
    for export.

    Args:
        model: As for :func:`scaled_blocks`; changed in place.
        spec: Likewise.
        shares: Likewise.

    Raises:
        PartitionError: as :func:`scaled_blocks`; or a branch whose last layer does not scale with
            its weight. Nothing is changed then.
    """
    ends = _branch_ends(model, spec, shares)
    for path, end, share in ends:
        linear = type(end) in _SCALE_WITH_WEIGHT and end.weight is not None
        if share != 1 and not linear:
            raise PartitionError(
                f"the branch of {path} cannot be scaled by its weight",
                got=str(end),
                expected="a linear, convolution or affine batch normalisation layer at its end",
                remedy="keep the model and evaluate it under scaled_blocks",
            )
    for _, end, share in ends:
        if share != 1:
            for tensor in (end.weight, end.bias):
                if isinstance(tensor, Tensor):
                    tensor.mul_(share)


_SCALE_WITH_WEIGHT = (nn.Linear, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d)


def _branch_ends(
    model: nn.Module, spec: PartitionSpec, shares: Mapping[str, float]
) -> list[tuple[str, nn.Module, float]]:
    ends = []
    for path, (group, _) in spec.blocks.items():
        if not 0 < shares.get(group, 0) <= 1:
            raise PartitionError(
                f"blocks of group {group!r} need a share to scale with",
                got=shares.get(group),
                expected="a number in (0, 1]",
            )
        block = model.get_submodule(path)
        if isinstance(block, Absent):
            continue
        rule = rule_of(block) if has_rule(block) else None
        if not isinstance(rule, ResidualRule):
            raise PartitionError(
                f"{path} has no residual branch that could be scaled",
                got=f"{type(block).__module__}.{type(block).__qualname__}",
                expected="a block type with a rule that names the end of its branch",
                remedy="register a subclass of gist.ResidualRule for it",
            )
        ends.append((path, rule.branch_end(block), shares[group]))
    return ends


def _scale(share: float, module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * share
