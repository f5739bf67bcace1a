"""What follows a convolution: functions of one node's features, and norms over the whole graph.

Shape legend: ``N`` nodes, ``d`` feature columns.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg
from torch import Tensor, nn
from torch_geometric.nn.models import MLP

from gist.graph.live_bytes import linear_bytes

Step = Callable[[Tensor], Tensor]
"""Of ``[n, d]`` features, one row at a time: row ``i`` of the result depends on row ``i`` alone."""

CHUNK_BYTES = 4 * 2**20
"""Rows are worked on in chunks of about this size: they stay in the cache from step to step."""

TRIAL = 8
"""Rows of the smaller of two trials that tell how much memory steps take."""

_ROW_WISE: set[type[nn.Module]] = {
    nn.Identity,
    nn.Linear,
    pyg.Linear,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.Dropout,
    nn.AlphaDropout,
    nn.Sequential,
    nn.ModuleList,
    MLP,
    pyg.BatchNorm,  # looks at its inner module, which is checked too
    nn.CELU,
    nn.ELU,
    nn.GELU,
    nn.Hardshrink,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardtanh,
    nn.LeakyReLU,
    nn.LogSigmoid,
    nn.Mish,
    nn.PReLU,
    nn.RReLU,
    nn.ReLU,
    nn.ReLU6,
    nn.SELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Softplus,
    nn.Softshrink,
    nn.Softsign,
    nn.Tanh,
    nn.Tanhshrink,
    nn.Threshold,
}


def register_row_wise(module_type: type[nn.Module]) -> type[nn.Module]:
    """Declares that modules of exactly this type treat each node on its own in evaluation mode.

    Models with an activation or norm of an undeclared type have no layer-wise form. May be used as
    a decorator.
    """
    _ROW_WISE.add(module_type)
    return module_type


def is_row_wise(step: Any) -> bool:
    """Whether, in evaluation mode, a module and all within it treat each node on its own.

    A function that is no module, as PyG's models take for an activation, is believed to.
    """
    if not isinstance(step, nn.Module):
        return True
    return all(_is_row_wise(module) for module in step.modules())


def _is_row_wise(module: nn.Module) -> bool:
    if isinstance(module, nn.BatchNorm1d) and type(module) is nn.BatchNorm1d:
        return module.running_mean is not None
    if isinstance(module, pyg.LayerNorm) and type(module) is pyg.LayerNorm:
        return bool(module.mode == "node")
    return type(module) in _ROW_WISE


class RowFunction:
    """Steps that treat each node on its own, applied in chunks under a limit of memory.

    Args:
        steps: Applied in order; none at all is the identity.
        width: Columns of the rows that go in.
        like: A tensor of their dtype and device.

    Attributes:
        fixed: Bytes that it takes however few rows go in, found in a trial.
        each: Bytes that each row takes beyond those.
        out_width: Columns of the rows that come out.
    """

    def __init__(self, steps: Sequence[Step], width: int, like: Tensor) -> None:
        self.steps = tuple(steps)
        self.fixed, self.each, self.out_width = 0, 0, width
        if self.steps:
            trial = like.new_zeros(2 * TRIAL, width)
            self.fixed, self.each = linear_bytes(lambda rows: self(trial[:rows]), TRIAL)
            self.out_width = self(trial[:1]).size(1)

    def __call__(self, rows: Tensor) -> Tensor:
        """``[n, d] -> [n, d']``."""
        for step in self.steps:
            rows = step(rows)
        return rows

    def replaced(self, steps: Sequence[Step]) -> RowFunction:
        """Other steps that take as much memory as these do."""
        other = copy.copy(self)
        other.steps = tuple(steps)
        return other

    @property
    def smallest(self) -> int:
        """Bytes that one row takes."""
        return self.fixed + self.each

    def chunk(self, work: int) -> int:
        """Rows at a time within ``work`` bytes, at least 1."""
        spare = min(max(work, 0), self.fixed + CHUNK_BYTES) - self.fixed
        return max(spare // max(self.each, 1), 1)

    def in_place(self, rows: Tensor, work: int, seen: Callable[[Tensor], None] | None) -> None:
        """Replaces rows ``[n, d]`` by what the steps make of them.

        Args:
            rows: Changed in place, so the steps must keep the width.
            work: Bytes of memory that may be taken beside them.
            seen: Called with each finished chunk.
        """
        if not self.steps and seen is None:
            return
        for part in torch.split(rows, self.chunk(work)):
            if self.steps:
                part.copy_(self(part))
            if seen is not None:
                seen(part)


class Moments:
    """Mean and variance over all nodes, of all entries or of each column, chunk by chunk.

    Chunks are merged as by Chan, Golub & LeVeque (1979), in float64.

    Args:
        by_column: One pair for each column instead of one for everything.
    """

    def __init__(self, *, by_column: bool) -> None:
        self.dim = 0 if by_column else None
        self.count = 0
        self.mean: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0

    def add(self, rows: Tensor) -> None:
        """Takes a chunk ``[n, d]``."""
        count = rows.size(0) if self.dim == 0 else rows.numel()
        variance, mean = torch.var_mean(rows, dim=self.dim, correction=0)
        delta = mean.double() - self.mean
        total = self.count + count
        self.mean = self.mean + delta * (count / total)
        self.squares = (
            self.squares + variance.double() * count + delta**2 * (self.count * count / total)
        )
        self.count = total

    def result(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``(mean, variance)``, the variance with divisor n."""
        assert isinstance(self.mean, Tensor)
        assert isinstance(self.squares, Tensor)
        return self.mean.to(dtype), (self.squares / self.count).to(dtype)


class GraphNorm:
    """A norm whose statistics are those of all nodes, so that it takes two passes over them.

    Args:
        norm: PyG's ``LayerNorm`` in its mode ``"graph"``, or BatchNorm without running statistics.
    """

    def __init__(self, norm: Any) -> None:
        self.norm = getattr(norm, "module", norm)

    def moments(self) -> Moments:
        """What the first pass collects."""
        return Moments(by_column=isinstance(self.norm, nn.BatchNorm1d))

    def step(self, moments: Moments, dtype: torch.dtype) -> Step:
        """The second pass."""
        mean, variance = moments.result(dtype)
        norm = self.norm
        if isinstance(norm, nn.BatchNorm1d):
            return partial(
                F.batch_norm,
                running_mean=mean,
                running_var=variance,
                weight=norm.weight,
                bias=norm.bias,
                eps=norm.eps,
            )
        scale = variance.sqrt() + norm.eps

        def layer_norm(rows: Tensor) -> Tensor:
            out = (rows - mean).div_(scale)
            return out if norm.weight is None else out.mul_(norm.weight).add_(norm.bias)

        return layer_norm


def as_graph_norm(norm: Any) -> GraphNorm | None:
    """The two-pass form of a norm over all nodes; None where there is none."""
    inner = norm.module if type(norm) is pyg.BatchNorm else norm
    if type(norm) is pyg.LayerNorm or type(inner) is nn.BatchNorm1d:
        return GraphNorm(norm)
    return None
