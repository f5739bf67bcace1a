"""What an experiment by names has to know of a kind of data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import nn

from gist.baselines.data_parallel import data_parallel_settings
from gist.baselines.ensemble import ensemble_settings
from gist.baselines.full import full_model_settings
from gist.baselines.local_sgd import local_sgd_settings
from gist.config import TrainConfig, split_settings
from gist.costs.costs import Costs
from gist.errors import ConfigError
from gist.families.federated import FEDERATED, federated_config, federated_settings
from gist.trainer import SubnetTrainer

Settings = dict[str, Any]

CHANGES: Mapping[str, Callable[[Settings], Settings]] = {
    "full": full_model_settings,
    "local-sgd": local_sgd_settings,
    "data-parallel": data_parallel_settings,
    "ensemble": ensemble_settings,
}
"""How methods that are no subnet training change the settings of a run."""

WHOLE = ("full", "local-sgd", "data-parallel")
"""Methods that train the whole model."""


class Family(ABC):
    """Graphs, or independent samples.

    Attributes:
        methods: What subnets are trained by, the default first.
        baselines: What they are compared with, besides the full model.
        models: Names of the reference models.
        model_settings: Settings of :meth:`build_model`.
        data_config: Class of the settings of the data side.
        plannable: Methods that can be planned.
        own_settings: Settings that some methods alone have, by name, with these methods.
        what: What the data are called in messages.
    """

    methods: tuple[str, ...]
    baselines: tuple[str, ...]
    models: tuple[str, ...]
    model_settings: tuple[str, ...]
    data_config: type
    plannable: tuple[str, ...]
    own_settings: Mapping[str, tuple[str, ...]] = {}
    what: str

    @abstractmethod
    def method_for(self, dataset: str, settings: Mapping[str, Any]) -> str:
        """The method where none is named."""

    @abstractmethod
    def defaults(
        self, dataset: str, method: str, settings: Mapping[str, Any], beside: str | None = None
    ) -> Settings:
        """Settings of a dataset for a method, where those that are given leave them open.

        Args:
            dataset: Its name.
            method: The method.
            settings: Those that are given.
            beside: Of a baseline, the subnet training that it is compared with.
        """

    @abstractmethod
    def build_model(self, data: Any, *, seed: int = 0, **settings: Any) -> nn.Module:
        """A reference model for data, or for their shape, initialised from ``seed`` alone."""

    @abstractmethod
    def make_trainer(
        self, method: str, model: nn.Module, data: Any, settings: Settings, beside: str | None
    ) -> SubnetTrainer:
        """The trainer of a method; see :meth:`defaults`."""

    @abstractmethod
    def plan(
        self, shape: Any, method: str, settings: Settings, *, workers: int, device: str
    ) -> Costs:
        """What a run takes."""

    @abstractmethod
    def shape_of(
        self, dataset: str | None, options: Mapping[str, Any], sizes: Mapping[str, Any]
    ) -> Any:
        """Sizes of a dataset, some of them given; or, without one, all of them given."""

    def name_of(self, dataset: str, data: Any) -> str:
        """What results on these data are results of."""
        return dataset

    def dtype(self, data: Any) -> torch.dtype:
        """The precision of models for the data."""
        kind: torch.dtype = data.x.dtype
        return kind if kind.is_floating_point else torch.get_default_dtype()

    def check_method(self, method: str, settings: Mapping[str, Any]) -> None:
        """Refuses a method that this kind of data does not have.

        Raises:
            ConfigError: see above, or the full model split.
        """
        known = (*self.methods, "full", *self.baselines)
        if method not in known:
            raise ConfigError("unknown method", got=repr(method), expected=" or ".join(known))
        if method == "full" and settings.get("num_subnets", 1) != 1:
            raise ConfigError(
                "the full model is not split",
                got=f"num_subnets={settings['num_subnets']}",
                remedy=f"leave num_subnets out, or use method {self.methods[0]!r}; over several "
                "workers, 'data-parallel'",
            )

    @property
    def every_setting(self) -> frozenset[str]:
        """Names of the settings that this kind of data has, besides those of training."""
        own = {entry.name for entry in fields(self.data_config)}
        return frozenset({*own, *self.model_settings, *self.own_settings})

    def check_settings(
        self, method: str, settings: Mapping[str, Any], others: Iterable[Family]
    ) -> None:
        """Refuses settings of other kinds of data, and of other methods.

        Raises:
            ConfigError: see above; says whose they are.
        """
        for name in settings:
            for family in others:
                if name in family.every_setting - self.every_setting:
                    raise ConfigError(
                        f"{name} is a setting of {family.what}, and these are {self.what}",
                        got=f"{name}={settings[name]!r}",
                        remedy="leave it out",
                    )
            owners = self.own_settings.get(name, (method,))
            if method not in owners:
                raise ConfigError(
                    f"{name} is a setting of method {' or '.join(map(repr, owners))}",
                    got=f"{name}={settings[name]!r} with {method!r}",
                    remedy="leave it out",
                )

    def adapt(self, method: str, settings: Settings) -> Settings:
        """All settings of a run, changed as its method wants them."""
        if method in FEDERATED:
            return federated_settings(method, settings)
        return CHANGES[method](settings) if method in CHANGES else settings

    def training_config(self, method: str, settings: Mapping[str, Any]) -> TrainConfig:
        """Checks the settings of a run, but for those of the model.

        Raises:
            ConfigError: one of them.
        """
        given = {k: v for k, v in settings.items() if k not in self.model_settings}
        if method in FEDERATED:
            return federated_config(given, self.data_config)
        data, training = split_settings(given, self.data_config, TrainConfig)
        self.data_config(**data)
        return TrainConfig.from_settings(training)

    def split_model_settings(self, settings: Mapping[str, Any]) -> tuple[Settings, Settings]:
        """Settings of the model, and all others."""
        model = {k: v for k, v in settings.items() if k in self.model_settings}
        return model, {k: v for k, v in settings.items() if k not in model}
