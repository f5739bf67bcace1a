"""The grouped product: m independent linear maps on features that lie side by side.

Shape legend: ``n`` nodes, ``m`` subnets, ``k`` input features and ``o`` output features of one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _GroupedProduct(torch.autograd.Function):
    """``out[:, i] = x[:, i] @ weight[i].T``: a block-diagonal product without the zeros.

    One batched product that reads and writes the features where they lie, rows ``m * k`` and
    ``m * o`` apart.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _blocks(x.transpose(0, 1), weight.transpose(1, 2), nodes_first=True)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grad_outputs[0].transpose(0, 1)
        to_x = _blocks(grad, weight, nodes_first=True) if ctx.needs_input_grad[0] else None
        to_weight = None
        if ctx.needs_input_grad[1]:
            to_weight = _blocks(grad.transpose(1, 2), x.transpose(0, 1), nodes_first=False)
        return to_x, to_weight


def _blocks(a: Tensor, b: Tensor, *, nodes_first: bool) -> Tensor:
    # a [m, p, q] @ b [m, q, r] -> [m, p, r], stored as [p, m, r] where nodes come first.
    m, p, r = a.size(0), a.size(1), b.size(2)
    if not nodes_first:
        return torch.bmm(a, b)
    out = a.new_empty((p, m, r))
    torch.bmm(a, b, out=out.transpose(0, 1))
    return out


def grouped_product(x: Tensor, weight: Tensor) -> Tensor:
    """``x[:, i] @ weight[i].T`` for every subnet ``i``, differentiable in both.

    Args:
        x: ``[n, m, k]``, or ``[n, k]`` where all subnets share their input.
        weight: ``[m, o, k]``.

    Returns:
        ``[n, m, o]``, contiguous. Costs ``2 n m o k`` floating-point operations.
    """
    if x.dim() == 2:
        m, outputs, _ = weight.shape
        return F.linear(x, weight.flatten(0, 1)).view(-1, m, outputs)
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:  # as F.linear
        kind = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(kind), weight.to(kind)
    product: Tensor = _GroupedProduct.apply(x, weight)  # type: ignore[no-untyped-call]
    return product


def add_bias(out: Tensor, bias: Tensor | None) -> Tensor:
    """``out`` [n, m, o] plus ``bias`` [m, o], in place; ``out`` where there is none."""
    return out if bias is None else out.add_(bias)
