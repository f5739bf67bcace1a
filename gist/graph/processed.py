"""Graphs that took long to read, kept: the next time they are mapped into memory at once.

A kept graph lies in ``processed/`` of a data folder, named by dataset and options, and holds from
which raw files it was made. It is made again where these, or this package's way of reading them,
have changed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gist.catalog.places import data_folders, find_raw
from gist.catalog.records import Card
from gist.catalog.writing import alone_in, may_write
from gist.errors import DataError
from gist.graph import files
from gist.graph.data import GraphData

_FORMAT = 1
"""Raised when raw files are read in another way, so that what was made of them is made again."""

_SOURCE = "source"
"""Name of the fact that says what a kept graph was made from."""


def find_kept(card: Card, root: str | Path | None, options: Mapping[str, Any]) -> GraphData | None:
    """The graph that was kept, of the raw files as they are, or from before they were deleted.

    Args:
        card: Of the dataset.
        root: As for :func:`gist.load_dataset`.
        options: All options of the dataset, those left at their default too.

    Raises:
        DataError: a kept graph is damaged, and there are no raw files to make it again from.
    """
    source = _source(card, find_raw(card, root))
    for place in _places(card, root, options):
        if _is_of(place, source):
            try:
                return GraphData.load(place)
            except DataError:
                if source["files"] is None:
                    raise
    return None


def keep(
    card: Card,
    root: str | Path | None,
    options: Mapping[str, Any],
    read: Callable[[], GraphData],
) -> GraphData:
    """Reads a graph that :func:`find_kept` does not find, and keeps it where that is possible.

    Args:
        card: Of the dataset.
        root: As for :func:`gist.load_dataset`.
        options: All options of the dataset, those left at their default too.
        read: Makes the graph.
    """
    place = _places(card, root, options)[-1]
    if not may_write(place):
        return read()
    with alone_in(place.parent):
        if (graph := find_kept(card, root, options)) is not None:  # another process was first
            return graph
        source = _source(card, find_raw(card, root))
        graph = read()
        try:
            graph.save(place, extra={_SOURCE: source})
        except DataError:  # what is there is so damaged that it is no saved graph any more
            shutil.rmtree(place)
            graph.save(place, extra={_SOURCE: source})
    return GraphData.load(place)


def kept_folder(card: Card, root: str | Path | None, options: Mapping[str, Any]) -> Path | None:
    """Where a graph was kept that was made from the raw files, or before they were deleted."""
    source = _source(card, find_raw(card, root))
    return next((place for place in _places(card, root, options) if _is_of(place, source)), None)


def _places(card: Card, root: str | Path | None, options: Mapping[str, Any]) -> list[Path]:
    """Where a graph may have been kept; the last is where it is kept from now on."""
    name = "-".join([card.name, *(f"{k}={json.dumps(v)}" for k, v in sorted(options.items()))])
    return [folder / "processed" / name for folder in data_folders(root)]


def _source(card: Card, raw: Path | None) -> dict[str, Any]:
    """What a graph is made from: sizes and times of the raw files, None where they are gone."""
    files = None
    if raw is not None:
        stats = {file: (raw / file).stat() for file in card.checksums}
        files = {file: [stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()}
    return {"format": _FORMAT, "files": files}


def _is_of(place: Path, source: dict[str, Any]) -> bool:
    """Whether a kept graph was made from these raw files; any will do where they are gone."""
    try:
        found = files.read_facts(place).get(_SOURCE, {})
    except DataError:
        return False
    if source["files"] is None:
        return bool(found.get("format") == source["format"])
    return bool(found == source)
