"""A graph in three CSV files: edges, features and labels of nodes that have names.

Rows are read one by one, so that whatever is wrong is told with its line.

Shape legend: ``N`` nodes, ``E`` directed edges, ``F`` features.
"""

from __future__ import annotations

import csv
import gzip
import math
import zlib
from array import array
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gist.errors import DataError
from gist.graph.convert import SPLITS

Row = tuple[int, list[str]]
"""The number of a line, and its cells."""

_OTHER_DELIMITERS = {";": "semicolons", "\t": "tabs"}

_LARGEST = 2**53
"""Below it all whole numbers are told apart when they are read as float64."""


def csv_inputs(
    edges: Path,
    features: Path,
    labels: Path,
    *,
    header: bool,
    node_ids: bool,
    keep_duplicates: bool,
    splits: Mapping[str, Sequence[Any] | None],
) -> dict[str, Any]:
    """The arguments of ``GraphData.from_edges`` held by three files.

    Args:
        edges: Source, target and, in a third column, weight.
        features: In each row a node's name, if ``node_ids``, and its features.
        labels: Node, label and, in a third column, split.
        header: Whether the first line of each file names its columns.
        node_ids: Whether nodes have names; otherwise they have the numbers 0, 1, 2, ... of their
            rows in ``features``.
        keep_duplicates: Whether an edge may be listed more than once.
        splits: The nodes of each split, by name; None leaves it to the file.

    Raises:
        DataError: a file that is not there or cannot be read, or a line that is wrong, by number.
    """
    number, x = _read_features(features, header, node_ids)
    index, weight = _read_edges(edges, header, number, keep_duplicates)
    y, found = _read_labels(labels, header, number)
    for split, nodes in splits.items():
        if nodes is not None:
            names = [str(node) for node in nodes]
            if unknown := [name for name in names if name not in number]:
                raise _unknown(f"the {split} split", unknown[0], features)
            found[split] = [number[name] for name in names]
    if lacking := [split for split in SPLITS if split not in found]:
        raise DataError(
            f"{labels} does not say which nodes are in which split",
            got="two columns",
            expected=f"a third column with {', '.join(SPLITS)} or nothing",
            remedy=f"add it, or give lists of nodes: {', '.join(f'{s}=' for s in lacking)}",
        )
    return {"edge_index": index, "edge_weight": weight, "x": x, "y": y, **found}


def _read_features(path: Path, header: bool, node_ids: bool) -> tuple[dict[str, int], np.ndarray]:
    """The number of each node by its name, and ``[N, F]`` float64."""
    rows = _rows(path, ("node", "a feature") if node_ids else ("a feature",))
    if header:
        _skip_names(path, rows, int(node_ids))
    number: dict[str, int] = {}
    lines, values = array("q"), array("d")
    for line, cells in rows:
        name = cells[0] if node_ids else str(len(number))
        if not name:
            raise _wrong(path, line, "the node has no name", expected="text in the first column")
        if number.setdefault(name, len(lines)) < len(lines):
            raise _twice(path, line, name, lines[number[name]])
        values.extend(_numbers(path, line, cells[node_ids:]))
        lines.append(line)
    if not lines:
        raise DataError(f"{path} has no nodes", got="a header alone", expected="a line per node")
    return number, np.frombuffer(values).reshape(len(lines), -1)


def _read_edges(
    path: Path, header: bool, number: Mapping[str, int], keep_duplicates: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    """``[2, E]`` int64 and, where there is a third column, ``[E]`` float64."""
    rows = _rows(path, ("source", "target"), "weight")
    if header:
        _skip_names(path, rows, 2, number)
    lines, ends, weights = array("q"), array("q"), array("d")
    for line, cells in rows:
        for name in cells[:2]:
            if name not in number:
                raise _unknown(f"{path}, line {line}", name, "the features")
            ends.append(number[name])
        weights.extend(_numbers(path, line, cells[2:]))
        lines.append(line)
    index = np.array(ends, dtype=np.int64).reshape(-1, 2).T
    if not keep_duplicates:
        _refuse_duplicates(path, lines, index[0] * len(number) + index[1])
    return index, np.array(weights) if weights else None


def _refuse_duplicates(path: Path, lines: Sequence[int], keys: np.ndarray) -> None:
    order = np.argsort(keys, kind="stable")
    again = np.flatnonzero(keys[order][1:] == keys[order][:-1])
    if again.size:
        first, repeated = order[again[0]], order[again[0] + 1]
        raise DataError(
            f"{path} lists an edge more than once",
            got=f"{again.size:,} such lines, among them line {lines[repeated]}, which is line "
            f"{lines[first]} again",
            expected="each edge once",
            remedy="take the repetitions out, or keep them with keep_duplicates=True",
        )


def _read_labels(
    path: Path, header: bool, number: Mapping[str, int]
) -> tuple[np.ndarray, dict[str, Any]]:
    """``[N]`` int64, -1 where there is none; and the nodes of each split, if there is a column."""
    rows = _rows(path, ("node", "label"), "split")
    if header:
        _skip_names(path, rows, 1, number, SPLITS)
    lines: dict[int, int] = {}
    labels: dict[int, str] = {}
    splits: dict[str, list[int]] = {}
    for line, (name, label, *split) in rows:
        if name not in number:
            raise _unknown(f"{path}, line {line}", name, "the features")
        node = number[name]
        if node in lines:
            raise _twice(path, line, name, lines[node])
        lines[node] = line
        if label:
            labels[node] = label
        if split and not splits:
            splits = {known: [] for known in SPLITS}
        if split and split[0]:
            part = "val" if split[0] == "valid" else split[0]
            if part not in splits:
                expected = f"{', '.join(SPLITS)} or nothing"
                raise _wrong(path, line, "unknown split", split[0], expected)
            if not label:
                raise _wrong(path, line, "the label of a node in a split is missing")
            splits[part].append(node)
    y = np.full(len(number), -1, dtype=np.int64)
    y[list(labels)] = _classes(path, [lines[node] for node in labels], list(labels.values()))
    return y, dict(splits)


def _classes(path: Path, lines: Sequence[int], labels: Sequence[str]) -> list[int]:
    """Class numbers: the labels themselves or, where they are names, their places in order."""
    values = [_number_or_none(label) for label in labels]
    named = [value is None for value in values]
    if all(named):
        place = {name: i for i, name in enumerate(sorted(set(labels)))}
        return [place[label] for label in labels]
    for line, label, value in zip(lines, labels, values, strict=True):
        if value is None or value != round(value) or abs(value) >= _LARGEST:
            raise _wrong(
                path,
                line,
                "the label is not a class",
                label,
                "whole numbers from 0 for all classes, or names for all",
            )
    return [int(value) for value in values if value is not None]


def _number_or_none(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _rows(path: Path, columns: Sequence[str], optional: str | None = None) -> Iterator[Row]:
    """The lines of a file that are not blank, all with as many cells.

    Args:
        path: Comma-separated text in UTF-8, compressed where the name ends in ``.gz``.
        columns: What it holds at least; the last may be the first of many.
        optional: What one more column would be; None where there may be any number.
    """
    width = 0
    for line, cells in _lines(path):
        if not width:
            width = len(cells)
            _refuse_other_delimiters(path, cells)
            most = width if optional is None else len(columns) + 1
            if not len(columns) <= width <= most:
                more = "" if optional is None else f" and at most {optional}"
                raise DataError(
                    f"{path} lacks a column or has one too many",
                    got=f"{width}: {', '.join(cells[:5])}",
                    expected=f"{', '.join(columns)}{more}",
                )
        if len(cells) != width:
            raise _wrong(path, line, "more or fewer cells than before", len(cells), width)
        yield line, cells
    if not width:
        raise DataError(f"{path} is empty", expected=", ".join(columns))


def _refuse_other_delimiters(path: Path, first: Sequence[str]) -> None:
    for delimiter, name in _OTHER_DELIMITERS.items():
        if len(first) == 1 and delimiter in first[0]:
            raise DataError(
                f"{path} seems to be separated by {name}",
                got=repr(first[0]),
                expected="commas between the cells",
                remedy=f"pandas.read_csv(file, sep={delimiter!r}).to_csv(file, index=False) "
                "writes it with commas",
            )


def _lines(path: Path) -> Iterator[Row]:
    line = 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            text = (line.decode("utf-8-sig") for line in file)
            reader = csv.reader(text, strict=True, skipinitialspace=True)
            for cells in reader:
                line = reader.line_num
                if cells:
                    yield line, cells
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"{path} cannot be read" + (f" after line {line}" if line else ""),
            got=error,
            expected="comma-separated text in UTF-8, whole, and in .gz if the name says so",
        ) from error


def _skip_names(
    path: Path,
    rows: Iterator[Row],
    nodes: int,
    number: Container[str] = (),
    values: Container[str] = (),
) -> None:
    """Skips a header; refuses a first line that is none, which would be lost.

    Nodes and other values are no names of columns. Numbers are names where they count the columns.

    Args:
        path: The file.
        rows: Its lines.
        nodes: How many columns hold nodes, the first ones.
        number: The nodes that are known.
        values: What else is known to be no name.
    """
    line, cells = next(rows)
    ends, rest = cells[:nodes], cells[nodes:]
    counts = [[str(first + i) for i in range(len(rest))] for first in {0, 1, nodes}]
    numbers = rest and rest not in counts and None not in map(_number_or_none, rest)
    if (
        numbers
        or (ends and all(name in number for name in ends))
        or any(cell in values for cell in rest)
    ):
        raise _wrong(
            path,
            line,
            "the first line is not a header: it names nodes or holds values",
            ", ".join(cells[:5]),
            "names of columns; numbers only as 0, 1, 2, ... or 1, 2, 3, ...",
            "pass header=False where no file has a header",
        )


def _numbers(path: Path, line: int, cells: Sequence[str]) -> Iterable[float]:
    try:
        values = [float(cell) for cell in cells]
    except ValueError:
        values = []
    if len(values) == len(cells) and math.isfinite(sum(values)):
        return values
    for cell in cells:
        if _number_or_none(cell) is None:
            raise _wrong(path, line, "a cell is not a finite number", repr(cell))
    return values  # their sum alone is not finite


def _wrong(
    path: Path,
    line: int,
    what: str,
    got: Any = None,
    expected: Any = None,
    remedy: str | None = None,
) -> DataError:
    return DataError(f"{path}, line {line}: {what}", got=got, expected=expected, remedy=remedy)


def _twice(path: Path, line: int, name: str, first: int) -> DataError:
    return _wrong(path, line, "a node has two lines", f"{name!r}, also on line {first}", "one")


def _unknown(where: str, name: str, features: Any) -> DataError:
    return DataError(
        f"{where} names a node that is not known",
        got=repr(name),
        expected=f"a node of {features}",
        remedy="add its features; or header=False, if no first line is a header; or "
        "node_ids=False, if nodes are numbered from 0 and features have no column for them",
    )
