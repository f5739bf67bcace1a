"""Fully connected networks, as independent subnet training was introduced with.

Shape legend: ``N`` samples, ``D`` input features, ``C`` outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn.resolver import activation_resolver

from gist.errors import ConfigError, DataError
from gist.nn.bag import BagLinear
from gist.nn.dropout import Dropout
from gist.partition.builder import SpecBuilder
from gist.partition.grouped.layers import GroupedLinear, grouped_linear
from gist.partition.spec import Axis


class MLP(nn.Module):
    """Linear layers; between them normalisation, activation and dropout (IST, Yuan et al., 2022).

    Hidden layer ``i`` is unit group ``hidden.i``; input and output stay whole.

    Args:
        in_channels: D. An input of more dims is flattened.
        hidden_channels: Width of every hidden layer, or one for each.
        out_channels: C.
        num_layers: Number of linear layers, 2 where it is not given; it follows from
            ``hidden_channels`` where that is a sequence.
        dropout: Probability after every hidden layer.
        norm: ``"batch"``, ``"layer"`` (without affine parameters, as in the graph networks of
            :mod:`gist.nn`) or None.
        act: A module, or the name of one, such as ``"relu"`` or ``"gelu"``.
        input: ``"dense"``, or ``"bag"`` for few of very many features: the first layer is then a
            :class:`~gist.nn.bag.BagLinear`, which takes sparse matrices as well.

    Raises:
        ConfigError: depth and widths that do not fit, or an unknown norm, activation or input.

    Attributes:
        accepts_outputs: True: it can compute some of very many outputs alone.

    Shapes:
        [N, D] or [N, ...] with D features in all, or with ``input="bag"`` a ``torch.sparse_csr``
        matrix [N, D] -> [N, C].
    """

    accepts_outputs = True

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int | Sequence[int],
        out_channels: int,
        num_layers: int | None = None,
        *,
        dropout: float = 0.0,
        norm: Literal["batch", "layer"] | None = "batch",
        act: str | nn.Module = "relu",
        input: Literal["dense", "bag"] = "dense",
    ) -> None:
        super().__init__()
        hidden = _widths(hidden_channels, num_layers)
        widths = [in_channels, *hidden, out_channels]
        if input not in _FIRST:
            raise ConfigError("unknown input", got=repr(input), expected=" or ".join(_FIRST))
        if norm not in _NORMS:
            raise ConfigError("unknown norm", got=repr(norm), expected="'batch', 'layer' or None")
        first, *others = pairwise(widths)
        self.input = input
        self.linears = nn.ModuleList([_FIRST[input](*first)])
        self.linears.extend(nn.Linear(*sizes) for sizes in others)
        self.norms = nn.ModuleList(_NORMS[norm](width) for width in hidden)
        self.act = _activation(act)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, outputs: Tensor | None = None) -> Tensor:
        """Scores of every sample.

        Args:
            x: The samples.
            outputs: ``[S]`` output columns to compute, and no others; None for all.

        Raises:
            DataError: a sparse matrix, where the first layer takes dense ones.
        """
        if x.layout is not torch.strided and self.input != "bag":
            raise DataError(
                "this MLP takes dense samples",
                got=x.layout,
                remedy="build it with input='bag' for sparse matrices",
            )
        h = x.flatten(1) if x.dim() > 2 else x
        *hidden, last = self.linears
        for linear, norm in zip(hidden, self.norms, strict=True):
            h = self.dropout(self.act(norm(linear(h))))
        if outputs is not None and isinstance(last, nn.Linear | GroupedLinear):
            assert last.bias is not None, "every layer of an MLP has one"
            weight, bias = last.weight.index_select(-2, outputs), last.bias[..., outputs]
            apply = grouped_linear if isinstance(last, GroupedLinear) else F.linear
            return apply(h, weight, bias)
        out: Tensor = last(h)
        return out if outputs is None else out[..., outputs]

    def declare_wiring(self, builder: SpecBuilder) -> None:
        """Layer ``i`` takes in the units that layer ``i - 1`` puts out."""
        axis: Axis | None = None
        for i in range(len(self.norms)):
            axis = builder.layer(f"linears.{i}", axis, produces=f"hidden.{i}")
            for path in (f"norms.{i}", "act", "dropout"):
                axis = builder.layer(path, axis)
        builder.layer(f"linears.{len(self.norms)}", axis)


_FIRST: dict[str, Callable[[int, int], nn.Module]] = {"dense": nn.Linear, "bag": BagLinear}
_NORMS: dict[str | None, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm1d,
    "layer": lambda width: nn.LayerNorm(width, elementwise_affine=False),
    None: lambda width: nn.Identity(),
}


def _widths(hidden: int | Sequence[int], num_layers: int | None) -> list[int]:
    if isinstance(hidden, int):
        widths = [hidden] * ((2 if num_layers is None else num_layers) - 1)
    else:
        widths = list(hidden)
    fits = num_layers is None or len(widths) == num_layers - 1
    if not fits or min(widths, default=1) < 1:
        raise ConfigError(
            "hidden_channels and num_layers do not fit",
            got=f"hidden_channels={hidden}, num_layers={num_layers}",
            expected="num_layers >= 1, and one width of at least 1, or num_layers - 1 of them",
        )
    return widths


def _activation(act: str | nn.Module) -> nn.Module:
    if isinstance(act, nn.Module):
        return act
    try:
        module: nn.Module = activation_resolver(act)
    except ValueError as error:
        raise ConfigError(
            "unknown activation", got=repr(act), expected="a module, or a name such as 'relu'"
        ) from error
    return module
