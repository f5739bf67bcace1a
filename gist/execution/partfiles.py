"""Tensors spread over several safetensors files: each rank writes its rows, anyone reads them.

A file holds, for each tensor, some rows along the first dim that units index
(:class:`~gist.execution.shards.Home`), and under ``NAME@rows`` which these are. A file without such
names holds whole tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gist.errors import CheckpointError
from gist.execution.shards import Home
from gist.execution.tensorfile import read_tensors
from gist.partition.spec import PartitionSpec

_ROWS = "@rows"


def with_rows(
    tensors: Mapping[str, Tensor], rows: Mapping[str, Tensor | None]
) -> dict[str, Tensor]:
    """What a rank writes: its tensors, and which rows they are."""
    named = {f"{name}{_ROWS}": each for name, each in rows.items() if each is not None}
    return {**tensors, **named}


def tensor_names(paths: Sequence[Path]) -> list[str]:
    """Names of the tensors in files.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    found: set[str] = set()
    for path in paths:
        try:
            with safe_open(path, "pt") as file:
                found |= {name for name in file.keys() if not name.endswith(_ROWS)}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read", got=error) from error
    return sorted(found)


def read_whole(paths: Sequence[Path], into: Mapping[str, Tensor], spec: PartitionSpec) -> None:
    """Fills whole tensors from one file or several.

    Raises:
        CheckpointError: a file is missing or damaged, or of other tensors; names them.
    """
    homes = {name: Home.of(spec.layouts[name]) for name in into}
    if len(paths) == 1 and not _is_part(paths[0]):
        read_tensors(paths[0], into)
        return
    views = {n: t.unsqueeze(0) if (h := homes[n]) and h.of_unit else t for n, t in into.items()}
    rows = {name: None if home is None else torch.arange(home.size) for name, home in homes.items()}
    read_rows(paths, views, homes, rows)


def _is_part(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as file:
            return any(name.endswith(_ROWS) for name in file.keys())  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read", got=error) from error


@torch.no_grad()
def read_rows(
    paths: Sequence[Path],
    into: Mapping[str, Tensor],
    homes: Mapping[str, Home | None],
    rows: Mapping[str, Tensor | None],
) -> None:
    """Fills rows of tensors from one file or several, whoever wrote which.

    Args:
        paths: The files.
        into: What is filled, in place, by name.
        homes: Along which dim each is spread; None for one without rows.
        rows: Which rows of each are in ``into``, ascending; None for one without rows.

    Raises:
        CheckpointError: a file is missing or damaged, or they hold other tensors, or not all rows;
            names them.
    """
    if differ := sorted(set(tensor_names(paths)) ^ set(into)):
        raise CheckpointError(
            f"{paths[0].parent} is of another model",
            got=", ".join(f"{n} {'missing' if n in into else 'there'}" for n in differ[:5]),
            remedy="build the model with the arguments that it was trained with",
        )
    missing = {
        name: torch.ones(t.numel(), dtype=torch.bool) for name, t in rows.items() if t is not None
    }
    for path in paths:
        try:
            with safe_open(path, "pt") as file:
                keys = set(file.keys())
                for name in keys & set(into):
                    there = file.get_tensor(name + _ROWS) if name + _ROWS in keys else None
                    _take(path, file.get_tensor(name), there, into[name], homes[name], rows[name])
                    if name in missing:
                        missing[name] &= ~_found(there, homes[name], rows[name])
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read", got=error) from error
    if lacking := [name for name, each in missing.items() if bool(each.any())]:
        raise CheckpointError(
            f"{paths[0].parent} does not hold all of the model",
            got=f"parts of {lacking[0]} missing",
        )


def _found(there: Tensor | None, home: Home | None, wanted: Tensor | None) -> Tensor:
    assert home is not None
    assert wanted is not None
    return torch.ones_like(wanted, dtype=torch.bool) if there is None else torch.isin(wanted, there)


def _take(
    path: Path,
    tensor: Tensor,
    there: Tensor | None,
    into: Tensor,
    home: Home | None,
    wanted: Tensor | None,
) -> None:
    if home is None or wanted is None:
        _require_shape(path, tensor.shape, into.shape)
        into.copy_(tensor)
        return
    if there is None:
        there = torch.arange(home.size)
        tensor = tensor.unsqueeze(0) if home.of_unit else tensor
    same = [*into.shape]
    same[home.dim] = there.numel()
    _require_shape(path, tensor.shape, torch.Size(same))
    place = torch.full((home.size,), -1)
    place[wanted] = torch.arange(wanted.numel())
    at = place[there]
    kept = (at >= 0).nonzero()[:, 0]
    part = tensor if kept.numel() == there.numel() else tensor.index_select(home.dim, kept)
    into.index_copy_(home.dim, at[kept].to(into.device), part.to(into))


def _require_shape(path: Path, got: torch.Size, expected: torch.Size) -> None:
    if got != expected:
        raise CheckpointError(
            f"{path} is of another model", got=tuple(got), expected=tuple(expected)
        )
