"""Datasets by name, whatever they hold: graphs, or independent samples."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gist.catalog.cards import list_cards, load_card
from gist.catalog.records import Card, SampleCard
from gist.graph import datasets as graphs
from gist.graph.data import GraphData
from gist.samples import datasets as samples
from gist.samples.data import SampleData


def load_dataset(
    name: str | os.PathLike[str],
    /,
    *,
    root: str | Path | None = None,
    seed: int = 0,
    **options: Any,
) -> GraphData | SampleData:
    """A dataset by name, or a saved graph by its path; never touches the network.

    Args:
        name: A name that :func:`gist.catalog.cards.list_cards` lists; or what
            :meth:`GraphData.load <gist.graph.data.GraphData.load>` takes: a path ends in ``.npz``,
            has a separator, or exists.
        root: Folder to read raw files from, in place of ``GIST_DATA`` and the cache; what takes
            long to read is kept there too, if it may be written to.
        seed: What a random graph is drawn from; of no effect on fixed data.
        **options: As for :func:`gist.graph.datasets.load_dataset` and
            :func:`gist.samples.datasets.load_dataset`.

    Returns:
        A graph, or independent samples.

    Raises:
        ConfigError: an unknown dataset or option; lists the known ones.
        DataError: raw files are missing (says which go where) or damaged (names them).
        MissingDependencyError: a package that reads them is not installed.
    """
    if isinstance(card := find_card(name, options), SampleCard):
        return samples.load_dataset(card.name, root=root, **options)
    return graphs.load_dataset(name, root=root, seed=seed, **options)


def prepare_dataset(name: str, root: str | Path | None = None, **options: Any) -> Path | None:
    """Downloads the raw files of a dataset, unless they are there, verifies and reads them.

    What takes long to read is kept, so that :func:`load_dataset` has it at once.

    Args:
        name: The name of a dataset.
        root: Folder to put them in, in place of the cache.
        **options: As for :func:`load_dataset`.

    Returns:
        The dataset's folder; of what was kept, where the raw files were deleted since; None where
        the dataset is generated and needs none.

    Raises:
        ConfigError: an unknown dataset or option.
        DataError: the download failed, or what came is not what the card says. Then nothing is
            left behind.
        MissingDependencyError: a package that reads the files is not installed.
    """
    if isinstance(load_card(name), SampleCard):
        return samples.prepare_dataset(name, root, **options)
    return graphs.prepare_dataset(name, root, **options)


def find_card(
    name: str | os.PathLike[str], options: Mapping[str, Any] | None = None
) -> Card | None:
    """The card of a dataset; None where the name is the path of a saved graph.

    Raises:
        ConfigError: an unknown dataset, or options for a saved graph.
    """
    if (known := os.fspath(name).lower()) in list_cards():
        return load_card(known)
    return graphs.find_card(name, options)
