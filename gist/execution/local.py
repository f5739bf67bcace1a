"""The local steps of a subnet, or of several at once (GIST, Algorithm 1: ``subTrain``)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer

from gist.config import TrainConfig
from gist.errors import ConfigError
from gist.execution.objective import Objective

if TYPE_CHECKING:
    from gist.execution.program import Program


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


ELEMENTWISE = (
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.SGD,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.Adamax,
    torch.optim.ASGD,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
)
"""Optimisers that update every entry on its own, so that stacking subnets changes nothing."""


def train_locally(
    program: Program,
    objective: Objective,
    batches: Iterable[Any],
    rate_factors: Iterable[float],
    config: TrainConfig,
    *,
    gradients: Callable[[Any], Tensor] | None = None,
) -> Tensor:
    """Runs one optimiser step per batch, for one subnet or for several side by side.

    Args:
        program: What is trained.
        objective: Gives the loss.
        batches: One per step.
        rate_factors: Factor on the base rates, one per step.
        config: Gradient clipping and precision.
        gradients: Leaves the gradients of a batch with the parameters, and returns its loss of each
            subnet; by default those of the objective's loss.

    Returns:
        The training loss of every step and subnet: ``[steps, program.size]``.
    """
    optimizer = program.optimizer
    base = [group["lr"] for group in optimizer.param_groups]

    def of_loss(batch: Any) -> Tensor:
        with autocast(program, config):
            loss = objective.loss(program.call, batch)
        loss.sum().backward()  # type: ignore[no-untyped-call]
        return loss.detach().reshape(-1)

    gradients = gradients or of_loss
    losses: list[Tensor] = []
    try:
        for batch, factor in zip(batches, rate_factors, strict=True):
            for group, rate in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = rate * factor
            optimizer.zero_grad(set_to_none=True)
            loss = gradients(batch)
            if config.clip_norm is not None:
                _clip(program, config.clip_norm)
            optimizer.step()
            losses.append(loss)
    finally:
        for group, rate in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
    return torch.stack(losses)


def autocast(program: Program, config: TrainConfig) -> torch.autocast:
    """Computes in the precision that the settings ask for."""
    device = next(program.module.parameters()).device.type
    return torch.autocast(device, torch.bfloat16, enabled=config.precision == "bfloat16")


@torch.no_grad()
def _clip(program: Program, most: float) -> None:
    """Scales the gradient of each subnet down to a norm of at most ``most``."""
    if not program.grouped:
        nn.utils.clip_grad_norm_(program.module.parameters(), most)
        return
    grads = [p.grad for p in program.parameters.values() if p.grad is not None]
    each = [grad.reshape(program.size, -1).square().sum(dim=1) for grad in grads]
    squares = torch.stack(each).sum(dim=0)
    factors = (most / (squares.sqrt() + 1e-6)).clamp(max=1.0)
    for grad in grads:
        grad.mul_(factors.view(-1, *[1] * (grad.dim() - 1)))
