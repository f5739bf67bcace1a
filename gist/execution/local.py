"""The local steps of one subnet (GIST, Algorithm 1: ``subTrain``)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer

from gist.config import TrainConfig
from gist.errors import ConfigError, DivergedError
from gist.execution.objective import Objective


def make_optimizer(config: TrainConfig, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """A fresh optimiser over the parameters that want gradients.

    Raises:
        ConfigError: no parameter does, or the factory gives no optimiser that can step by itself.
    """
    wanted = [p for p in parameters if p.requires_grad]
    if not wanted:
        raise ConfigError("nothing to train: every parameter is frozen (requires_grad=False)")
    if callable(config.optimizer):
        optimizer = config.optimizer(wanted)
        if not isinstance(optimizer, Optimizer) or isinstance(optimizer, LBFGS):
            raise ConfigError(
                "optimizer must make an optimiser that steps without a closure",
                got=type(optimizer).__name__,
                expected="a function of parameters, such as lambda ps: torch.optim.SGD(ps, lr=0.1)",
            )
        return optimizer
    settings: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    settings["fused"] = all(p.is_floating_point() for p in wanted)
    if config.optimizer == "sgd":
        return SGD(wanted, momentum=0.9, **settings)
    return (Adam if config.optimizer == "adam" else AdamW)(wanted, **settings)


def train_locally(
    model: nn.Module,
    optimizer: Optimizer,
    objective: Objective,
    batches: Iterable[Any],
    rate_factors: Iterable[float],
    clip_norm: float | None,
) -> float:
    """Runs one optimiser step per batch.

    Args:
        model: The subnet, in training mode.
        optimizer: Its optimiser; the rates it has now are the base rates.
        objective: Gives the loss.
        batches: One per step.
        rate_factors: Factor on the base rates, one per step.
        clip_norm: Largest gradient norm, or None.

    Returns:
        The mean training loss over the steps.

    Raises:
        DivergedError: the loss is not finite.
    """
    base = [group["lr"] for group in optimizer.param_groups]
    losses: list[Tensor] = []
    for batch, factor in zip(batches, rate_factors, strict=True):
        for group, rate in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = rate * factor
        optimizer.zero_grad(set_to_none=True)
        loss = objective.loss(model, batch)
        loss.sum().backward()  # type: ignore[no-untyped-call]
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
        losses.append(loss.detach())
    mean = float(torch.stack(losses).mean())
    if not math.isfinite(mean):
        raise DivergedError(
            "the training loss is no longer finite",
            got=[float(loss) for loss in losses][-5:],
            remedy="lower lr, set clip_norm, or use a model with normalisation",
        )
    return mean
