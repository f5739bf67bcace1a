"""Dropout whose random numbers do not take most of a training step on a CPU.

PyTorch draws one Bernoulli number per element, on one thread. Here eight or four elements share a
64-bit word of the same generator, and the mask is compared, widened and multiplied in blocks that
stay in the cache. The drop probability is exact where it is a multiple of 1/256, and within
1/65536 elsewhere; the scale belongs to the probability that is really used, so that the
expectation of the output is the input, exactly.

The mask depends on the generator's state and the shape alone: not on threads, dtype or strides.

Shape legend: ``n`` nodes, ``m`` stacked subnets, ``k`` features of one subnet.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from gist.graph.rowwise import register_row_wise
from gist.partition.grouped.grouping import Grouping
from gist.partition.rules.registry import register_rule
from gist.partition.rules.torch import ElementwiseRule
from gist.partition.streams import each_generator

_BLOCK = 1 << 19
"""Elements that are worked on at a time, at least: their scratch memory stays in the cache."""

_GRAIN = 1 << 15
"""Elements that PyTorch gives a thread, at least."""


def dropout(
    x: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generators: Sequence[Generator] | None = None,
) -> Tensor:
    """Zeroes elements with probability ``p`` and scales the others, so that the mean is kept.

    On the CPU, differentiable any number of times; one byte per element is kept for the backward
    pass. On other devices, and while PyTorch compiles, it is
    :func:`torch.nn.functional.dropout`, which draws from the global generator alone.

    Args:
        x: Any shape, strides and floating-point dtype; ``[n, m, ...]`` with ``generators``.
        p: Probability to be zeroed, in [0, 1].
        training: False returns ``x``.
        inplace: Overwrites ``x``.
        generators: One per stacked subnet; PyTorch's default generator where None. Subnet ``i``,
            ``x[:, i]``, gets the bits that a call on it alone would draw from the default generator
            in the state of ``generators[i]``, which is left in the same state afterwards.

    Returns:
        A tensor like ``x``.

    Raises:
        ValueError: ``p`` is no probability.
    """
    drawn = training and 0 < p < 1 and x.numel() > 0 and x.is_floating_point()
    if not drawn or x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p, training, inplace)
    threshold, bits = _threshold(1 - p)
    mask = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    if generators is None:
        _draw(mask.view(-1, 1, 1), threshold, bits, [None])
    else:
        _draw(mask.view(x.size(0), len(generators), -1), threshold, bits, generators)
    return _masked(x, mask, 2**bits / threshold, inplace)


@register_row_wise
class Dropout(nn.Dropout):
    """:class:`torch.nn.Dropout` by :func:`dropout`: the same distribution, other random numbers.

    Args:
        p: Probability to be zeroed, in [0, 1].
        inplace: Overwrites the input.

    Shapes:
        Any -> the same.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Applies dropout while training; the identity in evaluation mode."""
        return dropout(input, self.p, self.training, self.inplace)


class GroupedDropout(nn.Module):
    """Dropout of m subnets side by side, each with the mask that it would draw on its own.

    Where :func:`~gist.partition.streams.seeded_each` gives no generators, all draw from PyTorch's
    default generator.
    """

    def __init__(self, p: float, num_subnets: int) -> None:
        super().__init__()
        self.p, self.num_subnets = p, num_subnets

    def forward(self, x: Tensor) -> Tensor:
        """``[n, m, k]``, or ``[n, k]`` that all subnets share -> ``[n, m, k]``."""
        if not self.training or self.p == 0:
            return x
        if x.dim() == 2:
            x = x.unsqueeze(1).expand(-1, self.num_subnets, -1)
        return dropout(x, self.p, generators=each_generator())

    def extra_repr(self) -> str:
        """Settings, for printing."""
        return f"p={self.p}, num_subnets={self.num_subnets}"


@register_rule(Dropout)
class DropoutRule(ElementwiseRule):
    """Hands its input on; the subnets of a group draw their masks apart."""

    def grouped(self, module: Any, grouping: Grouping) -> nn.Module:
        """See :meth:`~gist.partition.rules.registry.Rule.grouped`."""
        return GroupedDropout(module.p, grouping.num_subnets)


def _threshold(keep: float) -> tuple[int, int]:
    """``(t, bits)``: an element stays where ``bits`` random bits, as a number, are below ``t``."""
    bits = 8 if (keep * 256).is_integer() else 16
    return min(max(round(keep * 2**bits), 1), 2**bits - 1), bits


def _draw(mask: Tensor, threshold: int, bits: int, generators: Sequence[Generator | None]) -> None:
    """Fills a contiguous ``mask`` [n, m, k] with 0 and 1; row by row, a stream per subnet."""
    n, m, k = mask.shape
    # Multiples of 8 rows use up whole words, so that blocks of any size draw the same numbers.
    rows = min(n, max(8, _block() // max(m * k, 1) // 8 * 8))
    words = torch.empty(m, _words(rows * k, bits), dtype=torch.int64, device=mask.device)
    # A comparison is fast where its result has the dtype of what is compared. 16-bit numbers are
    # read as signed: the smallest is -2^15.
    numbers = words.view(torch.uint8 if bits == 8 else torch.int16)
    below = threshold if bits == 8 else threshold - 2**15
    for start in _starts(mask, rows):
        block = mask[start : start + rows]
        size = len(block) * k
        for stream, generator in zip(words[:, : _words(size, bits)], generators, strict=True):
            stream.random_(-(2**63), None, generator=generator)
        torch.lt(numbers, below, out=numbers)
        block.copy_(numbers[:, :size].view(m, -1, k).transpose(0, 1))


class _Masked(torch.autograd.Function):
    """``x * mask * scale``, linear in ``x``: its backward is itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, scale: float, inplace: bool) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.scale = scale
        if inplace:
            ctx.mark_dirty(x)
        out = x if inplace else torch.empty_like(x)
        if x.is_contiguous() and out.is_contiguous():
            _multiply(x.view(-1), mask.view(-1), scale, out.view(-1))
        else:
            _multiply(x, mask, scale, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (mask,) = ctx.saved_tensors
        return _masked(grad_outputs[0], mask, ctx.scale, False), None, None, None


def _masked(x: Tensor, mask: Tensor, scale: float, inplace: bool) -> Tensor:
    out: Tensor = _Masked.apply(x, mask, scale, inplace)  # type: ignore[no-untyped-call]
    return out


def _multiply(x: Tensor, mask: Tensor, scale: float, out: Tensor) -> None:
    rows = min(x.size(0), max(1, _block() // max(math.prod(x.shape[1:]), 1)))
    factors, zero = x.new_empty((rows, *x.shape[1:])), x.new_zeros(())
    for start in _starts(out, rows):
        part = slice(start, start + rows)
        kept = mask[part]
        torch.addcmul(zero, x[part], factors[: len(kept)].copy_(kept), value=scale, out=out[part])


def _words(elements: int, bits: int) -> int:
    """64-bit words that hold the random bits of so many elements."""
    return -(-elements * bits // 64)


def _block() -> int:
    return max(_BLOCK, _GRAIN * torch.get_num_threads())


def _starts(tensor: Tensor, rows: int) -> range:
    """Where blocks of rows start. Without memory one stands for all: nothing is computed."""
    return range(0, rows if isinstance(tensor, FakeTensor) else len(tensor), max(rows, 1))
