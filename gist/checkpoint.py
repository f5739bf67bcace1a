"""Checkpoints: safetensors and JSON, no pickle; complete or not there at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gist.errors import CheckpointError
from gist.execution.comm import Comm

FORMAT = 1
_KEEP = 2
_UNFINISHED = ".writing-"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A sound checkpoint: what a run needs in order to go on.

    Attributes:
        folder: Where its files are.
        state: JSON values: round, history, settings, fingerprints.
    """

    folder: Path
    state: dict[str, Any]

    def files(self, name: str) -> list[Path]:
        """The safetensors files of a set of tensors, such as ``model``: one, or each rank's."""
        whole = self.folder / f"{name}.safetensors"
        return [whole] if whole.exists() else sorted(self.folder.glob(f"{name}-*-of-*.safetensors"))


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file under a temporary name, then renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def save_checkpoint(
    folder: Path,
    round: int,
    *,
    files: Mapping[str, Callable[[Path], object]],
    state: Mapping[str, Any],
    nbytes: int = 0,
    comm: Comm | None = None,
) -> Path:
    """Writes ``folder/round-NNNNNN``; the two newest are kept.

    The directory gets its name only when every file in it is complete, and a manifest holds each
    file's size and SHA-256, so that a write cut short is never taken for a checkpoint. Of several
    ranks each writes files of its own, into one directory that all of them see.

    Args:
        folder: Where the checkpoints are.
        round: Rounds done.
        files: For each set of tensors, what writes its safetensors file to a path.
        state: JSON values.
        nbytes: What the files of all ranks take on the disk, where that may be more than there is
            room for; the older of two checkpoints then makes room first.
        comm: The ranks; all of them take part.

    Raises:
        CheckpointError: there is no room, or a rank cannot write; nothing was written.
    """
    comm = comm or Comm()
    target = folder / f"round-{round:06d}"

    def prepare() -> str:
        folder.mkdir(parents=True, exist_ok=True)
        _make_room(folder, nbytes)
        return tempfile.mkdtemp(dir=folder, prefix=_UNFINISHED)

    temporary = Path(comm.on_main(prepare))
    try:
        written, failed = {}, None
        try:
            for name, write in files.items():
                file = temporary / f"{name}{_suffix(comm)}.safetensors"
                write(file)
                _sync(file)
                written[file.name] = _identify(file)
        except Exception as error:
            if comm.size == 1:
                raise
            failed = f"rank {comm.rank}: {type(error).__name__}: {error}"
        parts = comm.gather_values([written, failed])
        if failures := [failure for _, failure in parts if failure]:
            raise CheckpointError(
                "a rank could not write its part of a checkpoint",
                got="; ".join(failures),
                remedy="out must be one folder that all workers can write to",
            )

        def complete() -> None:
            (temporary / "state.json").write_text(json.dumps(state))
            _sync(temporary / "state.json")
            identities = {name: each for part, _ in parts for name, each in part.items()}
            identities["state.json"] = _identify(temporary / "state.json")
            if lost := [name for name in identities if not (temporary / name).exists()]:
                raise CheckpointError(
                    "parts of a checkpoint are not where rank 0 looks for them",
                    got=f"no {lost[0]} in {temporary}",
                    remedy="out must be one folder that all workers see",
                )
            manifest = {"format": FORMAT, "files": identities}
            write_atomically(temporary / "manifest.json", json.dumps(manifest, indent=1))
            _sync(temporary)
            if target.exists():
                os.replace(target, folder / f"{_UNFINISHED}{target.name}")
            os.replace(temporary, target)
            _sync(folder)
            shutil.rmtree(folder / f"{_UNFINISHED}{target.name}", ignore_errors=True)
            _drop_all_but(_KEEP - 1, [path for path in _checkpoints(folder) if path != target])

        comm.on_main(complete)
    finally:
        if comm.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
    return target


def _sync(path: Path) -> None:
    """Returns when a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _suffix(comm: Comm) -> str:
    return f"-{comm.rank + 1:05d}-of-{comm.size:05d}" if comm.is_distributed else ""


def _make_room(folder: Path, nbytes: int) -> None:
    for unfinished in folder.glob(f"{_UNFINISHED}*"):  # of a run that was killed
        shutil.rmtree(unfinished)
    for keep in (_KEEP, _KEEP - 1):
        _drop_all_but(keep, _checkpoints(folder))
        free = shutil.disk_usage(folder).free
        if free >= nbytes:
            return
    raise CheckpointError(
        "the disk has no room for a checkpoint",
        got=f"{free:,} bytes free in {folder}",
        expected=f"{nbytes:,}",
        remedy="make room, and go on from the last one with resume=...",
    )


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("round-*"))


def _drop_all_but(keep: int, checkpoints: list[Path]) -> None:
    for old in checkpoints[: max(0, len(checkpoints) - keep)]:
        shutil.rmtree(old)


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint, or the newest sound one below a run's directory.

    Args:
        path: ``.../round-NNNNNN``, the ``checkpoints`` folder around it, or the run's directory.

    Raises:
        CheckpointError: there is none, or every one is damaged; names the file and the damage.
    """
    if (path / "manifest.json").exists():
        return _read(path)
    found = sorted([*path.glob("round-*"), *path.glob("checkpoints/round-*")], reverse=True)
    damage: list[str] = []
    for folder in found:
        try:
            return _read(folder)
        except CheckpointError as error:
            damage.append(str(error))
    raise CheckpointError(
        f"no usable checkpoint in {path}",
        got="; ".join(damage) or "no round-* directory",
        remedy="train with checkpoint_every=... and out=..., or start without resume",
    )


def _read(folder: Path) -> Checkpoint:
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if manifest["format"] != FORMAT:
            raise CheckpointError(
                f"{folder} has another format", got=manifest["format"], expected=FORMAT
            )
        for name, identity in manifest["files"].items():
            if _identify(folder / name) != identity:
                raise CheckpointError(
                    f"{folder / name} is damaged: its size or checksum is not the one written",
                    remedy="use an earlier checkpoint",
                )
        return open_checkpoint(folder)
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{folder} is damaged", got=str(error)) from error


def open_checkpoint(folder: Path) -> Checkpoint:
    """A checkpoint that is known to be sound."""
    return Checkpoint(folder=folder, state=json.loads((folder / "state.json").read_text()))


def _identify(file: Path) -> list[Any]:
    with file.open("rb") as stream:
        return [file.stat().st_size, hashlib.file_digest(stream, "sha256").hexdigest()]
