"""Asynchronous federated training on subnets that fit the clients' speeds."""

from __future__ import annotations

from typing import Any

from torch import nn

from gist.errors import ConfigError
from gist.federated.selection import HeteroDrop, UniformDrop
from gist.federated.strategies import Strategy
from gist.federated.trainer import FederatedTrainer
from gist.partition.merging import Mix
from gist.partition.wiring import Wiring


class AsyncDropTrainer(FederatedTrainer):
    """AsyncDrop: clients train a part of the units each, and are merged when they answer.

    Dun et al., "Efficient and Light-Weight Federated Learning via Asynchronous Distributed
    Dropout", AISTATS 2023, Algorithm 3. A client that is sent work gets a share ``1 - drop`` of the
    units of every group. Which they are is drawn at random, or, with ``smart`` selection, goes by
    how much each has moved since the start: fast clients train what moved least, and slow ones what
    moved most. What a client trained is mixed into what it held, W <- (1 - α) W + α W_client, and
    nothing else changes.

    >>> trainer = AsyncDropTrainer(model, load_dataset("cifar10"), clients=100, duration=36_000)
    >>> result = trainer.fit()
    >>> trainer.time_to(0.35)

    Args:
        model: Any module whose wiring is known, or is given: of an MLP the neurons are dropped, of
            a convolutional network the filters within blocks, of a graph network hidden features.
        data: As for :class:`FederatedTrainer`.
        smart: Hetero AsyncDrop; False is Uniform AsyncDrop.
        drop: Share of the units that a client does without.
        alpha: α, the weight of an answer.
        **settings: As for :class:`FederatedTrainer`, but for ``strategy`` and ``capacity``. The
            budget is ``rounds``, of merges, ``epochs``, 100 by default, or ``duration``.

    Raises:
        ConfigError: settings that cannot be used.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        *,
        smart: bool = True,
        drop: float = 0.25,
        alpha: float = 0.5,
        wiring: Wiring | None = None,
        **settings: Any,
    ) -> None:
        for name in ("strategy", "capacity"):
            if name in settings:
                raise ConfigError(
                    f"{name} is what makes AsyncDrop",
                    got=f"{name}={settings[name]!r}",
                    remedy="use smart, drop and alpha, or gist.FederatedTrainer",
                )
        if not isinstance(smart, bool):
            raise ConfigError("smart must be True or False", got=repr(smart))
        if not 0 <= drop < 1:
            raise ConfigError("drop must be a share in [0, 1)", got=drop)
        strategy = Strategy(
            selection=HeteroDrop() if smart else UniformDrop(),
            rule=Mix(alpha=alpha),
            capacity=1 - drop,
        )
        super().__init__(model, data, wiring=wiring, strategy=strategy, **settings)
