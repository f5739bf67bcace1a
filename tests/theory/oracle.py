"""Masked training subnet by subnet, gradients by autograd: what the fast one is held against."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gist.theory import Network, Problem


def subnet_loss(problem: Problem, weight: Tensor, signs: Tensor, mask: Tensor) -> Tensor:
    """½ ‖y - f_l‖², neuron by neuron."""
    hidden = (problem.x @ weight.T).relu()
    output = (hidden * mask) @ signs / math.sqrt(len(signs))
    if problem.propagation is not None:
        output = problem.propagation @ output
    return 0.5 * (problem.y - output).square().sum()


def local_steps(problem: Problem, network: Network, mask: Tensor, lr: float, steps: int) -> Tensor:
    """The weights [m, d] after some steps; those of masked neurons do not change."""
    weight = network.weight.clone()
    for _ in range(steps):
        weight.requires_grad_()
        loss = subnet_loss(problem, weight, network.signs, mask)
        (gradient,) = torch.autograd.grad(loss, weight)
        weight = weight.detach() - lr * gradient
    return weight


def round_of(problem: Problem, network: Network, masks: Tensor, lr: float, steps: int) -> Tensor:
    """w_r + Σ_l Δw^l_r / max(X_r, 1)."""
    changes = [
        local_steps(problem, network, mask.double(), lr, steps) - network.weight for mask in masks
    ]
    return network.weight + sum(changes) / masks.sum(dim=0).clamp(min=1)[:, None]
