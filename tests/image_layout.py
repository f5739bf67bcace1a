"""Tiny image datasets in their official raw layouts: IDX, CIFAR's pickles of Python 2, zips."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def idx(values: np.ndarray) -> bytes:
    """An IDX file of bytes, not compressed."""
    head = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    return head + values.tobytes()


class _Python2(pickle._Pickler):
    """Pickles bytes as Python 2 pickled its strings."""

    def _save_string(self, value: bytes) -> None:
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)
        self.memoize(value)

    dispatch = pickle._Pickler.dispatch | {bytes: _save_string}


def cifar_batch(pixels: Any, labels: Any) -> bytes:
    """A file of CIFAR-10 for Python, with the names that numpy had then."""
    stream = io.BytesIO()
    batch = {b"batch_label": b"tiny", b"labels": labels, b"data": pixels, b"filenames": [b"a.png"]}
    _Python2(stream, protocol=2).dump(batch)
    return stream.getvalue().replace(b"numpy._core.", b"numpy.core.")


def write_cifar_archive(
    file: Path, batches: Mapping[str, tuple[np.ndarray, Sequence[int]]]
) -> None:
    """The official archive, with batches by name."""
    with tarfile.open(file, "w:gz") as archive:
        for name, (pixels, labels) in batches.items():
            content = cifar_batch(pixels, list(labels))
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def jpeg(pixels: np.ndarray) -> bytes:
    """An image ``[H, W, 3]`` as a JPEG file."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def write_class_zip(file: Path, images: Mapping[str, np.ndarray]) -> None:
    """An archive with images ``[N, H, W, 3]`` of each class, as ``class/0000.jpg``."""
    with zipfile.ZipFile(file, "w") as archive:
        for label, pixels in images.items():
            for i, image in enumerate(pixels):
                archive.writestr(f"{label}/{i:04}.jpg", jpeg(image))
