"""Global random states of torch, numpy and Python, for libraries that draw from them."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


class RandomStates:
    """Global random states of torch (CPU), numpy and Python that hold only inside a ``with``.

    Args:
        seed: What all three start from; where a ``with`` ends, the next one goes on.
    """

    def __init__(self, seed: int) -> None:
        self._own: tuple[Any, ...] = (
            torch.Generator().manual_seed(seed).get_state(),
            np.random.RandomState(seed % 2**32).get_state(),
            random.Random(seed).getstate(),
        )

    def __enter__(self) -> None:
        self._swap()

    def __exit__(self, *_: Any) -> None:
        self._swap()

    def _swap(self) -> None:
        outer = (torch.get_rng_state(), np.random.get_state(), random.getstate())  # noqa: NPY002
        torch.set_rng_state(self._own[0])
        np.random.set_state(self._own[1])  # noqa: NPY002
        random.setstate(self._own[2])
        self._own = outer
