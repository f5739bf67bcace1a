"""BatchNorm statistics of a merged model, estimated anew."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from gist.execution.objective import Objective
from gist.modes import keeps_modes


@torch.no_grad()
def recalibrate_batchnorm(model: nn.Module, objective: Objective, batches: Iterable[Any]) -> bool:
    """Replaces running statistics by averages over the given batches.

    Subnets normalise sums over fewer inputs, so the statistics that they track are not those of the
    merged model. All other layers stay in evaluation mode, so nothing random happens.

    Args:
        model: The merged model; its running statistics are overwritten, its modes restored.
        objective: Runs the model.
        batches: Training batches.

    Returns:
        Whether the model tracks any statistics.
    """
    norms = _tracking(model)
    if not norms:
        return False
    momenta = {norm: norm.momentum for norm in norms}
    with keeps_modes(model):
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain average over the batches
            norm.train()
        for batch in batches:
            objective.loss(model, batch)
    for norm in norms:
        norm.momentum = momenta[norm]
    return True


def tracks_statistics(model: nn.Module) -> bool:
    """Whether a model has running statistics to re-estimate."""
    return bool(_tracking(model))


def _tracking(model: nn.Module) -> list[_BatchNorm]:
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    return [norm for norm in norms if norm.running_mean is not None]
