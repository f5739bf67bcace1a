"""What a model makes of the weights and features of edges."""

from __future__ import annotations

import inspect

from torch import nn
from torch_geometric.nn.models.basic_gnn import BasicGNN


def uses_edge_weight(model: nn.Module) -> bool:
    """Whether a model takes edge weights into account: a weight is part of the graph's matrix."""
    supports = getattr(model, "supports_edge_weight", None)
    return _takes(model, "edge_weight") if supports is None else bool(supports)


def uses_edge_attr(model: nn.Module) -> bool:
    """Whether a model takes features of the edges, as attention with ``edge_dim`` does."""
    return needs_edge_attr(model) if isinstance(model, BasicGNN) else _takes(model, "edge_attr")


def needs_edge_attr(model: nn.Module) -> bool:
    """Whether a layer has weights for features of the edges."""
    return any(getattr(module, "lin_edge", None) is not None for module in model.modules())


def _takes(model: nn.Module, argument: str) -> bool:
    return argument in inspect.signature(model.forward).parameters
