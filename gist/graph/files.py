"""A graph's arrays as files: one ``.npz`` archive, or a folder whose arrays are memory-mapped.

Nothing is ever unpickled. A file or folder is complete or not there: it is written under another
name beside its own, and an older one is replaced when all is on the disk.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import mmap
import os
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from gist.errors import DataError

Arrays = dict[str, np.ndarray]

ARRAYS = ("edge_index", "x", "y", "train", "val", "test")
"""What every archive holds."""

OPTIONAL_ARRAYS = ("edge_weight", "edge_attr")

SETTINGS: dict[str, type] = {
    "task": str,
    "metric": str,
    "num_classes": int,
    "directed": bool,
    "symmetrize": bool,
    "name": str,
    "float64": bool,
}
"""What else an archive may hold, each a 0-d array.

``float64`` says whether features are of double precision; all other keys, as those of the arrays,
are arguments of ``from_edges``.
"""

_FORMAT = "gist graph"
_VERSION = 1
_META = "meta.json"

_MAP_NORESERVE = 0x4000
"""Of Linux; a private mapping may be larger than memory, since hardly a page is written."""

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
"""Of Linux: paths count from the working directory; two names change places at once."""

_AGAIN = "save the graph again, or copy the whole folder again"


def write_archive(path: Path, values: Mapping[str, Any]) -> None:
    """Writes arrays and settings as they are, uncompressed.

    Raises:
        DataError: ``path`` is a folder.
    """
    if path.is_dir():
        raise DataError(
            f"{path} is a folder",
            expected="the name of a new archive, or of one to replace",
            remedy="a name without .npz saves a folder",
        )
    with _replaced(path) as new, new.open("xb") as file:
        np.savez(file, **values)
        _sync(file)


def read_archive(path: Path) -> dict[str, Any]:
    """The arrays of an archive and, as Python values, its settings.

    Raises:
        DataError: the file is not there, not complete, no archive, or holds too little, too much,
            or something else than arrays of numbers.
    """
    if not path.is_file():
        raise _not_there(path)
    if not zipfile.is_zipfile(path):
        raise DataError(
            f"{path} is not an .npz archive",
            got="another format, or an archive that was cut off",
            expected="a file that GraphData.save or numpy.savez wrote",
            remedy="write or copy it again",
        )
    with np.load(path, allow_pickle=False) as archive:
        names = set(archive.files)
        if missing := [name for name in ARRAYS if name not in names]:
            raise DataError(
                f"{path} lacks {', '.join(missing)}",
                got=", ".join(sorted(names)),
                expected=", ".join(ARRAYS),
                remedy="name the arguments: numpy.savez(path, edge_index=..., x=..., y=..., ...)",
            )
        if unknown := sorted(names.difference(ARRAYS, OPTIONAL_ARRAYS, SETTINGS)):
            raise DataError(
                f"{path} holds what is not known",
                got=", ".join(unknown),
                expected=f"besides {', '.join(ARRAYS)} at most "
                f"{', '.join((*OPTIONAL_ARRAYS, *SETTINGS))}",
                remedy="rename it, or leave it out",
            )
        return {name: _read_member(path, archive, name) for name in archive.files}


def _read_member(path: Path, archive: Any, name: str) -> Any:
    try:
        value = archive[name]
        if not isinstance(value, np.ndarray):
            raise ValueError("not an array")
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"{path}: {name} cannot be read",
            got=error,
            expected="an array of numbers, or a string or number as a setting",
            remedy="write the archive again; Python objects, such as None, are never read",
        ) from error
    if name not in SETTINGS:
        return value
    kind = SETTINGS[name]
    setting = value.item() if value.ndim == 0 else value
    if isinstance(setting, kind) or (kind is bool and setting in (0, 1)):
        return kind(setting)
    raise DataError(
        f"{path}: {name} is not a setting", got=repr(setting), expected=f"one {kind.__name__}"
    )


def write_folder(path: Path, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
    """Writes one ``.npy`` file per array, and ``meta.json`` with their layout and ``facts``.

    The layout has the SHA-256 of each file, in hex.

    Raises:
        DataError: ``path`` is there and not a folder that this function wrote.
    """
    if path.exists() and not (path.is_dir() and _is_ours(path)):
        raise DataError(
            f"{path} is there already, and is not a saved graph",
            expected="a new name, or the folder of a saved graph to replace",
            remedy="save under another name; a name that ends in .npz saves one file",
        )
    with _replaced(path) as new:
        new.mkdir()
        layout: dict[str, Any] = {}
        for name, array in arrays.items():
            with (new / f"{name}.npy").open("x+b") as file:
                np.save(file, array, allow_pickle=False)
                layout[name] = {
                    "dtype": array.dtype.str,
                    "shape": list(array.shape),
                    "bytes": _sync(file),
                    "sha256": _sha256(file),
                }
        meta = {"format": _FORMAT, "version": _VERSION, **facts, "arrays": layout}
        with (new / _META).open("x", encoding="utf-8") as text:
            json.dump(meta, text, indent=1)
            _sync(text)
        _sync_folder(new)


def read_folder(
    path: Path,
    required: Sequence[str],
    optional: Sequence[str] = (),
    *,
    facts: Mapping[str, Any],
    verify: bool = False,
    remedy: str = _AGAIN,
) -> tuple[Arrays, dict[str, Any]]:
    """The arrays of a folder, whose pages are read when they are used, and its facts.

    Changes of an array stay in memory. Of the arrays ``indptr`` alone is read: rows that are no
    rows would crash what computes with them.

    Args:
        path: The folder.
        required: The arrays that it holds, ``indptr`` and ``indices`` among them.
        optional: Arrays that it may hold.
        facts: The type of each fact, or a mapping of such types.
        verify: Read all: compare each file with its SHA-256, and look for sources that are no rows.
        remedy: For a folder that is damaged or of another version.

    Raises:
        DataError: it is not there, not one that :func:`write_folder` wrote, or of another version;
            or a file is missing or is not what was written.
    """
    while True:
        folder, wrong = _identity(path), None
        try:
            found = _read_folder(path, required, optional, facts, verify, remedy)
        except DataError as error:
            wrong = error
        if _identity(path) == folder:  # otherwise it was replaced, and these may be parts of two
            if wrong is not None:
                raise wrong
            return found


def _identity(path: Path) -> tuple[int, int] | None:
    """Tells a folder from the one that takes its place."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _read_folder(
    path: Path,
    required: Sequence[str],
    optional: Sequence[str],
    facts: Mapping[str, Any],
    verify: bool,
    remedy: str,
) -> tuple[Arrays, dict[str, Any]]:
    found = read_facts(path, remedy)
    for name, kind in {**facts, "arrays": dict}.items():
        if not _fits(found.get(name), kind):
            raise _damaged(
                path / _META,
                got=f"{found[name]!r} as {name}" if name in found else f"no {name}",
                expected=f"{name} of the graph",
                remedy=remedy,
            )
    layout = found.pop("arrays")
    if set(layout) - set(optional) != set(required):
        raise _damaged(path / _META, ", ".join(layout), ", ".join(required), remedy)
    arrays = {
        name: _mapped(path / f"{name}.npy", entry, verify, remedy) for name, entry in layout.items()
    }
    indptr, indices = arrays["indptr"], arrays["indices"]
    if indptr[0] != 0 or indptr[-1] != len(indices) or (indptr[1:] < indptr[:-1]).any():
        rising = f"offsets that rise from 0 to {len(indices)}"
        raise _damaged(path / "indptr.npy", "other numbers", rising, remedy)
    if verify and indices.size and not 0 <= indices.min() <= indices.max() < len(indptr) - 1:
        sources = f"{indices.min()} to {indices.max()}"
        raise _damaged(path / "indices.npy", sources, f"0 to {len(indptr) - 2}", remedy)
    return arrays, found


def read_facts(path: Path, remedy: str = _AGAIN) -> dict[str, Any]:
    """What ``meta.json`` of a folder says, without a look at the arrays.

    Raises:
        DataError: it is not there, not one that :func:`write_folder` wrote, or of another version.
    """
    if not path.is_dir():
        raise _not_there(path)
    file = path / _META
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        meta = None
    except ValueError as error:
        raise _damaged(file, error, "JSON", remedy) from error
    if not isinstance(meta, dict) or meta.get("format") != _FORMAT:
        raise DataError(
            f"{path} is not a saved graph",
            got=f"no {_META} of one",
            expected="a folder that GraphData.save wrote",
        )
    if meta.get("version") != _VERSION:
        raise DataError(
            f"{path} is of another version of the format",
            got=meta.get("version"),
            expected=_VERSION,
            remedy=remedy,
        )
    return meta


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a type, or a dictionary with the keys and types of a mapping."""
    if not isinstance(kind, Mapping):
        return isinstance(value, kind)
    return (
        isinstance(value, dict)
        and value.keys() == kind.keys()
        and all(_fits(value[name], kind[name]) for name in kind)
    )


def _mapped(file: Path, entry: Mapping[str, Any], verify: bool, remedy: str) -> np.ndarray:
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            np.lib.format.read_magic(stream)
            shape, by_column, dtype = np.lib.format.read_array_header_1_0(stream)
            start = stream.tell()
            memory = mmap.mmap(stream.fileno(), 0, flags=mmap.MAP_PRIVATE | _MAP_NORESERVE)
            got = {"dtype": dtype.str, "shape": list(shape), "bytes": size}
            if verify:
                got["sha256"] = _sha256(stream)
    except FileNotFoundError:
        raise _damaged(file, "no such file", entry, remedy) from None
    except ValueError as error:
        raise _damaged(file, error, entry, remedy) from error
    expected = {name: entry.get(name) for name in got}
    if got != expected or by_column:
        raise _damaged(file, got, expected, remedy)
    return np.ndarray(shape, dtype, memory, start)


def _is_ours(path: Path) -> bool:
    """Whether a folder may be replaced: it is empty, or holds a graph, of whatever version."""
    try:
        meta = json.loads((path / _META).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return not any(path.iterdir())
    return isinstance(meta, dict) and meta.get("format") == _FORMAT


@contextlib.contextmanager
def _replaced(path: Path) -> Iterator[Path]:
    """A name to write a file or folder under, which takes the place of ``path`` at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as place:
        new, old = Path(place) / "new", Path(place) / "old"
        yield new
        try:
            if not (path.is_dir() and _exchanged(new, path)):
                if path.is_dir():  # no folder can be renamed over another that holds something
                    path.rename(old)
                new.replace(path)
        except BaseException:
            if old.exists() and not path.exists():
                old.rename(path)
            raise
        _sync_folder(path.parent)


def _exchanged(one: Path, other: Path) -> bool:
    """Exchanges two names at once, where the C library and the file system can."""
    try:
        exchange = ctypes.CDLL(None).renameat2
    except AttributeError:
        return False
    names = (_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other))
    return bool(exchange(*names, _RENAME_EXCHANGE) == 0)


def _sha256(file: IO[bytes]) -> str:
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def _sync(file: IO[Any]) -> int:
    """Returns when the file is on the disk: its size in bytes."""
    file.flush()
    os.fsync(file.fileno())
    return os.fstat(file.fileno()).st_size


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _not_there(path: Path) -> DataError:
    return DataError(
        f"there is no saved graph {path}",
        got="a file of another kind" if path.is_file() else "no such file or folder",
        expected="an .npz archive, or a folder that GraphData.save wrote",
    )


def _damaged(file: Path, got: Any, expected: Any, remedy: str) -> DataError:
    return DataError(
        f"{file} is damaged: it is not what was saved",
        got=got,
        expected=expected,
        remedy=remedy,
    )
