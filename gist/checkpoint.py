"""Checkpoints: safetensors and JSON, no pickle; complete or not there at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gist.errors import CheckpointError

FORMAT = 1
_KEEP = 2


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a run needs in order to go on.

    Attributes:
        tensors: Named sets of tensors, such as ``model``, ``best``, ``optimizer``.
        state: JSON values: round, history, settings, fingerprints.
    """

    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


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


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file under a temporary name, then renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, temporary)
        temporary.chmod(0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_tensors(path: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Reads a safetensors file that must hold tensors of these names and shapes.

    Raises:
        CheckpointError: it is missing, damaged, or holds others; names them.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read", got=error) from error
    got = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in like.items()}
    differ = sorted(dict(got.items() ^ expected.items()))
    if differ:
        raise CheckpointError(
            f"{path} is of another model",
            got=", ".join(f"{name} {got.get(name, 'missing')}" for name in differ[:5]),
            expected=", ".join(f"{name} {expected.get(name, 'none')}" for name in differ[:5]),
            remedy="build the model with the arguments that it was trained with",
        )
    return tensors


def save_checkpoint(folder: Path, round: int, checkpoint: Checkpoint) -> Path:
    """Writes ``folder/round-NNNNNN``; the two newest are kept.

    The directory gets its name only when every file in it is complete, and a manifest holds each
    file's size and SHA-256, so that a write cut short is never taken for a checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"round-{round:06d}"
    temporary = Path(tempfile.mkdtemp(dir=folder, prefix=".writing-"))
    try:
        for name, tensors in checkpoint.tensors.items():
            save_tensors(temporary / f"{name}.safetensors", tensors)
        (temporary / "state.json").write_text(json.dumps(checkpoint.state))
        manifest = {
            "format": FORMAT,
            "files": {file.name: _identify(file) for file in sorted(temporary.iterdir())},
        }
        write_atomically(temporary / "manifest.json", json.dumps(manifest, indent=1))
        if target.exists():
            shutil.rmtree(target)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    others = sorted(path for path in folder.glob("round-*") if path != target)
    for old in others[: 1 - _KEEP]:
        shutil.rmtree(old)
    return target


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
        tensors = {
            Path(name).stem: load_file(folder / name)
            for name in manifest["files"]
            if name.endswith(".safetensors")
        }
        return Checkpoint(tensors=tensors, state=json.loads((folder / "state.json").read_text()))
    except (OSError, KeyError, TypeError, json.JSONDecodeError, SafetensorError) as error:
        raise CheckpointError(f"{folder} is damaged", got=str(error)) from error


def _identify(file: Path) -> list[Any]:
    with file.open("rb") as stream:
        return [file.stat().st_size, hashlib.file_digest(stream, "sha256").hexdigest()]
