"""Run directories, read back and checked: what a report is made of."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from gist.errors import DataError
from gist.history import RoundRecord, TrainResult

_RUN_FILES = ("config.json", "history.jsonl", "result.json")
_TABLE_NUMBERS = ("val_mean", "val_std", "test_mean", "test_std", "seconds")
_TABLE_OPTIONAL = ("seeds", "speedup", "peak_memory_bytes", "num_parameters")
_TABLE_OTHER = ("method", "subnets", "parameters_per_subnet", "runs")
_Record = TypeVar("_Record", RoundRecord, TrainResult)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run directory.

    Attributes:
        name: Of the directory, or its path where names repeat.
        label: Shared by runs that differ in nothing but the seed.
        config: ``config.json``.
        result: ``result.json`` and ``history.jsonl``.
    """

    name: str
    label: str
    config: dict[str, Any]
    result: TrainResult


def read_run(folder: Path, *, name: str | None = None, label: str | None = None) -> Run:
    """Reads a run directory.

    Args:
        folder: As :class:`~gist.trainer.SubnetTrainer` wrote it, given ``out``.
        name: For tables; the folder's name by default.
        label: For figures; ``name`` by default.

    Raises:
        DataError: it is no run directory (names what is missing), or a file is damaged (names it,
            and the line of a history).
    """
    missing = [name for name in _RUN_FILES if not (folder / name).is_file()]
    if missing:
        raise DataError(
            f"{folder} is not the directory of a finished run",
            got=f"no {', '.join(missing)}" if folder.is_dir() else "no such directory",
            expected=", ".join(_RUN_FILES),
            remedy="give a directory that was written by out=... in Python or by --out",
        )
    history = read_history(folder / "history.jsonl")
    path = folder / "result.json"
    values = _read_object(path, ("best", "parameters_per_subnet"))
    best = _record(RoundRecord, values.pop("best"), f"{path}: best")
    per_subnet = values.pop("parameters_per_subnet")
    sound = isinstance(per_subnet, list) and per_subnet and all(map(_is_number, per_subnet))
    _require(bool(sound), f"{path}: parameters_per_subnet", per_subnet)
    given = {"history": tuple(history), "best": best, "parameters_per_subnet": tuple(per_subnet)}
    result = _record(TrainResult, values, str(path), **given)
    name = folder.resolve().name if name is None else name
    return Run(
        name=name,
        label=name if label is None else label,
        config=_read_config(folder / "config.json"),
        result=result,
    )


def read_history(path: Path) -> list[RoundRecord]:
    """Reads the records of a run, one per line.

    Raises:
        DataError: there is none, or a line is damaged; names it.
    """
    history = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        where = f"{path}, line {number},"
        history.append(_record(RoundRecord, _parse(line, where), where))
    if not history:
        raise DataError(f"{path} holds no round")
    return history


def _read_config(path: Path) -> dict[str, Any]:
    config = _read_object(path, ("model", "executor", "groups", "settings"))
    groups, settings = config["groups"], config["settings"]
    _require_keys(groups, (), f"{path}: groups")
    for name, size in groups.items():
        _require(isinstance(size, int), f"{path}: groups: {name}", size)
    _require_keys(settings, ("num_subnets", "seed", "sampler"), f"{path}: settings")
    _require_keys(settings["sampler"], ("name",), f"{path}: sampler")
    _require(isinstance(settings["seed"], int), f"{path}: seed", settings["seed"])
    for part in ("model_settings", "versions"):
        _require_keys(config.setdefault(part, {}), (), f"{path}: {part}")
    return config


def read_comparison(folder: Path) -> dict[str, Any]:
    """Reads and checks ``table.json`` of a comparison.

    Raises:
        DataError: it is damaged; names the row and what is wrong with it.
    """
    path = folder / "table.json"
    table = _read_object(path, ("dataset", "metric", "rows"))
    _require(
        isinstance(table["rows"], list) and bool(table["rows"]), f"{path}: rows", table["rows"]
    )
    for number, row in enumerate(table["rows"]):
        where = f"{path}: rows[{number}]"
        _require_keys(row, (*_TABLE_NUMBERS, *_TABLE_OPTIONAL, *_TABLE_OTHER), where)
        for key in (*_TABLE_NUMBERS, *_TABLE_OPTIONAL):
            absent = key in _TABLE_OPTIONAL and row[key] is None
            _require(absent or _is_number(row[key]), f"{where}: {key}", row[key])
        runs = row["runs"]
        named = isinstance(runs, list) and all(isinstance(run, str) for run in runs)
        _require(named, f"{where}: runs", runs)
    return table


def _read_object(path: Path, required: Iterable[str]) -> dict[str, Any]:
    value = _parse(path.read_bytes(), str(path))
    _require_keys(value, required, str(path))
    found: dict[str, Any] = value
    return found


def _parse(text: bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:  # no JSON, or no UTF-8
        raise DataError(f"{where} is damaged", got=error, expected="JSON") from error


def _record(cls: type[_Record], values: Any, where: str, **given: Any) -> _Record:
    """A dataclass of numbers from a JSON object; what is ``given`` has been checked already."""
    try:
        record = cls(**values, **given)
    except TypeError as error:  # no mapping, or other names
        raise DataError(f"{where} is damaged", got=error) from error
    for field in dataclasses.fields(cls):
        value = getattr(record, field.name)
        absent = value is None and field.default is None
        if not (field.name in given or absent):
            whole = field.type == "int"
            score = field.name.endswith(("_loss", "_metric"))
            sound = _is_number(value, finite=not score) and (isinstance(value, int) or not whole)
            _require(sound, f"{where}: {field.name}", value)
    return record


def _require_keys(value: Any, required: Iterable[str], where: str) -> None:
    if not isinstance(value, dict):
        raise DataError(f"{where} is damaged", got=type(value).__name__, expected="a JSON object")
    if missing := [key for key in required if key not in value]:
        raise DataError(f"{where} is damaged", got=f"no {', '.join(missing)}")


def _require(sound: bool, where: str, got: Any) -> None:
    if not sound:
        raise DataError(f"{where} is damaged", got=repr(got))


def _is_number(value: Any, *, finite: bool = True) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and (not finite or math.isfinite(value))
