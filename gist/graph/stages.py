"""Which parts of a convolution have columns that can be computed apart: a registry, and PyG's.

A column of ``X Wᵀ`` needs one row of ``W`` and all of ``X``. A *stage* is what a convolution
computes up to the next point at which all columns are needed: most are one stage, GIN is one for
each linear layer of its network. As with the rules of the partition engine, a type is registered
exactly: a subclass may compute something else.

Shape legend: ``D`` columns of a stage's output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch.nn.functional as F
import torch_geometric.nn as pyg
from torch import Tensor, nn
from torch_geometric.nn.models import MLP

from gist.graph.adjacency import Adjacency, Form
from gist.graph.attention import Attention
from gist.graph.blockwise import Blockwise, Dense, Product
from gist.graph.blockwise_rules import SUMS, directed, find_blockwise, is_flipped
from gist.graph.rowwise import Step


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where some columns of a stage are computed.

    Attributes:
        columns: Those of ``D``.
        ranks: Which compute the columns of the stage between them.
        add_up: The sum of a tensor over these ranks, the same bits on all of them.
    """

    columns: slice
    ranks: int
    add_up: Callable[[Tensor], Tensor]


Make = Callable[[Any, Place, Adjacency, Tensor], Blockwise]
"""Of a module with rows of some columns alone, a graph, and a tensor like the input."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ConvStage:
    """A part of a convolution.

    Attributes:
        module: What computes it.
        cut: Those of its tensors whose first dim runs along the columns.
        width: ``D``.
        make: Makes the form of some columns that works on blocks.
        unit: Columns that stay together.
        after: What treats each node on its own, up to the next stage.
    """

    module: Any
    cut: tuple[Tensor, ...]
    width: int
    make: Make
    unit: int = 1
    after: tuple[Step, ...] = ()


_STAGES: dict[type[nn.Module], Callable[[Any], list[ConvStage] | None]] = {}

_T = TypeVar("_T", bound=Callable[[Any], list[ConvStage] | None])


def register_stages(*conv_types: type[nn.Module]) -> Callable[[_T], _T]:
    """Registers the stages of convolutions of exactly these types.

    The decorated function takes the convolution and returns its stages, or None for one whose
    columns cannot be computed apart.
    """

    def register(function: _T) -> _T:
        _STAGES.update(dict.fromkeys(conv_types, function))
        return function

    return register


def find_stages(conv: nn.Module) -> list[ConvStage] | None:
    """The stages of a convolution; None where its columns cannot be computed apart."""
    function = _STAGES.get(type(conv))
    return None if function is None else function(conv)


def as_registered(narrow: Any, place: Place, graph: Adjacency, like: Tensor) -> Blockwise:
    """The form of a convolution that has fewer rows, as for a whole one."""
    maker = find_blockwise(narrow)
    assert maker is not None, "the whole convolution has this form"
    return maker(graph, like)


@register_stages(pyg.GCNConv)
def gcn_stages(conv: Any) -> list[ConvStage]:
    """One: ``Â X Wᵀ + b``."""
    width = conv.lin.weight.size(0)
    return [ConvStage(module=conv, cut=tuple(conv.parameters()), width=width, make=as_registered)]


@register_stages(pyg.SAGEConv)
def sage_stages(conv: Any) -> list[ConvStage] | None:
    """One; with ``project`` neighbours are seen through a layer of their own, and there is none."""
    if conv.project:
        return None

    def make(narrow: Any, place: Place, graph: Adjacency, like: Tensor) -> Blockwise:
        narrow.normalize = False
        return as_registered(narrow, place, graph, like)

    after = (partial(F.normalize, p=2.0, dim=-1),) if conv.normalize else ()
    cut, width = tuple(conv.parameters()), conv.lin_l.weight.size(0)
    return [ConvStage(module=conv, cut=cut, width=width, make=make, after=after)]


@register_stages(pyg.GATConv, pyg.GATv2Conv)
def attention_stages(conv: Any) -> list[ConvStage] | None:
    """One, if heads are concatenated. GATv2 needs a head whole, GAT a number for each input.

    With features of edges there is none.
    """
    single = not isinstance(conv.in_channels, tuple | list) and conv.lin_edge is None
    if not (single and conv.concat and conv.aggr in ("add", "sum")) or is_flipped(conv):
        return None
    folds = isinstance(conv, pyg.GATConv)

    def make(narrow: Any, place: Place, graph: Adjacency, like: Tensor) -> Blockwise:
        pattern: Form = "gcn" if narrow.add_self_loops else "sum"
        matrix = graph.matrix(pattern, like.dtype).rows
        add_up = place.add_up if folds else None
        return Attention(narrow, matrix, like.size(1), place.columns, add_up, place.ranks)

    linears = [conv.lin] if folds else [conv.lin_l, conv.lin_r]
    cut = [t for linear in [*linears, conv.res] if linear is not None for t in linear.parameters()]
    if conv.bias is not None:
        cut.append(conv.bias)
    unit = 1 if folds else conv.out_channels
    width = conv.heads * conv.out_channels
    return [ConvStage(module=conv, cut=tuple(cut), width=width, make=make, unit=unit)]


@register_stages(pyg.GINConv)
def gin_stages(conv: Any) -> list[ConvStage] | None:
    """One for each linear layer of its network; sums go through the first, as it is linear."""
    if conv.aggr not in SUMS or (chain := _chain(conv.nn)) is None:
        return None

    def first(linear: Any, place: Place, graph: Adjacency, like: Tensor) -> Blockwise:
        matrix = directed(graph, conv).matrix(SUMS[conv.aggr], like.dtype).rows
        loops = 1 + conv.eps.detach()
        return Product(matrix=matrix, weight=linear.weight, bias=linear.bias, loops=loops)

    def later(linear: Any, place: Place, graph: Adjacency, like: Tensor) -> Blockwise:
        return Dense(weight=linear.weight, bias=linear.bias)

    return [
        ConvStage(
            module=linear,
            cut=tuple(linear.parameters()),
            width=linear.weight.size(0),
            make=later if index else first,
            after=tuple(steps),
        )
        for index, (linear, steps) in enumerate(chain)
    ]


def _chain(network: Any) -> list[tuple[Any, list[Step]]] | None:
    """Linear layers, and what follows each; None for a network that is anything else."""
    if type(network) is MLP:
        modules: list[Any] = []
        act = [] if network.act is None else [network.act]
        for index, linear in enumerate(network.lins):
            modules.append(linear)
            if index < len(network.norms):
                norm = [network.norms[index]]
                modules += [*act, *norm] if network.act_first else [*norm, *act]
    else:
        modules = list(network) if type(network) is nn.Sequential else [network]
    chain: list[tuple[Any, list[Step]]] = []
    for module in modules:
        if type(module) in (nn.Linear, pyg.Linear):
            chain.append((module, []))
        elif not chain or (
            isinstance(module, nn.Module) and any(p.dim() > 1 for p in module.parameters())
        ):
            return None
        else:
            chain[-1][1].append(module)
    return chain
