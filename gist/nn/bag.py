"""A linear layer over bags of features: samples with few of very many, as a sparse matrix.

Shape legend: ``N`` samples, ``D`` input features, ``k`` outputs, ``m`` stacked subnets.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gist.errors import DataError
from gist.partition.builder import Layer
from gist.partition.grouped.grouping import Grouping
from gist.partition.grouped.product import add_bias, grouped_product
from gist.partition.rules.registry import Rule, register_rule
from gist.partition.spec import Axis


class BagLinear(nn.Module):
    """``y = x W + b`` where x is dense or sparse; work goes with the entries of a sparse x.

    Args:
        in_features: D.
        out_features: k.
        bias: Whether there is b.

    Attributes:
        weight: ``[D, k]``: one row per input feature, as in an embedding table.
        bias: ``[k]`` or None.

    Shapes:
        [N, D], dense or ``torch.sparse_csr`` -> [N, k], dense.
    """

    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(in_features, out_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws weight and bias as :class:`torch.nn.Linear` does."""
        bound = 1 / math.sqrt(self.in_features) if self.in_features else 0.0
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the layer.

        Raises:
            DataError: x has another number of features.
        """
        _check(x, self.in_features)
        out = _bag(x, self.weight) if _is_csr(x) else x @ self.weight
        return out if self.bias is None else out + self.bias

    def extra_repr(self) -> str:
        """Settings, for printing."""
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}"


class GroupedBagLinear(nn.Module):
    """m layers: shared ``[N, D]``, dense or sparse, or ``[N, m, D]`` -> ``[N, m, k]``.

    Attributes:
        weight: ``[m, D, k]``.
        bias: ``[m, k]`` or None.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, layer: BagLinear, grouping: Grouping) -> None:
        super().__init__()
        grouping.tensor_of(layer, "weight", self)
        grouping.tensor_of(layer, "bias", self)

    def forward(self, x: Tensor) -> Tensor:
        """Applies every subnet's weight; a sparse x is looked up in all tables, laid end to end."""
        _check(x, self.weight.size(1))
        if x.dim() == 3:
            out = grouped_product(x, self.weight.transpose(1, 2))
        else:
            each = _bags(x, self.weight) if _is_csr(x) else torch.matmul(x, self.weight)
            out = each.transpose(0, 1).contiguous()
        return add_bias(out, self.bias)


def _check(x: Tensor, features: int) -> None:
    if x.size(-1) != features:
        raise DataError(
            "BagLinear got another number of features", got=x.size(-1), expected=features
        )


def _is_csr(x: Tensor) -> bool:
    return x.layout is torch.sparse_csr


def _bag(x: Tensor, table: Tensor) -> Tensor:
    return _look_up(x.col_indices(), table, x.crow_indices(), x.values())


def _bags(x: Tensor, tables: Tensor) -> Tensor:
    # tables [m, D, k] -> [m, N, k]: as x in every block of a block-diagonal matrix.
    (m, rows, _), entries = tables.shape, x.values().numel()
    copies = torch.arange(m, device=x.device)[:, None]
    columns = (x.col_indices() + copies * rows).flatten()
    starts = (x.crow_indices()[:-1] + copies * entries).flatten()
    ends = torch.cat([starts, starts.new_full((1,), m * entries)])
    out = _look_up(columns, tables.flatten(0, 1), ends, x.values().repeat(m))
    return out.view(m, x.size(0), -1)


def _look_up(columns: Tensor, table: Tensor, offsets: Tensor, values: Tensor) -> Tensor:
    return F.embedding_bag(
        columns,
        table,
        offsets,
        mode="sum",
        per_sample_weights=values,
        include_last_offset=True,
    )


@register_rule(BagLinear)
class BagLinearRule(Rule):
    """Columns of W, and b, follow the output units; rows of W the input units."""

    contracts = True

    def connect(self, layer: Layer) -> Axis | None:
        """See :meth:`~gist.partition.rules.registry.Rule.connect`."""
        out = layer.produce(layer.module.out_features)
        layer.follow("weight", (0, layer.expect_input(layer.module.in_features)), (1, out))
        layer.follow("bias", (0, out))
        return out

    def resize(self, module: Any, input: int | None, output: int | None) -> None:
        """See :meth:`~gist.partition.rules.registry.Rule.resize`."""
        module.in_features, module.out_features = module.weight.shape

    def grouped(self, module: Any, grouping: Grouping) -> nn.Module | None:
        """See :meth:`~gist.partition.rules.registry.Rule.grouped`."""
        return GroupedBagLinear(module, grouping)
