"""How fast a worker is."""

from __future__ import annotations

import time

import torch

_SIZE = 1024
_REPEATS = 5


def measure_speed(device: torch.device) -> float:
    """Products of 1,024 x 1,024 matrices per second: the fastest of a few, as a step is made of."""
    left = torch.randn(_SIZE, _SIZE, generator=torch.Generator().manual_seed(0)).to(device)
    best = float("inf")
    for _ in range(_REPEATS):
        start = time.perf_counter()
        product = left @ left
        float(product[0, 0])  # waits for a GPU
        best = min(best, time.perf_counter() - start)
    return 1.0 / best
