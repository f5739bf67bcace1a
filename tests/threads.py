"""Ranks that are threads of one process, so that many shapes are tried; see tests/workers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import Queue
from typing import Any

from torch import Tensor

Queues = list[list["Queue[Tensor]"]]
"""From each rank to each."""


def on_ranks(size: int, job: Callable[[int, Queues], Any]) -> list[Any]:
    """What each rank's job returns, given its rank and the queues between all."""
    queues: Queues = [[Queue() for _ in range(size)] for _ in range(size)]
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = job(rank, queues)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results
