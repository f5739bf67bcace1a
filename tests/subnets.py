"""Subnets compared with the whole model, for tests of models and rules."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from gist import partition_spec
from gist.partition.assignment import Assignment
from gist.partition.samplers import DisjointUniform, Overlapping
from gist.partition.spec import PartitionSpec, model_tensors
from gist.partition.wiring import Wiring
from gist.verify import subnet_difference, verify_identity


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@torch.no_grad()
def perturbed(model: nn.Module) -> nn.Module:
    """The model in float64, in evaluation mode; nothing is zero or one, and features stay alive."""
    torch.manual_seed(0)
    for name, tensor in model_tensors(model.double().eval()).items():
        if name.endswith("running_mean"):
            tensor.normal_(std=0.1)
        elif name.endswith("running_var"):
            tensor.uniform_(0.3, 0.8)
        elif tensor.is_floating_point():
            tensor.mul_(1.5).add_(torch.randn_like(tensor), alpha=0.1)
    return model


def assignments(spec: PartitionSpec) -> list[Assignment]:
    """A disjoint and an overlapping deal."""
    few = min(2, *spec.sizes.values())
    return [
        DisjointUniform()(spec.sizes, few, seed=1, round=0),
        Overlapping(min_units=2)(spec.sizes, 3, seed=2, round=1),
    ]


def largest_difference(model: nn.Module, x: Any, wiring: Wiring | None = None) -> float:
    """Of any subnet's output from the masked whole model's, relative; float64."""
    model = perturbed(model)
    spec = partition_spec(model, wiring)
    out = model(x).detach()
    assert (out - out.flip(0)).abs().max() > 1e-3 * out.abs().max(), "differences can be seen"
    worst = 0.0
    for assignment in assignments(spec):
        verify_identity(model, spec, assignment)
        for i in range(assignment.num_subnets):
            worst = max(worst, subnet_difference(model, spec, assignment, i, (x,)))
    return worst


def without_absent_blocks(
    model: nn.Module, spec: PartitionSpec, assignment: Assignment, subnet: int
) -> nn.Module:
    """A copy of the whole model in which each block that a subnet does not hold is the identity."""
    shallow = copy.deepcopy(model)
    for path, (group, unit) in spec.blocks.items():
        if unit not in assignment.held[group][subnet].tolist():
            shallow.set_submodule(path, nn.Identity())
    return shallow
