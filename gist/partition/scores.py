"""Scores of units, by what of the model belongs to them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gist.errors import ConfigError, PartitionError
from gist.partition.spec import PartitionSpec, model_tensors


@torch.no_grad()
def unit_norms(model: nn.Module, spec: PartitionSpec, p: float = 2.0) -> dict[str, Tensor]:
    """The p-norm of the weights that compute each unit: of a filter, or of a neuron's row.

    These are the weights of the layers that put the unit out, whose first dim it indexes; biases
    and norms are not counted.

    Args:
        model: The model.
        spec: Its partition spec.
        p: From 1 on; ``math.inf`` for the largest entry.

    Returns:
        ``[size]`` for each group, on the CPU.

    Raises:
        ConfigError: ``p`` is no norm's.
        PartitionError: no layer computes the units of a group, as where they are residual blocks.
    """
    if not p >= 1:
        raise ConfigError("p must be 1 or more", got=p)
    tensors = model_tensors(model)
    found = {}
    for group, size in spec.sizes.items():
        parts = []
        for name, layout in spec.layouts.items():
            rows = [s for s in layout.slots if s.dim == 0 and s.group == group]
            if len(layout.shape) < 2 or not rows:
                continue
            weight = tensors[name].detach().cpu().flatten(1)
            for slot in rows:
                positions = slot.map.forward(torch.arange(size))
                copies = weight[positions].view(-1, size, slot.map.width, weight.size(1))
                parts.append(copies.transpose(0, 1).reshape(size, -1))
        if not parts:
            raise PartitionError(
                f"no layer computes the units of {group!r} one by one, so they have no norm",
                remedy="rank filters or neurons: use a LoFT or IST wiring of the model",
            )
        found[group] = torch.linalg.vector_norm(torch.cat(parts, dim=1), ord=p, dim=1)
    return found


def ranked(scores: Tensor) -> Tensor:
    """Units by score, the largest first; of equal ones the lower number first."""
    return torch.argsort(scores, descending=True, stable=True)
