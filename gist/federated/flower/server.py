"""The server's side of Flower: a ``ServerApp`` that merges answers when they come."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import nn

from gist.config import TrainConfig, split_settings
from gist.errors import ConfigError
from gist.federated.flower.client import ClientData, objective_of
from gist.federated.flower.coordinator import Coordinator
from gist.federated.flower.deployment import Deployment
from gist.federated.flower.ledger import Evaluate
from gist.federated.flower.link import GridLink
from gist.federated.flower.records import flower
from gist.federated.trainer import FederatedTrainer
from gist.graph.objective import GraphObjective
from gist.partition.wiring import Wiring

_MERGES = 100
"""The budget where none is given."""

_TRAINING = frozenset(
    {
        *("rounds", "local_steps", "optimizer", "lr", "weight_decay", "schedule", "clip_norm"),
        *("precision", "width_correction", "eval_every", "keep_best", "out", "callbacks"),
        *("progress", "seed"),
    }
)
"""Settings of the training that are of use here."""


def server_app(
    model_fn: Callable[[Any], nn.Module],
    *,
    evaluate_fn: Evaluate | None = None,
    wiring: Wiring | None = None,
    **settings: Any,
) -> Any:
    """The ``ServerApp`` that trains a model on the data of clients.

    What it does: :class:`~gist.federated.flower.coordinator.Coordinator`.

    >>> app = server_app(make_model, evaluate_fn=evaluate_on(data), strategy="asyncdrop", rounds=50)

    What the run configuration says of a setting, ``local-steps`` or ``local_steps``, goes before
    what is said here.

    Args:
        model_fn: Makes the model, given Flower's ``Context``; the same as the clients'.
        evaluate_fn: Metrics of a model, named as in :class:`~gist.history.RoundRecord`; see
            :func:`~gist.federated.flower.evaluate_on`. None: the model is not evaluated.
        wiring: For a model whose wiring is not known.
        **settings: The attributes of :class:`~gist.federated.flower.deployment.Deployment`, and of
            :class:`~gist.config.TrainConfig`: ``rounds``, the budget of merges, ``local_steps``,
            ``optimizer`` (by name), ``lr``, ``weight_decay``, ``schedule``, ``clip_norm``,
            ``precision``, ``width_correction``, ``eval_every``, ``keep_best``, ``out``,
            ``callbacks``, ``progress`` and ``seed``. Defaults are those of
            :class:`~gist.FederatedTrainer`, and 100 merges.

    Raises:
        ConfigError: settings that cannot be used.
        MissingDependencyError: Flower is not installed.
    """
    read_settings(settings)
    app = flower("serverapp").ServerApp()

    @app.main()  # type: ignore[untyped-decorator]
    def main(grid: Any, context: Any) -> None:
        config, deployment = read_settings(settings, context.run_config)
        Coordinator(
            model_fn(context),
            GridLink(grid),
            config,
            deployment,
            evaluate=evaluate_fn,
            wiring=wiring,
        ).run()

    return app


def evaluate_on(data: ClientData, **settings: Any) -> Evaluate:
    """What measures a model on the splits of data that the server has.

    Args:
        data: Samples, or a graph.
        **settings: The attributes of :class:`~gist.config.SampleConfig`, or of
            :class:`~gist.config.GraphConfig`.

    Raises:
        ConfigError: settings that are not for these data.
    """
    objective_of(data, torch.device("cpu"), steps=1, **settings)

    def evaluate(model: nn.Module) -> dict[str, float]:
        device = next(model.parameters()).device
        objective = objective_of(data, device, steps=1, **settings)
        if isinstance(objective, GraphObjective):
            objective.choose_inference(model)
        return objective.evaluate(model)

    return evaluate


def read_settings(
    settings: Mapping[str, Any], run_config: Mapping[str, Any] | None = None
) -> tuple[TrainConfig, Deployment]:
    """Settings of a run, those of a run configuration first.

    Args:
        settings: As for :func:`server_app`.
        run_config: By name; other names are left alone.

    Raises:
        ConfigError: an unknown setting, one that is of no use here, or a value that cannot be used.
    """
    known = _TRAINING | {entry.name for entry in fields(Deployment)}
    named = {name.replace("-", "_"): value for name, value in (run_config or {}).items()}
    given = {**settings, **{name: value for name, value in named.items() if name in known}}
    own, training = split_settings(given, Deployment, TrainConfig)
    if useless := sorted(training.keys() - _TRAINING):
        raise ConfigError(
            "settings that a server of clients has no use for",
            got=", ".join(useless),
            expected=", ".join(sorted(_TRAINING)),
        )
    if callable(training.get("optimizer")):
        raise ConfigError("clients are told the name of an optimizer", got="a function")
    deployment = Deployment(**own)
    defaults = {n: v for n, v in FederatedTrainer.defaults.items() if n in _TRAINING}
    if deployment.duration is None:
        defaults["rounds"] = _MERGES
    return TrainConfig.from_settings({**defaults, **training}), deployment
