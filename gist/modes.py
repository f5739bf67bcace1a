"""Training and evaluation modes, left as they were found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def keeps_modes(model: nn.Module) -> Iterator[None]:
    """Restores the mode of every module of ``model`` on leaving, whatever happened to them."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
