"""Counts what operations on tensors take: live bytes, and floating-point operations.

Shape legend: ``E`` stored entries or edges, ``d`` feature columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.flop_counter import flop_registry

from gist.graph.live_bytes import LiveBytes

aten = torch.ops.aten


def without_memory() -> FakeTensorMode:
    """Tensors that are made under this mode have shape, dtype and device, but no memory.

    What is computed with them is of their kind, by PyTorch's own rules of shapes; autograd,
    optimisers and custom functions run as they are. Real tensors that meet them count as shapes.
    """
    return FakeTensorMode(allow_non_fake_inputs=True)


class Tally(LiveBytes):  # type: ignore[no-untyped-call]  # torch is untyped here
    """Live bytes of tensors, with or without memory, and the floating-point operations on them.

    Operations are those of dense products (what :mod:`torch.utils.flop_counter` knows), and ``2 d``
    for each edge of a product with a graph, be it by a sparse matrix or by gathering and scattering
    messages, or for each entry of a bag of features. All else is work of a lower order.

    A mask without memory is taken to choose everything: the most that it can. A convolution is
    taken to lay out what it reads and writes anew while it runs, as oneDNN does: at the peak that
    is as much as the larger of input and output, and in the backward pass twice that.

    Attributes:
        flops: So far.
        decides: What a condition on values without memory is taken for; None refuses it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.decides: bool | None = None

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Runs an operation and counts it."""
        kwargs = dict(kwargs or {})
        packet = func.overloadpacket
        if args and isinstance(args[0], FakeTensor):
            if packet is aten._local_scalar_dense and self.decides is not None:
                return self.decides
            if packet in _CHOOSING:
                func, args, kwargs = _CHOOSING[packet](func, args, kwargs)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        self.flops += flops_of(packet, args, kwargs, out)
        if packet in _LAID_OUT_ANEW:
            self.peak = max(self.peak, self.bytes + _LAID_OUT_ANEW[packet](out, *args))
        return out


def flops_of(packet: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> int:
    """Floating-point operations of one call of an ATen operation, as :class:`Tally` counts them."""
    packet = _IN_PLACE.get(packet, packet)
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=out))
    if packet in _PER_EDGE:
        return 2 * _PER_EDGE[packet](*args)
    return 0


_IN_PLACE = {aten.addmm_: aten.addmm, aten.baddbmm_: aten.baddbmm}
"""Products that PyTorch's registry knows by another name alone."""

_Call = tuple[Any, tuple[Any, ...], dict[str, Any]]


def _every_entry(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
    indices: list[Tensor | None] = []
    for index in args[1]:
        if index is None or index.dtype not in (torch.bool, torch.uint8):
            indices.append(index)
        else:
            indices += [index.new_empty(index.numel(), dtype=torch.int64)] * index.dim()
    return func, (args[0], indices, *args[2:]), kwargs


def _every_position(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
    size = (args[0].numel(), args[0].dim())
    return aten.new_empty.default, (args[0], size), {"dtype": torch.int64}


def _every_element(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
    return aten.new_empty.default, (args[0], (args[0].numel(),)), {}


_CHOOSING: dict[Any, Callable[[Any, tuple[Any, ...], dict[str, Any]], _Call]] = {
    aten.index: _every_entry,
    aten.index_put: _every_entry,
    aten.index_put_: _every_entry,
    aten.nonzero: _every_position,
    aten.masked_select: _every_element,
}
"""Operations whose result has a size that depends on values."""


def _scattered(out: Tensor, dim: int, index: Tensor, source: Any, *rest: Any) -> int:
    return math.prod((source if isinstance(source, Tensor) else index).shape)


def _looked_up(table: Tensor, indices: Tensor, *rest: Any) -> int:
    return indices.numel() * table.size(1)  # the gradient of the sums is as wide as the table


_PER_EDGE: dict[Any, Callable[..., int]] = {
    aten._embedding_bag: _looked_up,
    aten._embedding_bag_backward: _looked_up,
    aten._embedding_bag_dense_backward: _looked_up,
    aten.scatter_add: _scattered,
    aten.scatter_add_: _scattered,
    aten.scatter_reduce: _scattered,
    aten.scatter_reduce_: _scattered,
    aten.index_add: _scattered,
    aten.index_add_: _scattered,
}
"""Entries of what a product with a graph or with bags sums: ``E d``."""


def _forward_layouts(out: Tensor, input: Tensor, *rest: Any) -> int:
    return max(out.nbytes, input.nbytes)


def _backward_layouts(out: Any, gradient: Tensor, input: Tensor, *rest: Any) -> int:
    return 2 * max(gradient.nbytes, input.nbytes)


_LAID_OUT_ANEW: dict[Any, Callable[..., int]] = {
    aten.convolution: _forward_layouts,
    aten.convolution_backward: _backward_layouts,
}
"""Bytes that an operation allocates and frees within its call."""
