"""From names to a run: dataset, model and settings by name, defaults from the dataset's card."""

from __future__ import annotations

import inspect
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

import gist
from gist.agreement import require_subnets
from gist.baselines import (
    DataParallelTrainer,
    EnsembleTrainer,
    data_parallel_settings,
    ensemble_settings,
    full_model_settings,
    local_sgd_settings,
)
from gist.baselines.data_parallel import require_even_shares
from gist.config import GraphConfig, TrainConfig, split_settings
from gist.costs.costs import Costs
from gist.costs.estimate import estimate_costs
from gist.errors import ConfigError
from gist.execution.comm import is_launched
from gist.execution.initialise import initialise, place_model
from gist.graph.data import GraphData
from gist.graph.datasets import find_card, load_dataset
from gist.graph.outline import GraphShape
from gist.history import TrainResult
from gist.nn import GAT, GCN, GraphSAGE
from gist.partition.spec import model_tensors
from gist.partition.streams import seeded
from gist.trainer import GISTTrainer

MODELS = ("gcn", "sage", "sage-concat", "gat", "gatv2")
BASELINES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "local-sgd": local_sgd_settings,
    "data-parallel": data_parallel_settings,
    "ensemble": ensemble_settings,
}
"""What subnets are compared with, besides the full model, and how it changes settings."""

METHODS = ("gist", "full", *BASELINES)
_WHOLE = ("full", "local-sgd", "data-parallel")
"""Methods that train the whole model: with the settings of a card for the whole model."""

_MEASURED_WITH = {"num_subnets", "hidden", "epochs", "rounds", "fast_dev_run"}
"""Settings that a card's schedule of subnets was measured with: it goes with no others."""

LARGE_MODEL_BYTES = 2**28
"""A larger model is drawn by :func:`~gist.execution.initialise.initialise`, wherever it lives, so
that no worker has to hold all of it, and any number of them starts from the same values."""

HEADS = 8
"""Attention heads where no number is given."""

GRAPH_SIZES = ("num_nodes", "num_edges", "num_features", "num_classes")
MODEL_SETTINGS = ("model", "hidden", "layers", "norm", "dropout", "heads")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One run by names.

    Attributes:
        dataset: As :func:`gist.load_dataset` takes it: a name, or the path of a saved graph.
        method: ``"gist"``; ``"full"`` for ordinary training of the whole model; or one of
            :data:`BASELINES`, of which ``num_subnets`` says how many replicas, batches per step or
            members there are.
        data_options: Options of the dataset.
        settings: Model settings (model, hidden, layers, norm, dropout, heads) and the attributes of
            :class:`~gist.config.GraphConfig` and :class:`~gist.config.TrainConfig`; what is not
            given comes from the dataset's card; for a saved graph, which has none, from the
            defaults of :func:`build_model` and these configs.
        seed: Of initialisation and training.
    """

    dataset: str
    method: str = "gist"
    data_options: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        card = find_card(self.dataset, self.data_options)
        name = self.dataset if card is None else card.name
        if card is None and os.sep not in name:
            name = os.path.join(".", name)  # a path for good, whatever becomes of the file
        object.__setattr__(self, "dataset", name)

    def resolved(self) -> dict[str, Any]:
        """All settings: the card's for this number of subnets, then the given ones.

        Raises:
            ConfigError: the method is unknown.
        """
        if self.method not in METHODS:
            raise ConfigError(
                "unknown method", got=repr(self.method), expected=" or ".join(METHODS)
            )
        if self.method == "full" and self.settings.get("num_subnets", 1) != 1:
            raise ConfigError(
                "the full model is not split",
                got=f"num_subnets={self.settings['num_subnets']}",
                remedy="leave num_subnets out, or use method 'gist'; over several workers, "
                "'data-parallel'",
            )
        settings = {**self._defaults(), **self.settings, "seed": self.seed}
        return _settings_of(self.method, settings)

    def _defaults(self) -> dict[str, Any]:
        subnets = self.settings.get("num_subnets", TrainConfig.num_subnets)
        known = find_card(self.dataset)
        if known is None:
            parameters = inspect.signature(build_model).parameters
            model = {name: parameters[name].default for name in MODEL_SETTINGS}
            return {k: v for k, v in model.items() if v is not None} | {"num_subnets": subnets}
        if self.method == "gist" and not any(self.settings.get(name) for name in _MEASURED_WITH):
            subnets = known.settings.defaults.num_subnets or subnets
        most = subnets if isinstance(subnets, int) else max(m for _, m in subnets)
        card = known.settings_for(1 if self.method in _WHOLE else most)
        if "rounds" in self.settings:
            del card["epochs"]
        return {**card, "num_subnets": subnets}

    def check_workers(self, workers: int) -> None:
        """Refuses settings that cannot be used, before any worker is started.

        Raises:
            ConfigError: one of them, or more workers than subnets.
        """
        settings = {k: v for k, v in self.resolved().items() if k not in MODEL_SETTINGS}
        _, training = split_settings(settings, GraphConfig, TrainConfig)
        config = TrainConfig.from_settings(training)
        require_subnets(config, workers)
        if self.method == "data-parallel":
            require_even_shares(config, workers)

    def load_data(self) -> GraphData:
        """The dataset."""
        return load_dataset(self.dataset, **self.data_options)

    def trainer(self, data: GraphData, device: str = "cpu") -> GISTTrainer:
        """A trainer with a freshly initialised model, in the precision of the features.

        Raises:
            ConfigError: a setting that cannot be used.
            PartitionError: a model that cannot be partitioned into that many subnets.
        """
        settings = self.resolved()
        model_settings = {k: settings.pop(k) for k in MODEL_SETTINGS if k in settings}
        on_disk = settings.get("store") == "disk"
        if on_disk and device != "cpu":
            raise ConfigError(
                "a store on disk holds a model of the CPU",
                got=f"device={device!r}",
                remedy="use store='memory', or device='cpu'",
            )
        with torch.device("meta"):
            model = build_model(data, seed=self.seed, **model_settings).to(data.x.dtype)
        large = sum(p.nbytes for p in model.parameters()) > LARGE_MODEL_BYTES
        if large and is_launched() and device != "cpu":
            settings.setdefault("backend", "nccl")
        in_shards = is_launched() and self.method not in ("data-parallel", "ensemble")
        if large and not (on_disk or in_shards):
            tensors = model_tensors(model).items()
            place_model(model, {n: torch.empty_like(t, device=device) for n, t in tensors})
            initialise(model, self.seed)
        elif not (large or on_disk):  # else it is initialised where its tensors will live
            model = build_model(data, seed=self.seed, **model_settings).to(device, data.x.dtype)
        kinds = {"data-parallel": DataParallelTrainer, "ensemble": EnsembleTrainer}
        return kinds.get(self.method, GISTTrainer)(model, data, **settings)

    def summary(self, trainer: GISTTrainer, result: TrainResult) -> dict[str, Any]:
        """The run and its outcome as JSON values, as ``gist train --json`` writes them."""
        settings = self.resolved()
        subnets = trainer.config.num_subnets
        return {
            "dataset": self.dataset,
            "method": self.method,
            "model": settings["model"],
            "executor": trainer.executor.name,
            "hidden": settings["hidden"],
            "layers": settings["layers"],
            "subnets": subnets if isinstance(subnets, int) else [list(p) for p in subnets],
            "workers": trainer.comm.size,
            "local_steps": trainer.config.local_steps,
            "epochs": result.history[-1].epochs,
            "seed": self.seed,
            "metric": trainer.metric,
            **{k: v for k, v in result.to_json().items() if k != "best"},
            "best_round": result.best.round,
            "rounds": len(result.history),
            "evaluations": sum(record.val_metric is not None for record in result.history),
            "settings": {**trainer.config.to_json(), **trainer.graph_config.to_json()},
            "model_settings": {k: settings[k] for k in MODEL_SETTINGS if k in settings},
            "versions": versions(),
        }


def plan_run(
    dataset: str | None,
    *,
    sizes: Mapping[str, int] | None = None,
    method: str = "gist",
    data_options: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    device: str = "cpu",
    workers: int = 1,
) -> Costs:
    """What a run takes, from names and sizes: nothing is loaded, and nothing built.

    Args:
        dataset: As for :class:`Experiment`; None for a graph of the given sizes, with the defaults
            of :class:`~gist.config.TrainConfig` and :func:`build_model`.
        sizes: ``num_nodes``, ``num_edges``, ``num_features`` and ``num_classes``; all of them
            without a dataset, else those that differ from its card's.
        method: As for :class:`Experiment`.
        data_options: As for :class:`Experiment`.
        settings: As for :class:`Experiment`.
        seed: As for :class:`Experiment`.
        device: Where the run is to be.
        workers: Processes that the subnets are spread over.

    Raises:
        ConfigError: a setting that cannot be used, a size that is missing, or a method that cannot
            be planned.
        PartitionError: a model that cannot be partitioned into that many subnets.
    """
    if method in ("data-parallel", "ensemble"):
        raise ConfigError(
            "this method cannot be planned",
            got=repr(method),
            expected="'gist', 'full' or 'local-sgd'",
            remedy="plan 'full' for what data parallel training takes on each worker; a plan of "
            "'gist' says what it exchanges, and about what an ensemble takes",
        )
    given: dict[str, Any] = dict(sizes or {})
    settings = dict(settings or {})
    if dataset is not None:
        options = dict(data_options or {})
        shape = replace(GraphShape.of_dataset(dataset, options), **given)
        run = Experiment(dataset=dataset, method=method, settings=settings, seed=seed)
        settings = run.resolved()
    else:
        if missing := [name for name in GRAPH_SIZES if name not in given]:
            raise ConfigError(
                "a graph without a name needs all of its sizes",
                got=f"no {', '.join(missing)}",
                remedy="give them, or the name of a dataset",
            )
        shape = GraphShape(**given)
        settings = {**settings, "seed": seed}
        settings = _settings_of(method, settings)
    model_settings = {k: settings.pop(k) for k in MODEL_SETTINGS if k in settings}
    settings.setdefault("out", "run")  # nothing is written
    with torch.device("meta"):
        model = build_model(shape, seed=seed, **model_settings)
    _, training = split_settings(settings, GraphConfig, TrainConfig)
    require_subnets(TrainConfig.from_settings(training), workers)
    return estimate_costs(model, shape, workers=workers, device=device, **settings)


def _settings_of(method: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run, changed as a method wants them."""
    changes = {"full": full_model_settings, **BASELINES}
    if method in changes:
        settings = changes[method](settings)
    if method not in _WHOLE:
        _require_channels(settings)
    return settings


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
    if model not in MODELS:
        raise ConfigError("unknown model", got=repr(model), expected=" or ".join(MODELS))
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


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    packages = ("torch", "torch-geometric", "numpy", "scipy", "pymetis")
    own = {"gist": gist.__version__, "python": platform.python_version()}
    return own | {name: version(name) for name in packages}
