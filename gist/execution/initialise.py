"""Models without memory (on torch's ``meta`` device): given tensors, and initialised there.

>>> with torch.device("meta"):  # at once, whatever the width
...     model = GraphSAGE(100, 65536, 47, num_layers=3)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gist.errors import ConfigError
from gist.partition.spec import model_tensors
from gist.partition.streams import seeded


def has_no_memory(model: nn.Module) -> bool:
    """Whether a model is on the ``meta`` device.

    Raises:
        ConfigError: only a part of it is; names what is not.
    """
    tensors = model_tensors(model)
    real = [name for name, tensor in tensors.items() if not tensor.is_meta]
    if real and len(real) < len(tensors):
        raise ConfigError(
            f"only a part of {type(model).__name__} is on the meta device",
            got=f"in memory: {', '.join(real[:5])}",
            remedy="build all of it under `with torch.device('meta')`, or none",
        )
    return not real


def place_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Makes these tensors a model's own; its parameters and buffers keep their identity and ties.

    Args:
        model: The model, in memory or without.
        tensors: By full name, of the shapes and dtypes of the model's; taken as they are.
    """
    for name, own in model_tensors(model).items():
        if not own.is_meta:
            own.data = tensors[name]
        elif isinstance(own, nn.Parameter):
            given = nn.Parameter(tensors[name], requires_grad=own.requires_grad)
            given.__dict__.update(own.__dict__)
            torch.utils.swap_tensors(own, given)  # type: ignore[no-untyped-call]
        else:
            torch.utils.swap_tensors(own, tensors[name].detach())  # type: ignore[no-untyped-call]


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Draws every parameter and buffer anew, by the modules' own ``reset_parameters()``.

    The outermost modules that have this method are asked, in the order of ``model.modules()``: a
    model that resets itself is asked as a whole. Modules within, whose tensors that left out, are
    asked next. The draw depends on ``seed`` alone; it is not that of building the model in memory,
    where constructors may draw more than once.

    Raises:
        ConfigError: a tensor that none of them sets; names it.
    """
    with seeded("model", seed), _Written() as written:
        for module in _outermost(model):
            module.reset_parameters()
        for module in model.modules():
            own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            if _can_reset(module) and not all(written.has(tensor) for tensor in own):
                module.reset_parameters()
    if missed := [name for name, t in model_tensors(model).items() if not written.has(t)]:
        raise ConfigError(
            f"{type(model).__name__} cannot be initialised outside its constructor: no "
            "reset_parameters() sets all of its tensors",
            got=", ".join(missed[:5]),
            remedy="build the model in memory, or give the module that owns them such a method",
        )


def _outermost(module: nn.Module) -> Iterator[Any]:
    if _can_reset(module):
        yield module
        return
    for child in module.children():
        yield from _outermost(child)


def _can_reset(module: Any) -> TypeGuard[Any]:
    return callable(getattr(module, "reset_parameters", None))


class _Written(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes whose memory operations write to; sees through ``.data``, views and slices."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._addresses: set[int] = set()

    def has(self, tensor: Tensor) -> bool:
        """Whether anything was written to a tensor, or there is nothing to write."""
        return not tensor.numel() or _address(tensor) in self._addresses

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func._schema.is_mutable:
            kwargs = kwargs or {}
            for argument, value in zip(func._schema.arguments, args, strict=False):
                self._note(argument, value)
            for argument in func._schema.arguments:
                self._note(argument, kwargs.get(argument.name))
        return func(*args, **(kwargs or {}))

    def _note(self, argument: Any, value: Any) -> None:
        written = argument.alias_info is not None and argument.alias_info.is_write
        if written and isinstance(value, Tensor):
            self._addresses.add(_address(value))


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
