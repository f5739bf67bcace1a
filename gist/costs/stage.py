"""Where runs are rehearsed: on tensors without memory, by their own code, which is counted."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from gist.costs.tally import Tally, without_memory
from gist.partition.rules.registry import without_caches
from gist.partition.spec import model_tensors


class Stage:
    """Where a run is rehearsed: everything that is made on it is counted.

    Attributes:
        tally: What is alive on the stage.
        device: The device that its tensors seem to be on.
    """

    def __init__(self, device: torch.device) -> None:
        self.tally = Tally()
        self.device = device
        self._mode = without_memory()

    @contextmanager
    def computing(self) -> Iterator[None]:
        """All tensors that are made are without memory: those of models, data and steps."""
        with _disable_current_modes(), _Copying(), self._mode, self.tally:
            yield

    @contextmanager
    def arranging(self) -> Iterator[None]:
        """Tensors made of such without memory are so too; others, as indices of units, are real."""
        before, self.tally.decides = self.tally.decides, False
        try:
            with _Copying(), self.tally:
                yield
        finally:
            self.tally.decides = before

    @contextmanager
    def peak(self, peaks: dict[str, int], name: str) -> Iterator[None]:
        """Raises ``peaks[name]`` to the most that is alive inside; apart from inner peaks."""
        outer = self.tally.peak
        self.tally.peak = self.tally.bytes
        try:
            yield
        finally:
            peaks[name] = max(peaks.get(name, 0), self.tally.peak)
            self.tally.peak = max(outer, self.tally.bytes)

    def outline(self, model: nn.Module) -> nn.Module:
        """A copy of a model whose tensors are without memory."""
        with self.computing(), without_caches(model):
            memo: dict[int, Any] = {}
            for tensor in model_tensors(model).values():
                new: Tensor = torch.empty_like(tensor.detach(), device=self.device)
                if isinstance(tensor, nn.Parameter):
                    new = nn.Parameter(new, requires_grad=tensor.requires_grad)
                memo[id(tensor)] = new
            return copy.deepcopy(model, memo)


class _Copying(TorchFunctionMode):
    """Copies tensors without memory, which torch's own deep copy takes for tensors with some."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.__deepcopy__ and isinstance(args[0], FakeTensor):
            tensor, memo = args
            if id(tensor) not in memo:
                new: Tensor = tensor.detach().clone()
                if isinstance(tensor, nn.Parameter):
                    new = nn.Parameter(new, requires_grad=tensor.requires_grad)
                memo[id(tensor)] = new
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))
