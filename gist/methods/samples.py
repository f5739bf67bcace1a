"""Subnet training on independent samples: what IST, ResIST and LoFT have in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gist.config import SampleConfig, TrainConfig, split_settings
from gist.errors import ConfigError
from gist.execution.distributed import ShardedStore
from gist.partition.samplers import Whole
from gist.partition.wiring import Wiring
from gist.plan import RoundPlan
from gist.samples.data import SampleData
from gist.samples.loader_data import LoaderData
from gist.samples.objective import SampleObjective
from gist.samples.series import SeriesSource
from gist.trainer import SubnetTrainer, device_of

STATISTICS_STEPS = 64
"""Batches that BatchNorm statistics are re-estimated on, at most: more hardly move the means."""


class SampleTrainer(SubnetTrainer):
    """Trains subnets of a model whose input is a batch of independent samples.

    >>> trainer = SampleTrainer(model, data, num_subnets=4, epochs=20)
    >>> result = trainer.fit()

    With ``shards=True`` every subnet has its own share of the training samples; they then run one
    after the other on a device, each on batches of its own.

    Args:
        model: Any module of one argument, a batch ``[B, ...]``, whose wiring is known, or is given.
        data: A :class:`~gist.SampleData`, or what :meth:`~gist.SampleData.of` takes; or a
            :class:`~gist.LoaderData` with loaders of PyTorch.
        wiring: See :class:`~gist.SubnetTrainer`.
        config: Settings of the training; or give them as keywords.
        **settings: The attributes of :class:`~gist.config.SampleConfig` and
            :class:`~gist.config.TrainConfig`. What is not given is as in :attr:`defaults`.

    Attributes:
        defaults: Settings of this method that differ from those of
            :class:`~gist.config.TrainConfig`.
        own_settings: Names of settings that this method alone has.

    Raises:
        DataError: data that cannot be trained on.
        ConfigError: settings that cannot be used.
        PartitionError: a model that cannot be partitioned.
    """

    defaults: ClassVar[Mapping[str, Any]] = {}
    own_settings: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        model: nn.Module,
        data: SampleData | LoaderData | Any,
        *,
        wiring: Wiring | None = None,
        config: TrainConfig | None = None,
        **settings: Any,
    ) -> None:
        if not isinstance(data, LoaderData):
            data = SampleData.of(data)
        elif "batch_size" in settings:
            raise ConfigError(
                "batches are those of the loaders",
                got=f"batch_size={settings['batch_size']} with {type(data).__name__}",
                remedy="leave it out, and give it to the DataLoader",
            )
        self.data = data
        known, config, self.sample_config = self.choose(settings, config)
        objective = SampleObjective(
            data,
            device_of(model, config),
            self.sample_config,
            num_subnets=max(m for _, m in config.phases),
            local_steps=config.local_steps,
        )
        super().__init__(model, objective, wiring=wiring or known, config=config)

    @classmethod
    def choose(
        cls, settings: Mapping[str, Any], config: TrainConfig | None = None
    ) -> tuple[Wiring | None, TrainConfig, SampleConfig]:
        """Wiring and settings of a run by this method.

        Args:
            settings: Keywords of the trainer.
            config: Settings of the training, if they are not among them.

        Raises:
            ConfigError: settings that cannot be used.
        """
        given = {name: settings[name] for name in settings if name not in cls.own_settings}
        samples, training = split_settings(given, SampleConfig, TrainConfig)
        if config is not None and training:
            raise ConfigError("give either config or settings", got=sorted(training))
        sample_config = SampleConfig(**samples)
        if config is None:
            config = TrainConfig.from_settings(cls.with_defaults(training))
        if sample_config.shards:
            if config.executor == "stacked" or config.shared_batches or len(config.phases) > 1:
                raise ConfigError(
                    "each of a fixed number of subnets has a shard, and batches of its own from it",
                    got=f"executor={config.executor!r}, shared_batches={config.shared_batches}, "
                    f"num_subnets={config.num_subnets}",
                    expected="subnets one after the other, and one number of them",
                    remedy="or leave shards out",
                )
            config = replace(config, shared_batches=False)
        replicas = isinstance(config.sampler, Whole) and config.executor != "stacked"
        if replicas and config.shared_batches is None:  # on the same batches they were one model
            config = replace(config, shared_batches=False)
        own = {name: settings[name] for name in cls.own_settings if name in settings}
        return cls.wiring_for(**own), cls.adapt(config, **own), sample_config

    @classmethod
    def with_defaults(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings, and the method's defaults where they are left open."""
        given = {} if settings.get("rounds") is None else {"epochs": None}
        return {**cls.defaults, **given, **settings}

    @classmethod
    def wiring_for(cls, **own: Any) -> Wiring | None:
        """What the units are, by the method's own settings; None for what the model declares."""
        return None

    @classmethod
    def adapt(cls, config: TrainConfig, **own: Any) -> TrainConfig:
        """Settings of the training, with what the method's own settings make of them."""
        return config

    @property
    def metric(self) -> str:
        """Name of the data's metric."""
        return self.data.metric

    def _statistics_batches(self, plan: RoundPlan) -> Iterable[Any]:
        """See :meth:`SubnetTrainer._statistics_batches`; of a series, the next, yet to be drawn."""
        assert isinstance(self.objective, SampleObjective)
        round = plan.index + isinstance(self.objective.source, SeriesSource)
        steps = min(self.objective.steps_per_epoch, STATISTICS_STEPS)
        shards = plan.num_subnets if self.sample_config.shards else 1
        seen = [
            self.objective.batches(
                seed=self.config.seed, round=round, subnet=subnet, steps=-(-steps // shards)
            )
            for subnet in range(shards)
        ]
        return chain.from_iterable(seen)

    def settings(self) -> dict[str, Any]:
        """The settings of the run, of training and samples, as JSON values."""
        return {**super().settings(), **self.sample_config.to_json()}

    def describe(self) -> dict[str, Any]:
        """The run as JSON values: model, groups, settings, batches."""
        assert isinstance(self.objective, SampleObjective)
        return {**super().describe(), **self.objective.describe()}

    @torch.no_grad()
    def predict(self, x: Tensor | str | Any = "test") -> Tensor:
        """Scores ``[N, C]`` by the model as it is evaluated now.

        Under torchrun all workers call it, and rank 0 alone gets any: ``[0, C]`` on the others.

        Args:
            x: A split, ``"train"``, ``"val"`` or ``"test"``, whose samples are taken in its order;
                or samples ``[N, ...]`` in the form in which the data hold theirs, not transformed:
                a tensor, or what :meth:`SampleData.of` takes. Floats get the data's precision.

        Raises:
            ConfigError: samples of another form, or an unknown split.
            DataError: no array of numbers.
        """
        assert isinstance(self.objective, SampleObjective)
        with self._as_found():
            model = self.model
            if isinstance(self.store, ShardedStore):
                whole = self.store.assembled()
                if whole is None:
                    return torch.empty(0, self.data.num_classes)
                model = whole
            with self.depth_corrected(model):
                return self.objective.predict(model.eval(), x)
