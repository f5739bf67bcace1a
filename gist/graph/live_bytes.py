"""How many bytes of tensors an operation keeps alive at once: counted, not guessed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that PyTorch operations create inside it, for as long as they live.

    >>> with LiveBytes() as live:
    ...     model(x)
    >>> live.peak

    Not counted: storages that were there before, files mapped into memory, sparse tensors, and what
    a kernel allocates and frees within one call.

    Attributes:
        bytes: Alive now.
        peak: The most that were alive at once.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = self.peak = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.from_file.default:
            return out
        known = {id(storage) for storage in _storages((args, kwargs))}
        for storage in _storages(out):
            if id(storage) not in known and id(storage) not in self._alive:
                self._add(storage)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()

        def forget(_: object) -> None:
            self.bytes -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, forget)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)


def _storages(values: Any) -> list[torch.UntypedStorage]:
    dense = (v for v in tree_leaves(values) if isinstance(v, Tensor) and v.layout == torch.strided)
    return [tensor.untyped_storage() for tensor in dense]


def linear_bytes(trial: Callable[[int], object], size: int) -> tuple[int, int]:
    """Peak bytes of an operation that takes ``fixed + each * size``, its result included.

    Args:
        trial: Runs the operation at a given size; it is run twice.
        size: Of the smaller trial; the other is twice that.

    Returns:
        ``(fixed, each)``.
    """
    peaks = []
    for count in (size, 2 * size):
        with LiveBytes() as live:
            trial(count)
        peaks.append(live.peak)
    each = -(-(peaks[1] - peaks[0]) // size)
    return max(peaks[0] - each * size, 0), each
