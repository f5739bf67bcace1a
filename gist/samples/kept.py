"""Arrays that took long to make of raw samples, kept: the next time they are mapped into memory.

They lie in ``processed/NAME-KEY/`` of a data folder, each as a ``.npy`` file. The key is a digest
of the raw files, so that what was made of other ones is never taken for them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gist.catalog.places import data_folders
from gist.catalog.writing import alone_in, may_write

_FORMAT = 1
"""Raised when raw files are read in another way, so that what was made of them is made again."""


def kept_arrays(
    name: str,
    root: str | Path | None,
    source: Mapping[str, str],
    arrays: Collection[str],
    write: Callable[[Path], None],
) -> dict[str, Tensor]:
    """Arrays of a dataset: those that were kept, else made now and kept where that is possible.

    Args:
        name: Of the dataset.
        root: As for :func:`gist.load_dataset`.
        source: What tells the raw files from any others: their digests by name.
        arrays: Names of the arrays.
        write: Makes them, in a new folder, each as ``NAME.npy``.

    Returns:
        Tensors by name; changes in place do not reach the files.
    """
    described = json.dumps([_FORMAT, name, sorted(source.items())])
    key = hashlib.sha256(described.encode()).hexdigest()[:16]
    places = [folder / "processed" / f"{name}-{key}" for folder in data_folders(root)]
    for place in places:
        if (found := _read(place, arrays)) is not None:
            return found
    place = places[-1]
    if not may_write(place):
        with tempfile.TemporaryDirectory(prefix="gist-") as folder:
            write(Path(folder))
            return _mapped(Path(folder), arrays)  # a mapped file lives on until it is let go
    with alone_in(place.parent):
        if (found := _read(place, arrays)) is not None:  # another process was first
            return found
        new = place.with_name(f".{place.name}-{os.getpid()}")
        new.mkdir(exist_ok=True)
        try:
            write(new)
            if place.exists():  # damaged
                shutil.rmtree(place)
            new.rename(place)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    return _mapped(place, arrays)


def _read(place: Path, arrays: Collection[str]) -> dict[str, Tensor] | None:
    """The arrays in a folder; None where one is missing or damaged."""
    try:
        return _mapped(place, arrays)
    except (OSError, ValueError, EOFError):
        return None


def _mapped(place: Path, arrays: Collection[str]) -> dict[str, Tensor]:
    opened = {array: np.load(place / f"{array}.npy", mmap_mode="c") for array in arrays}
    return {array: torch.from_numpy(values) for array, values in opened.items()}
