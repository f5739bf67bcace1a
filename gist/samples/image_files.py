"""Files of images as arrays: IDX (MNIST), batches of CIFAR-10 in Python's pickles, zips of JPEGs.

Shape legend: ``N`` images, ``C`` channels, ``H`` and ``W`` height and width. Images are uint8
``[N, C, H, W]``, labels int64 ``[N]``.
"""

from __future__ import annotations

import gzip
import io
import math
import pickle
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gist.errors import DataError, MissingDependencyError

Pixels = NDArray[np.uint8]
Labels = NDArray[np.int64]

CIFAR_BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
"""Files of CIFAR-10 for Python, in order: those for training, and the last for testing."""

_UNSIGNED_BYTES = 8
"""Type of the entries of an IDX file."""

_REBUILD = np.empty(0).__reduce__()[0]
"""What numpy's pickles call to make an array that is filled later."""

_HARMLESS: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _REBUILD,
    ("numpy._core.multiarray", "_reconstruct"): _REBUILD,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}
"""All that a pickled batch may call, beside dicts, lists, strings and numbers."""


def read_idx(file: Path) -> Pixels:
    """The array of bytes in a file of the IDX format, compressed with gzip.

    The format, of http://yann.lecun.com/exdb/mnist/: two zeros, the type, the number of dims, each
    dim in 4 bytes, most significant first, and then the entries in row-major order.

    Raises:
        DataError: the file is cut off or none of this format.
    """
    try:
        content = gzip.decompress(file.read_bytes())
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise _unreadable(file.name, error) from error
    if len(content) < 4 or content[:3] != bytes((0, 0, _UNSIGNED_BYTES)):
        raise _unreadable(file.name, f"it begins with {content[:4].hex()}")
    start = 4 * (1 + content[3])
    shape = [int(size) for size in np.frombuffer(content[4:start], ">u4")]
    if len(shape) != content[3] or len(content) - start != math.prod(shape):
        raise _unreadable(file.name, f"{len(content):,} bytes for the shape {shape}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()


def read_cifar_archive(file: Path) -> Iterator[tuple[Pixels, Labels]]:
    """The batches in the official archive, in the order of :data:`CIFAR_BATCHES`.

    Nothing is unpacked to disk.

    Raises:
        DataError: the archive is damaged, or lacks a batch.
    """
    try:
        with tarfile.open(file) as archive:
            members = {PurePosixPath(m.name).name: m for m in archive if m.isfile()}
            for batch in CIFAR_BATCHES:
                content = archive.extractfile(members[batch]) if batch in members else None
                if content is None:
                    raise _unreadable(file.name, f"it lacks {batch}")
                yield parse_cifar_batch(f"{batch} of {file.name}", content.read())
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise _unreadable(file.name, error) from error


def parse_cifar_batch(name: str, content: bytes) -> tuple[Pixels, Labels]:
    """Images ``[N, 3, 32, 32]`` and labels of a pickled batch, of which no code is run.

    Args:
        name: Of the file, for errors.
        content: Of the file.

    Raises:
        DataError: it is no such batch, or holds anything else than arrays and plain values.
    """
    try:
        batch = _PlainUnpickler(io.BytesIO(content), encoding="bytes").load()
    except DataError:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        raise _unreadable(name, error) from error
    pixels, labels = _entries(batch)
    if pixels.dtype != np.uint8 or pixels.shape != (len(labels), 3072):
        raise _unreadable(name, "no rows of 3,072 bytes with as many labels")
    return pixels.reshape(-1, 3, 32, 32), labels


def _entries(batch: Any) -> tuple[NDArray[Any], Labels]:
    """Pixels and labels of a batch, empty where it has none."""
    found = batch if isinstance(batch, dict) else {}
    pixels, labels = found.get(b"data"), found.get(b"labels")
    sound = isinstance(labels, list) and all(type(label) is int for label in labels)
    return (
        pixels if isinstance(pixels, np.ndarray) else np.empty(0),
        np.array(labels if sound else [], np.int64),
    )


class _PlainUnpickler(pickle.Unpickler):
    """Takes arrays and plain values, and nothing that a pickle could call besides."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _HARMLESS:
            raise DataError(
                "a batch is not to be trusted: it calls what makes no array",
                got=f"{module}.{name}",
                expected="arrays, lists and strings",
                remedy="get the official file",
            )
        return _HARMLESS[module, name]


def read_class_zip(file: Path, size: tuple[int, int]) -> tuple[Pixels, Labels, list[str]]:
    """Images in a zip archive with a folder for each class, as ``airplane/0000.jpg``.

    Classes are numbered in alphabetical order, images within them by their names.

    Args:
        file: The archive.
        size: Height and width that each image must have.

    Returns:
        Images ``[N, 3, H, W]``, labels, and the names of the classes.

    Raises:
        DataError: the archive is damaged, or an image in it is, or has another size.
        MissingDependencyError: Pillow is not installed.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            names = sorted(name for name in archive.namelist() if not name.endswith("/"))
            if stray := [name for name in names if len(PurePosixPath(name).parts) != 2]:
                raise _unreadable(file.name, f"{stray[0]} in it is in no folder of a class")
            folders = [PurePosixPath(name).parts[0] for name in names]
            classes, labels = np.unique(folders, return_inverse=True)
            pixels = np.empty((len(names), 3, *size), np.uint8)
            decode = _decoder(size)
            for row, name in zip(pixels, names, strict=True):
                row[:] = decode(name, archive.read(name)).transpose(2, 0, 1)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise _unreadable(file.name, error) from error
    return pixels, labels.astype(np.int64), classes.tolist()


def _decoder(size: tuple[int, int]) -> Callable[[str, bytes], Pixels]:
    """What makes ``[H, W, 3]`` of the content of an image file."""
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingDependencyError(
            "Pillow, which reads images, is not installed", remedy="pip install pillow"
        ) from error

    def decode(name: str, content: bytes) -> Pixels:
        try:
            with Image.open(io.BytesIO(content)) as image:
                if image.size != size[::-1]:
                    got = f"{name} of {image.height} x {image.width}"
                    raise _unreadable(name, got, f"{size[0]} x {size[1]} pixels")
                return np.asarray(image.convert("RGB"))
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise _unreadable(name, error) from error

    return decode


def in_order(batches: Iterable[tuple[Pixels, Labels]]) -> tuple[Pixels, Labels]:
    """Batches, one after the other."""
    pixels, labels = zip(*batches, strict=True)
    return np.concatenate(pixels), np.concatenate(labels)


def _unreadable(name: str, got: object, expected: str | None = None) -> DataError:
    return DataError(f"cannot read {name}", got=got, expected=expected)
