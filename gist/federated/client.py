"""The local steps of a client, wherever it runs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

import torch
from torch import Tensor

from gist.execution.local import train_locally
from gist.execution.objective import Objective
from gist.execution.program import Program
from gist.federated.local import masked_outputs, proximal
from gist.partition.streams import seeded


def train_client(
    program: Program,
    objective: Objective,
    like: Mapping[str, Tensor],
    *,
    client: int,
    own: int,
    steps: int,
    rate: float,
    drawn_back: float = 0.0,
    classes: Tensor | None = None,
) -> tuple[float, float]:
    """Trains what a client was sent, in place.

    Args:
        program: The client's subnet, filled with what it was sent, and its settings.
        objective: Batches, by client and its own task; and loss.
        like: Tensors whose ``requires_grad`` is taken over.
        client: The client.
        own: Which of its tasks.
        steps: Local steps.
        rate: Factor on the base learning rate.
        drawn_back: µ of FedProx.
        classes: Those whose outputs are not set to 0; all of them by default.

    Returns:
        The loss of the first and of the last step.
    """
    seed = program.config.seed
    device = next(program.module.parameters()).device
    program.restart(like, None)
    with seeded("client", seed, client, own, device=device), ExitStack() as local:
        if classes is not None:
            local.enter_context(masked_outputs(program.call, classes))
        if drawn_back:
            local.enter_context(proximal(program.module, drawn_back))
        batches = objective.batches(seed=seed, round=own, subnet=client, steps=steps)
        losses = train_locally(program, objective, batches, [rate] * steps, program.config)
    return float(losses[0]), float(losses[-1])


def clone(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors."""
    return {
        name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
