"""Federated training by name, on any kind of data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from gist.config import FederatedConfig, TrainConfig, split_settings
from gist.errors import ConfigError
from gist.federated.strategies import STRATEGIES
from gist.federated.trainer import FederatedTrainer

FEDERATED = ("asyncdrop", "federated")
"""Methods: AsyncDrop, and any strategy."""

FEDERATED_SETTINGS: Mapping[str, tuple[str, ...]] = {
    entry.name: FEDERATED for entry in fields(FederatedConfig)
}
"""Settings that they alone have."""


def federated_settings(method: str, settings: dict[str, Any]) -> dict[str, Any]:
    """All settings of a run, as the trainer takes them.

    Raises:
        ConfigError: a strategy other than the method, or none where any may be meant.
    """
    if method == "asyncdrop":
        given = settings.get("strategy", "asyncdrop")
        if given not in ("asyncdrop", "asyncdrop-uniform"):
            raise ConfigError(
                "this strategy is not AsyncDrop",
                got=f"strategy={given!r} with method='asyncdrop'",
                remedy="use method='federated'",
            )
    elif "strategy" not in settings:
        raise ConfigError("method 'federated' needs a strategy", expected=" or ".join(STRATEGIES))
    return settings


def federated_config(settings: Mapping[str, Any], data_config: type) -> TrainConfig:
    """Checks the settings of a run, but for those of the model.

    Raises:
        ConfigError: one of them.
    """
    own, federated, training = split_settings(
        dict(settings), data_config, FederatedConfig, TrainConfig
    )
    data_config(**own)
    FederatedConfig(**federated)
    return TrainConfig.from_settings({**FederatedTrainer.defaults, **training})
