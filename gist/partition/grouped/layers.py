"""Grouped forms of the layers of ``torch.nn``.

Shape legend: ``n`` nodes, ``m`` subnets, ``k`` features of one subnet; see
:mod:`gist.partition.grouped.grouping`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gist.partition.grouped.grouping import Grouping
from gist.partition.grouped.product import add_bias, grouped_product


class GroupedLinear(nn.Module):
    """m linear layers: ``[n, m, k]`` or shared ``[n, k]`` -> ``[n, m, o]``.

    Attributes:
        weight: ``[m, o, k]``.
        bias: ``[m, o]`` or None.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, linear: nn.Module, grouping: Grouping) -> None:
        super().__init__()
        grouping.tensor_of(linear, "weight", self)
        grouping.tensor_of(linear, "bias", self)

    def forward(self, x: Tensor) -> Tensor:
        """Applies subnet ``i``'s weight to its features."""
        return grouped_linear(x, self.weight, self.bias)


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``[n, m, k]`` or shared ``[n, k]``, by ``[m, o, k]`` and ``[m, o]`` -> ``[n, m, o]``."""
    return add_bias(grouped_product(x, weight), bias)


class GroupedLayerNorm(nn.Module):
    """m layer normalisations, each over its own features: ``[n, m, k]`` or ``[n, k]``."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, norm: Any, width: int, grouping: Grouping) -> None:
        super().__init__()
        self.width, self.eps = width, norm.eps
        grouping.tensor_of(norm, "weight", self)
        grouping.tensor_of(norm, "bias", self)

    def forward(self, x: Tensor, batch: Any = None, batch_size: Any = None) -> Tensor:
        """Normalises every row of every subnet; which graph a node is of plays no part."""
        out = F.layer_norm(x, (self.width,), None, None, self.eps)
        if self.weight is not None:
            out = (out if out.dim() == 3 else out.unsqueeze(1)) * self.weight
        return out if self.bias is None else out + self.bias


class GroupedBatchNorm(nn.Module):
    """m batch normalisations: features are on their own, so this is one over ``m * k``."""

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(self, norm: Any, grouping: Grouping) -> None:
        super().__init__()
        self.eps, self.momentum = norm.eps, norm.momentum
        self.track_running_stats = norm.track_running_stats
        self.num_subnets = grouping.num_subnets
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            grouping.tensor_of(norm, name, self)

    def forward(self, x: Tensor) -> Tensor:
        """Normalises every feature over the nodes, by statistics of the batch while training."""
        if x.dim() == 2:
            x = x.unsqueeze(1).expand(-1, self.num_subnets, -1)
        momentum = self.momentum or 0.0
        tracks = self.training and self.track_running_stats
        if tracks and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked[0])
        kept = tracks or not self.training
        out = F.batch_norm(
            x.flatten(1),
            _flat(self.running_mean) if kept else None,
            _flat(self.running_var) if kept else None,
            _flat(self.weight),
            _flat(self.bias),
            self.training or self.running_mean is None,
            momentum,
            self.eps,
        )
        return out.view(x.shape)


def _flat(tensor: Any) -> Any:
    return None if tensor is None else tensor.view(-1)


class GroupedPReLU(nn.Module):
    """m PReLUs, with one slope each or one per feature."""

    weight: nn.Parameter

    def __init__(self, act: nn.Module, grouping: Grouping) -> None:
        super().__init__()
        grouping.tensor_of(act, "weight", self)

    def forward(self, x: Tensor) -> Tensor:
        """``max(0, x) + slope * min(0, x)``: ``[n, m, k]`` or ``[n, k]`` -> ``[n, m, k]``."""
        x = x if x.dim() == 3 else x.unsqueeze(1)
        return torch.where(x > 0, x, self.weight * x)


class GroupedDropout(nn.Module):
    """Dropout in which no two subnets share a mask, not even on features that they share."""

    def __init__(self, dropout: nn.Dropout, grouping: Grouping) -> None:
        super().__init__()
        self.p, self.num_subnets = dropout.p, grouping.num_subnets

    def forward(self, x: Tensor) -> Tensor:
        """``[n, m, k]`` or ``[n, k]`` -> ``[n, m, k]``; the identity in evaluation mode."""
        if not self.training or self.p == 0:
            return x
        if x.dim() == 2:
            x = x.unsqueeze(1).expand(-1, self.num_subnets, -1)
        return F.dropout(x, self.p)


class GroupedEmbedding(nn.Module):
    """m tables that are looked up with the same indices: ``[n]`` -> ``[n, m, k]``."""

    weight: nn.Parameter

    def __init__(self, table: nn.Embedding, grouping: Grouping) -> None:
        super().__init__()
        self.padding_idx = table.padding_idx
        grouping.tensor_of(table, "weight", self)

    def forward(self, index: Tensor) -> Tensor:
        """Rows of every subnet's table."""
        m, rows, width = self.weight.shape
        by_row = self.weight.transpose(0, 1).reshape(rows, m * width)
        return F.embedding(index, by_row, self.padding_idx).view(*index.shape, m, width)
