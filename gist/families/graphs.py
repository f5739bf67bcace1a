"""Experiments on graphs: GIST, its baselines, and the reference graph networks."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from gist.baselines.data_parallel import DataParallelTrainer
from gist.baselines.ensemble import EnsembleTrainer
from gist.catalog.records import GraphCard
from gist.config import GraphConfig, TrainConfig
from gist.costs.costs import Costs
from gist.costs.estimate import estimate_costs
from gist.errors import ConfigError
from gist.families.family import WHOLE, Family, Settings
from gist.families.federated import FEDERATED, FEDERATED_SETTINGS
from gist.federated.trainer import FederatedTrainer
from gist.graph.data import GraphData
from gist.graph.datasets import find_card
from gist.graph.outline import GraphShape
from gist.nn import GAT, GCN, GraphSAGE
from gist.partition.streams import seeded
from gist.trainer import GISTTrainer, SubnetTrainer

HEADS = 8
"""Attention heads where no number is given."""

GRAPH_SIZES = ("num_nodes", "num_edges", "num_features", "num_classes")

_MEASURED_WITH = {"num_subnets", "hidden", "epochs", "rounds", "fast_dev_run"}
"""Settings that a card's schedule of subnets was measured with: it goes with no others."""


class Graphs(Family):
    """See :class:`~gist.families.family.Family`."""

    methods = ("gist", *FEDERATED)
    baselines = ("local-sgd", "data-parallel", "ensemble")
    models = ("gcn", "sage", "sage-concat", "gat", "gatv2")
    model_settings = ("model", "hidden", "layers", "norm", "dropout", "heads")
    data_config = GraphConfig
    plannable = ("gist", "full", "local-sgd")
    own_settings = FEDERATED_SETTINGS
    what = "graphs"

    def method_for(self, dataset: str, settings: Mapping[str, Any]) -> str:
        """See :meth:`Family.method_for`."""
        return "gist"

    def defaults(
        self, dataset: str, method: str, settings: Mapping[str, Any], beside: str | None = None
    ) -> Settings:
        """See :meth:`Family.defaults`: from the card; a saved graph has none."""
        usual = 1 if method in FEDERATED else TrainConfig.num_subnets
        subnets = settings.get("num_subnets", usual)
        card = find_card(dataset)
        if card is None:
            parameters = inspect.signature(build_model).parameters
            model = {name: parameters[name].default for name in self.model_settings}
            return {k: v for k, v in model.items() if v is not None} | {"num_subnets": subnets}
        assert isinstance(card, GraphCard)
        if method == "gist" and not any(settings.get(name) for name in _MEASURED_WITH):
            subnets = card.settings.defaults.num_subnets or subnets
        most = subnets if isinstance(subnets, int) else max(m for _, m in subnets)
        chosen = card.settings_for(1 if method in WHOLE else most)
        if method in FEDERATED:
            chosen = {name: chosen[name] for name in chosen if name in self.model_settings}
        if "rounds" in settings:
            chosen.pop("epochs", None)
        return {**chosen, "num_subnets": subnets}

    def adapt(self, method: str, settings: Settings) -> Settings:
        """See :meth:`Family.adapt`."""
        settings = super().adapt(method, settings)
        if method not in WHOLE:
            _require_channels(settings)
        return settings

    def build_model(self, data: Any, *, seed: int = 0, **settings: Any) -> nn.Module:
        """See :func:`build_model`."""
        return build_model(data, seed=seed, **settings)

    def make_trainer(
        self, method: str, model: nn.Module, data: Any, settings: Settings, beside: str | None
    ) -> SubnetTrainer:
        """See :meth:`Family.make_trainer`."""
        if method in FEDERATED:
            return FederatedTrainer(model, data, **settings)
        kinds = {"data-parallel": DataParallelTrainer, "ensemble": EnsembleTrainer}
        kind: type[GISTTrainer] = kinds.get(method, GISTTrainer)
        return kind(model, data, **settings)

    def plan(
        self, shape: Any, method: str, settings: Settings, *, workers: int, device: str
    ) -> Costs:
        """See :meth:`Family.plan`."""
        model_settings, settings = self.split_model_settings(settings)
        with torch.device("meta"):
            model = build_model(shape, seed=settings["seed"], **model_settings)
        return estimate_costs(model, shape, workers=workers, device=device, **settings)

    def shape_of(
        self, dataset: str | None, options: Mapping[str, Any], sizes: Mapping[str, Any]
    ) -> GraphShape:
        """See :meth:`Family.shape_of`."""
        if dataset is not None:
            return replace(GraphShape.of_dataset(dataset, options), **sizes)
        if missing := [name for name in GRAPH_SIZES if name not in sizes]:
            raise ConfigError(
                "a graph without a name needs all of its sizes",
                got=f"no {', '.join(missing)}",
                remedy="give them, or the name of a dataset",
            )
        return GraphShape(**sizes)


def _require_channels(settings: Mapping[str, Any]) -> None:
    """Refuses more subnets than a head of a GAT has channels: these are what is dealt."""
    hidden, heads = settings.get("hidden"), settings.get("heads") or HEADS
    subnets = settings.get("num_subnets", 1)
    most = subnets if isinstance(subnets, int) else max(m for _, m in subnets)
    if settings.get("model") in ("gat", "gatv2") and hidden and hidden // heads < most:
        raise ConfigError(
            "more subnets than a head has channels: a gat's channels are dealt, not its heads",
            got=f"hidden={hidden}, heads={heads}, num_subnets={most}",
            expected="num_subnets <= hidden / heads",
            remedy=f"hidden={heads * most} or more, fewer heads, or fewer subnets",
        )


def build_model(
    data: GraphData | GraphShape,
    *,
    model: str = "gcn",
    hidden: int = 256,
    layers: int = 3,
    norm: str | None = "layer",
    dropout: float = 0.5,
    heads: int | None = None,
    seed: int = 0,
) -> nn.Module:
    """A reference model for a graph, initialised from ``seed`` alone.

    Attention takes features of the edges where the graph has them.

    Raises:
        ConfigError: the model is unknown, or a size that cannot be.
    """
    if model not in Graphs.models:
        raise ConfigError("unknown model", got=repr(model), expected=" or ".join(Graphs.models))
    attends = model in ("gat", "gatv2")
    if heads is not None and not attends:
        raise ConfigError("only a gat has heads", got=f"model={model!r}, heads={heads}")
    heads = HEADS if heads is None else heads
    for name, value in (("hidden", hidden), ("layers", layers), ("heads", heads)):
        if value < 1:
            raise ConfigError(f"{name} must be at least 1", got=value)
    if not 0 <= dropout < 1:
        raise ConfigError("dropout must be in [0, 1)", got=dropout)
    if attends and hidden % heads:
        raise ConfigError(
            "hidden must be a multiple of heads", got=f"hidden={hidden}, heads={heads}"
        )
    shape = (data.num_features, hidden, data.num_classes, layers)
    common: dict[str, Any] = {"dropout": dropout, "norm": norm}
    with seeded("model", seed):
        if model == "gcn":
            return GCN(*shape, **common)
        if attends:
            edge_dim = data.num_edge_features or None
            return GAT(*shape, heads=heads, v2=model == "gatv2", edge_dim=edge_dim, **common)
        return GraphSAGE(*shape, concat=model == "sage-concat", **common)
