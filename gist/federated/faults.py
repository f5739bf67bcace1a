"""Garbage that a client may send back, to see that it does no harm."""

from __future__ import annotations

from dataclasses import replace

import torch

from gist.partition.parts import Part
from gist.partition.streams import stream


def garbled(part: Part, *, seed: int, task: int) -> Part:
    """An answer with values that are no numbers, of another shape, or with a tensor missing.

    Args:
        part: The answer as it should be; left as it is.
        seed: Of the run.
        task: Number of the task.
    """
    generator = stream("garbage", seed, task)
    tensors = dict(part.tensors)
    floats = [name for name in sorted(tensors) if tensors[name].is_floating_point()]
    name = floats[int(torch.randint(len(floats), (), generator=generator))]
    kind = int(torch.randint(3, (), generator=generator))
    if kind == 0:
        tensors[name] = tensors[name] * float("nan")
    elif kind == 1:
        tensors[name] = tensors[name].flatten()[:-1]
    else:
        del tensors[name]
    return replace(part, tensors=tensors)
