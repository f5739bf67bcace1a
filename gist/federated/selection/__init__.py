"""Which units a client is sent: strategies of the papers, one class each, and by name."""

from collections.abc import Mapping

from gist.federated.selection.base import (
    Report,
    Request,
    Selection,
    SelectionState,
    ServerView,
)
from gist.federated.selection.drops import FedSelect, HeteroDrop, UniformDrop
from gist.federated.selection.learned import AdaptiveDropout, Helios
from gist.federated.selection.partial import PartialTensors
from gist.federated.selection.pruning import FederatedPruning, PruneFL
from gist.federated.selection.windows import NestedPrefix, Prefix, Rolling

SELECTIONS: Mapping[str, type[Selection]] = {
    "hetero-drop": HeteroDrop,
    "uniform-drop": UniformDrop,
    "prefix": Prefix,
    "nested-prefix": NestedPrefix,
    "rolling": Rolling,
    "adaptive-dropout": AdaptiveDropout,
    "helios": Helios,
    "partial-tensors": PartialTensors,
    "fed-select": FedSelect,
    "federated-pruning": FederatedPruning,
    "prune-fl": PruneFL,
}
"""Selections by name."""

__all__ = [
    "SELECTIONS",
    "AdaptiveDropout",
    "FedSelect",
    "FederatedPruning",
    "Helios",
    "HeteroDrop",
    "NestedPrefix",
    "PartialTensors",
    "Prefix",
    "PruneFL",
    "Report",
    "Request",
    "Rolling",
    "Selection",
    "SelectionState",
    "ServerView",
    "UniformDrop",
]
