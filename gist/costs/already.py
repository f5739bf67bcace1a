"""What of a run takes memory already, before it starts."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from gist.csr import is_csr, parts


def bytes_already(tensors: Iterable[Tensor], device: torch.device) -> int:
    """Bytes that tensors take on a device; those of a file that is mapped into memory take none.

    Where mappings cannot be listed (on other systems than Linux) all tensors count.

    Args:
        tensors: Dense ones, or sparse CSR.
        device: The device; tensors on others take none there.
    """
    dense = [part for t in tensors for part in (parts(t) if is_csr(t) else (t,))]
    here = [tensor for tensor in dense if tensor.device.type == device.type]
    files = _mapped_files() if device.type == "cpu" else []
    return sum(
        tensor.nbytes
        for tensor in here
        if not any(start <= tensor.data_ptr() < stop for start, stop in files)
    )


def _mapped_files() -> list[tuple[int, int]]:
    """Addresses at which files are mapped into this process: from, to."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    columns = [line.split(maxsplit=5) for line in lines]
    spans = [each[0].split("-") for each in columns if len(each) > 5 and each[5].startswith("/")]
    return [(int(start, 16), int(stop, 16)) for start, stop in spans]
