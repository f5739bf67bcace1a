"""From names to a run: dataset, model and settings by name, defaults from the dataset's card."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch

import gist
from gist.agreement import require_subnets
from gist.baselines.data_parallel import require_even_shares
from gist.catalog.records import SampleCard
from gist.costs.costs import Costs
from gist.datasets import find_card, load_dataset
from gist.errors import ConfigError
from gist.execution.comm import is_launched
from gist.execution.initialise import initialise, place_model
from gist.families.family import Family
from gist.families.federated import FEDERATED
from gist.families.graphs import Graphs
from gist.families.samples import Samples
from gist.federated.trainer import one_process_only
from gist.graph.data import GraphData
from gist.history import TrainResult
from gist.partition.spec import model_tensors
from gist.samples.data import SampleData
from gist.trainer import SubnetTrainer

FAMILIES: tuple[Family, ...] = (Graphs(), Samples())
"""All kinds of data; graphs, of which there are files too, come first."""

MODELS = tuple(name for family in FAMILIES for name in family.models)
BASELINES = tuple(dict.fromkeys(name for family in FAMILIES for name in family.baselines))
METHODS = tuple(
    dict.fromkeys([*(name for family in FAMILIES for name in family.methods), "full", *BASELINES])
)

LARGE_MODEL_BYTES = 2**28
"""A larger model is drawn by :func:`~gist.execution.initialise.initialise`, wherever it lives, so
that no worker has to hold all of it, and any number of them starts from the same values."""


def family_of(dataset: str | None, options: Mapping[str, Any] | None = None) -> Family:
    """The kind of data that a dataset is of; without a name, graphs.

    Raises:
        ConfigError: an unknown dataset.
    """
    graphs, samples = FAMILIES
    if dataset is None:
        return graphs
    return samples if isinstance(find_card(dataset, options), SampleCard) else graphs


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One run by names.

    Attributes:
        dataset: As :func:`gist.load_dataset` takes it: a name, or the path of a saved graph.
        method: ``"gist"`` for graphs; ``"ist"``, ``"resist"`` or ``"loft"`` for samples;
            ``"asyncdrop"`` or ``"federated"``, with a ``strategy``, for both; ``"full"`` for
            ordinary training of the whole model; or a baseline, of which ``num_subnets`` says
            how many replicas, batches per step or members there are. None takes the one that the
            data, and the model, are made for.
        data_options: Options of the dataset.
        settings: Settings of the model and the attributes of
            :class:`~gist.config.TrainConfig` and of :class:`~gist.config.GraphConfig` or
            :class:`~gist.config.SampleConfig`; what is not given comes from the dataset's card; for
            a saved graph, which has none, from the defaults of the model and these configs.
        seed: Of initialisation and training.
        beside: Of a baseline: the subnet training that it is compared with, whose model and
            settings it takes; settings that this method alone has are left out.
    """

    dataset: str
    method: str | None = None
    data_options: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    beside: str | None = None

    def __post_init__(self) -> None:
        card = find_card(self.dataset, self.data_options)
        name = self.dataset if card is None else card.name
        if card is None and os.sep not in name:
            name = os.path.join(".", name)  # a path for good, whatever becomes of the file
        object.__setattr__(self, "dataset", name)
        if self.method is None:
            object.__setattr__(self, "method", self.family.method_for(name, self.settings))
        if self.beside is not None:
            own = self.family.own_settings
            kept = {k: v for k, v in self.settings.items() if k not in own}
            object.__setattr__(self, "settings", kept)

    @property
    def family(self) -> Family:
        """The kind of data."""
        return family_of(self.dataset, self.data_options)

    @property
    def _method(self) -> str:
        assert self.method is not None, "set when it was made"
        return self.method

    def resolved(self) -> dict[str, Any]:
        """All settings: the card's for this number of subnets, then the given ones.

        Raises:
            ConfigError: the method is unknown.
        """
        family = self.family
        family.check_method(self._method, self.settings)
        others = [other for other in FAMILIES if other is not family]
        family.check_settings(self._method, self.settings, others)
        defaults = family.defaults(self.dataset, self._method, self.settings, self.beside)
        settings = {**defaults, **self.settings, "seed": self.seed}
        return family.adapt(self._method, settings)

    def check_workers(self, workers: int) -> None:
        """Refuses settings that cannot be used, before any worker is started.

        Raises:
            ConfigError: one of them, or more workers than subnets.
        """
        if self.method in FEDERATED:
            raise one_process_only(workers)
        config = self.family.training_config(self._method, self.resolved())
        require_subnets(config, workers)
        if self.method == "data-parallel":
            require_even_shares(config, workers)

    def load_data(self) -> GraphData | SampleData:
        """The dataset."""
        return load_dataset(self.dataset, **self.data_options)

    def trainer(self, data: GraphData | SampleData, device: str = "cpu") -> SubnetTrainer:
        """A trainer with a freshly initialised model, in the precision of the features.

        Raises:
            ConfigError: a setting that cannot be used.
            PartitionError: a model that cannot be partitioned into that many subnets.
        """
        family = self.family
        model_settings, settings = family.split_model_settings(self.resolved())
        on_disk = settings.get("store") == "disk"
        if on_disk and device != "cpu":
            raise ConfigError(
                "a store on disk holds a model of the CPU",
                got=f"device={device!r}",
                remedy="use store='memory', or device='cpu'",
            )
        dtype = family.dtype(data)
        with torch.device("meta"):
            model = family.build_model(data, seed=self.seed, **model_settings).to(dtype)
        large = sum(p.nbytes for p in model.parameters()) > LARGE_MODEL_BYTES
        if large and is_launched() and device != "cpu":
            settings.setdefault("backend", "nccl")
        in_shards = is_launched() and self.method not in ("data-parallel", "ensemble")
        if large and not (on_disk or in_shards):
            tensors = model_tensors(model).items()
            place_model(model, {n: torch.empty_like(t, device=device) for n, t in tensors})
            initialise(model, self.seed)
        elif not (large or on_disk):  # else it is initialised where its tensors will live
            model = family.build_model(data, seed=self.seed, **model_settings).to(device, dtype)
        return family.make_trainer(self._method, model, data, settings, self.beside)

    def summary(self, trainer: SubnetTrainer, result: TrainResult) -> dict[str, Any]:
        """The run and its outcome as JSON values, as ``gist train --json`` writes them."""
        model_settings, _ = self.family.split_model_settings(self.resolved())
        subnets = trainer.config.num_subnets
        return {
            "dataset": self.family.name_of(self.dataset, getattr(trainer, "data", None)),
            "method": self.method,
            "model": model_settings["model"],
            "executor": trainer.executor.name,
            "hidden": model_settings.get("hidden"),
            "layers": model_settings.get("layers"),
            "subnets": subnets if isinstance(subnets, int) else [list(p) for p in subnets],
            "workers": trainer.comm.size,
            "local_steps": trainer.config.local_steps,
            "epochs": result.history[-1].epochs,
            "seed": self.seed,
            "metric": trainer.metric,
            **{k: v for k, v in result.to_json().items() if k != "best"},
            **trainer.more_results(),
            "best_round": result.best.round,
            "rounds": len(result.history),
            "evaluations": sum(record.val_metric is not None for record in result.history),
            "settings": trainer.settings(),
            "model_settings": model_settings,
            "versions": versions(),
        }


def plan_run(
    dataset: str | None,
    *,
    sizes: Mapping[str, int] | None = None,
    method: str | None = None,
    data_options: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    device: str = "cpu",
    workers: int = 1,
) -> Costs:
    """What a run takes, from names and sizes: nothing is loaded, and nothing built.

    Args:
        dataset: As for :class:`Experiment`; None for a graph of the given sizes, with the defaults
            of :class:`~gist.config.TrainConfig` and of the model.
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
    options, given = dict(data_options or {}), dict(settings or {})
    family = family_of(dataset, options)
    if method in FEDERATED:
        raise ConfigError(
            "federated training is not planned: its clock runs before anything is trained",
            got=f"method={method!r}",
            remedy="make the trainer, and look at trainer.timeline",
        )
    if method in {*family.baselines} - {*family.plannable}:
        ours = family.methods[0]
        raise ConfigError(
            "this method cannot be planned",
            got=repr(method),
            expected=" or ".join(family.plannable),
            remedy="plan 'full' for what data parallel training takes on each worker; a plan of "
            f"{ours!r} says what it exchanges, and about what an ensemble takes",
        )
    shape = family.shape_of(dataset, options, sizes or {})
    if dataset is not None:
        run = Experiment(
            dataset=dataset, method=method, data_options=options, settings=given, seed=seed
        )
        method, resolved = run._method, run.resolved()
    else:
        method = method or family.methods[0]
        family.check_method(method, given)
        resolved = family.adapt(method, {**given, "seed": seed})
    resolved.setdefault("out", "run")  # nothing is written
    require_subnets(family.training_config(method, resolved), workers)
    return family.plan(shape, method, resolved, workers=workers, device=device)


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    packages = ("torch", "torch-geometric", "numpy", "scipy", "pymetis")
    own = {"gist": gist.__version__, "python": platform.python_version()}
    return own | {name: version(name) for name in packages}
