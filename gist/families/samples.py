"""Experiments on independent samples: IST, ResIST, LoFT, and reference networks for images."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

import gist.nn as networks
from gist.baselines.data_parallel import SampleDataParallelTrainer
from gist.catalog.records import SampleCard
from gist.config import SampleConfig, TrainConfig
from gist.costs.costs import Costs
from gist.costs.estimate import estimate_costs
from gist.datasets import find_card
from gist.errors import ConfigError
from gist.families.family import WHOLE, Family, Settings
from gist.families.federated import FEDERATED, FEDERATED_SETTINGS
from gist.federated.trainer import FederatedTrainer
from gist.methods import ISTTrainer, LoFTTrainer, ResISTTrainer, SampleTrainer
from gist.partition.streams import seeded
from gist.samples.data import SampleData
from gist.samples.datasets import shape_of_dataset
from gist.samples.outline import SampleShape
from gist.trainer import SubnetTrainer

_NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "preact-resnet8": networks.preact_resnet8,
    "preact-resnet18": networks.preact_resnet18,
    "preact-resnet20": networks.preact_resnet20,
    "preact-resnet32": networks.preact_resnet32,
    "preact-resnet34": networks.preact_resnet34,
    "preact-resnet101": networks.preact_resnet101,
    "preact-resnet152": networks.preact_resnet152,
    "preact-resnet200": networks.preact_resnet200,
    "vgg11": networks.vgg11,
    "vgg13": networks.vgg13,
    "vgg16": networks.vgg16,
}

_TRAINERS: dict[str, type[SampleTrainer]] = {
    "ist": ISTTrainer,
    "resist": ResISTTrainer,
    "loft": LoFTTrainer,
}

_MODELS = {
    "ist": "mlp",
    "resist": "preact-resnet32",
    "loft": "preact-resnet20",
    **dict.fromkeys(FEDERATED, "mlp"),
}
"""What a method trains where neither settings nor card say it."""


_FITTING = {
    "ist": ("mlp",),
    "resist": tuple(
        name
        for name in _NETWORKS
        if name.startswith("preact") and name not in ("preact-resnet8", "preact-resnet18")
    ),
    "loft": tuple(_NETWORKS),
}
"""Models that a method is made for: ResIST wants a stage with two blocks that can be dealt."""


class Samples(Family):
    """See :class:`~gist.families.family.Family`."""

    methods = (*_TRAINERS, *FEDERATED)
    baselines = ("local-sgd", "data-parallel")
    models = ("mlp", *_NETWORKS)
    model_settings = ("model", "hidden", "layers", "norm", "dropout")
    data_config = SampleConfig
    plannable = (*_TRAINERS, "full", "local-sgd")
    own_settings: Mapping[str, tuple[str, ...]] = {  # of no one to be changed
        **{name: (method,) for method, kind in _TRAINERS.items() for name in kind.own_settings},
        **FEDERATED_SETTINGS,
    }
    what = "independent samples"

    def method_for(self, dataset: str, settings: Mapping[str, Any]) -> str:
        """See :meth:`Family.method_for`: what the model is made for; else the card's first."""
        return self._base(None, dataset, settings)

    def _base(self, method: str | None, dataset: str, settings: Mapping[str, Any]) -> str:
        """The subnet training whose settings a method takes."""
        if method in (*_TRAINERS, *FEDERATED):
            return method
        model = settings.get("model")
        if model is None:
            known = [name for name in self._card(dataset).settings if name in _TRAINERS]
            return next(iter(known), "ist")
        if model == "mlp":
            return "ist"
        return "resist" if model in _FITTING["resist"] else "loft"

    @staticmethod
    def _card(dataset: str) -> SampleCard:
        card = find_card(dataset)
        assert isinstance(card, SampleCard), "graphs are of another family"
        return card

    def defaults(
        self, dataset: str, method: str, settings: Mapping[str, Any], beside: str | None = None
    ) -> Settings:
        """See :meth:`Family.defaults`: from the card where the model is the card's."""
        usual = 1 if method in FEDERATED else TrainConfig.num_subnets
        subnets = settings.get("num_subnets", usual)
        most = subnets if isinstance(subnets, int) else max(m for _, m in subnets)
        base = self._base(beside or method, dataset, settings)
        chosen = self._card(dataset).settings_for(base, 1 if method in WHOLE else most)
        chosen.setdefault("model", _MODELS[base])
        if settings.get("model", chosen["model"]) != chosen["model"]:
            chosen = {name: chosen[name] for name in chosen.keys() - {"hidden", "layers"}}
        if "rounds" in settings:
            chosen.pop("epochs", None)
        return {**chosen, "num_subnets": subnets}

    def adapt(self, method: str, settings: Settings) -> Settings:
        """See :meth:`Family.adapt`."""
        fitting = _FITTING.get(method)
        if fitting is not None and settings["model"] not in fitting:
            raise ConfigError(
                f"method {method!r} is not made for this model",
                got=f"model={settings['model']!r}",
                expected=" or ".join(fitting),
            )
        return super().adapt(method, settings)

    def build_model(self, data: Any, *, seed: int = 0, **settings: Any) -> nn.Module:
        """See :func:`build_model`."""
        return build_model(data, seed=seed, **settings)

    def make_trainer(
        self, method: str, model: nn.Module, data: Any, settings: Settings, beside: str | None
    ) -> SubnetTrainer:
        """See :meth:`Family.make_trainer`: baselines have the defaults of what is beside them."""
        if method in FEDERATED:
            return FederatedTrainer(model, data, **settings)
        kind = self._kind(method, model, beside)
        if method in _TRAINERS:
            return kind(model, data, **settings)
        whole = SampleDataParallelTrainer if method == "data-parallel" else SampleTrainer
        return whole(model, data, **kind.with_defaults(settings))

    def _kind(self, method: str, model: nn.Module, beside: str | None) -> type[SampleTrainer]:
        """The trainer of a method; of a baseline, that of what is beside it."""
        base = beside or method
        if base not in _TRAINERS:
            made_for = {networks.MLP: "ist", networks.PreActResNet: "resist"}
            base = made_for.get(type(model), "loft")
        return _TRAINERS[base]

    def training_config(self, method: str, settings: Mapping[str, Any]) -> TrainConfig:
        """See :meth:`Family.training_config`."""
        _, given = self.split_model_settings(settings)
        if method in FEDERATED:
            return super().training_config(method, settings)
        if method in _TRAINERS:
            return _TRAINERS[method].choose(given)[1]
        base = _TRAINERS[self._base(None, "", settings)]
        return SampleTrainer.choose(base.with_defaults(given))[1]

    def plan(
        self, shape: Any, method: str, settings: Settings, *, workers: int, device: str
    ) -> Costs:
        """See :meth:`Family.plan`."""
        model_settings, given = self.split_model_settings(settings)
        with torch.device("meta"):
            model = build_model(shape, seed=settings["seed"], **model_settings)
        kind = self._kind(method, model, None)
        if method not in _TRAINERS:
            kind, given = SampleTrainer, kind.with_defaults(given)
        wiring, config, samples = kind.choose(given)
        return estimate_costs(
            model,
            shape,
            wiring=wiring,
            workers=workers,
            device=device,
            config=config,
            **vars(samples),
        )

    def shape_of(
        self, dataset: str | None, options: Mapping[str, Any], sizes: Mapping[str, Any]
    ) -> SampleShape:
        """See :meth:`Family.shape_of`."""
        assert dataset is not None, "sizes without a name are those of a graph"
        if sizes:
            raise ConfigError(
                "these are sizes of a graph",
                got=", ".join(sizes),
                remedy="leave them out: the sizes are those of the dataset",
            )
        return shape_of_dataset(self._card(dataset), **options)

    def name_of(self, dataset: str, data: Any) -> str:
        """See :meth:`Family.name_of`: a part of MNIST has a name of its own."""
        name: str = data.name
        return name


def build_model(
    data: SampleData | SampleShape,
    *,
    model: str = "mlp",
    hidden: int | None = None,
    layers: int | None = None,
    norm: str | None = "batch",
    dropout: float = 0.0,
    seed: int = 0,
) -> nn.Module:
    """A reference network for samples, initialised from ``seed`` alone.

    Args:
        data: The samples, or their shape.
        model: ``"mlp"``, or the name of a convolutional network.
        hidden: Width of every hidden layer, 1,024 by default; of the first stage of a convolutional
            network, whose other stages keep their ratio to it.
        layers: Linear layers of an MLP, 2 by default.
        norm: Of an MLP ``"batch"``, ``"layer"`` or None; of a residual network one of the former.
        dropout: Of an MLP.
        seed: See above.

    Raises:
        ConfigError: the model is unknown, cannot be of that size, or is one of images.
    """
    if model not in Samples.models:
        raise ConfigError("unknown model", got=repr(model), expected=" or ".join(Samples.models))
    for name, value in (("hidden", hidden), ("layers", layers)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1", got=value)
    if not 0 <= dropout < 1:
        raise ConfigError("dropout must be in [0, 1)", got=dropout)
    shape, classes = data.sample_shape, data.num_classes
    with seeded("model", seed):
        if model == "mlp":
            return networks.MLP(
                math.prod(shape),
                hidden or 1024,
                classes,
                layers,
                dropout=dropout,
                norm=norm,  # type: ignore[arg-type]  # checked there
                input="bag" if data.is_sparse else "dense",
            )
        unused = {"layers": layers, "dropout": dropout or None}
        if refused := [name for name, value in unused.items() if value is not None]:
            raise ConfigError(f"only an mlp has {', '.join(refused)}", got=f"model={model!r}")
        more: dict[str, Any] = {} if hidden is None else {"width": hidden}
        if model.startswith("preact"):
            more["norm"] = norm
        elif norm != "batch":
            raise ConfigError("a VGG has batch norms", got=f"norm={norm!r}, model={model!r}")
        if len(shape) != 3:
            raise ConfigError(
                f"{model} takes images",
                got=f"samples of shape {shape}",
                expected="[channels, height, width]",
                remedy="use model='mlp'",
            )
        return _NETWORKS[model](classes, in_channels=shape[0], **more)
