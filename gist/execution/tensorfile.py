"""Safetensors files of any size: written, read and copied without a second copy in memory.

The format: eight bytes, the length of the header; the header, JSON that says dtype, shape and place
of each tensor, padded with blanks; the raw data, without gaps.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gist.errors import CheckpointError

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What the format calls each dtype."""

_PAGE = 4096
_COPY_BYTES = 2**27
_NO_COPY_IN_KERNEL = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


@dataclass(frozen=True, kw_only=True)
class TensorPlace:
    """One tensor in a file.

    Attributes:
        dtype: Of its entries.
        shape: Its shape.
        offset: Where its data begins, in bytes from the start of the file.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class FileLayout:
    """Where each tensor lies in a file.

    The data begins at a whole page, and the tensors follow each other by the largest power of two
    that divides their size, descending: each then begins at a multiple of its own, so that entries
    are aligned, and rows of wide matrices begin at whole pages.

    Attributes:
        header: The bytes before the data.
        places: The tensors by name, in the order of the file.
        nbytes: Size of the file.
    """

    header: bytes
    places: Mapping[str, TensorPlace]
    nbytes: int

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> FileLayout:
        """The layout of a file with these tensors; only shapes and dtypes are looked at.

        Raises:
            CheckpointError: a dtype that the format does not know; names the tensors.
        """
        if unknown := [name for name, t in tensors.items() if t.dtype not in DTYPES]:
            raise CheckpointError(
                "safetensors has no such dtype",
                got=", ".join(f"{name} of {tensors[name].dtype}" for name in unknown[:5]),
                expected=", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES),
            )
        sizes = {name: t.numel() * t.element_size() for name, t in tensors.items()}
        order = sorted(tensors, key=lambda name: (-(sizes[name] & -sizes[name]), name))
        header: dict[str, object] = {}
        begins, begin = {}, 0
        for name in order:
            begins[name] = begin
            header[name] = {
                "dtype": DTYPES[tensors[name].dtype],
                "shape": list(tensors[name].shape),
                "data_offsets": [begin, begin + sizes[name]],
            }
            begin += sizes[name]
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % _PAGE)
        start = 8 + len(text)
        places = {
            name: TensorPlace(
                dtype=tensors[name].dtype,
                shape=tuple(tensors[name].shape),
                offset=start + begins[name],
            )
            for name in order
        }
        return cls(
            header=len(text).to_bytes(8, "little") + text, places=places, nbytes=start + begin
        )


@contextlib.contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write a file under, which becomes ``path`` when all went well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a new file, one tensor after the other.

    Raises:
        CheckpointError: a dtype that the format does not know.
        OSError: the file exists, or cannot be written.
    """
    layout = FileLayout.of(tensors)
    with path.open("xb", buffering=0) as file:
        _write(file.fileno(), layout.header, 0)
        for name, place in layout.places.items():
            _write(file.fileno(), bytes_of(tensors[name].detach().cpu().contiguous()), place.offset)


def read_tensors(path: Path, into: Mapping[str, Tensor]) -> None:
    """Fills tensors from a file that must hold tensors of these names and shapes.

    Args:
        path: A safetensors file.
        into: What is filled, in place; another dtype is converted to.

    Raises:
        CheckpointError: the file is missing or damaged, or holds others, in which case nothing is
            filled; names them.
    """
    try:
        with safe_open(path, "pt") as file:
            got = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            _require_same(path, got, {name: tuple(t.shape) for name, t in into.items()})
            with torch.no_grad():
                for name, tensor in into.items():
                    tensor.copy_(file.get_tensor(name))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read", got=error) from error


def _require_same(
    path: Path, got: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    if differ := sorted(dict(got.items() ^ expected.items())):
        raise CheckpointError(
            f"{path} is of another model",
            got=", ".join(f"{name} {got.get(name, 'missing')}" for name in differ[:5]),
            expected=", ".join(f"{name} {expected.get(name, 'none')}" for name in differ[:5]),
            remedy="build the model with the arguments that it was trained with",
        )


def copy_file(source: Path, target: Path) -> None:
    """Copies a file in the kernel; file systems that can do so let both share their blocks.

    Raises:
        OSError: ``target`` exists, or cannot be written.
    """
    with source.open("rb") as old, target.open("xb") as new:
        size, at = os.fstat(old.fileno()).st_size, 0
        with contextlib.suppress(AttributeError):  # not Linux
            while at < size:
                length = min(size - at, _COPY_BYTES)
                try:
                    at += os.copy_file_range(old.fileno(), new.fileno(), length, at, at)
                except OSError as error:
                    if error.errno not in _NO_COPY_IN_KERNEL:
                        raise
                    break
        if at < size:
            old.seek(at)
            new.seek(at)
            shutil.copyfileobj(old, new, _COPY_BYTES)


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _write(file: int, data: bytes | memoryview, offset: int) -> None:
    done = 0
    while done < len(data):  # one call writes 2 GiB at most
        done += os.pwrite(file, memoryview(data)[done:], offset + done)
