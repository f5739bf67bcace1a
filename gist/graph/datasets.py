"""Graphs by name: generated ones at once, downloaded ones from a folder with their raw files.

:mod:`gist.catalog.places` says where raw files lie. The small ones are verified and parsed each
time;
what is made of the large ones is kept (:mod:`gist.graph.processed`).
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch_geometric.datasets import Flickr, Reddit, Yelp
from torch_geometric.utils import to_undirected

from gist.catalog.cards import list_cards, load_card
from gist.catalog.download import fetch
from gist.catalog.options import every_option
from gist.catalog.places import find_raw, not_there, preparing, verify
from gist.catalog.records import GraphCard
from gist.errors import ConfigError, DataError
from gist.graph.convert import as_mask
from gist.graph.data import GraphData
from gist.graph.generate import arxiv_like, csbm, digits
from gist.graph.ogb_files import read_arxiv, read_products, read_proteins
from gist.graph.processed import find_kept, keep, kept_folder
from gist.graph.pyg_files import read_planetoid, read_ppi, read_single


def load_dataset(
    name: str | os.PathLike[str],
    /,
    *,
    root: str | Path | None = None,
    seed: int = 0,
    **options: Any,
) -> GraphData:
    """A graph by name, or a saved graph by its path; never touches the network.

    Args:
        name: A name that :func:`gist.catalog.cards.list_cards` lists; or what
            :meth:`GraphData.load` takes: a path ends in ``.npz``, has a separator, or exists.
        root: Folder to read raw files from, in place of ``GIST_DATA`` and the cache; what is made
            of large ones is kept there too, if it may be written to.
        seed: What a random graph is drawn from; of no effect on fixed data.
        **options: cora, citeseer, pubmed: ``normalize_features=True`` scales each row of word
            counts to sum 1, as is usual (Kipf & Welling, 2017). ogbn-arxiv: ``symmetrize=True``
            gives each edge its reverse. ogbn-proteins: ``edge_features=True`` keeps the features
            of the edges. digits and csbm: the arguments of :func:`gist.graph.generate.digits` and
            :func:`gist.graph.generate.csbm`.

    Raises:
        ConfigError: an unknown dataset or option; lists the known ones.
        DataError: raw files are missing (says which go where) or damaged (names them).
        MissingDependencyError: a package that reads them is not installed.
    """
    card = find_card(name, options)
    if card is None:
        return GraphData.load(name)
    every = every_option(card.name, _LOADERS[card.name], options)
    if card.checksums:
        return _of_raw_files(card, root, every)
    load = _LOADERS[card.name]
    given = {"seed": seed} if "seed" in inspect.signature(load).parameters else {}
    return load(**given, **options)


def _of_raw_files(
    card: GraphCard, root: str | Path | None, options: Mapping[str, Any], *, verified: bool = False
) -> GraphData:
    """The graph of a dataset that is downloaded: kept, or made now.

    Args:
        card: Of the dataset.
        root: As for :func:`load_dataset`.
        options: All options, those left at their default too.
        verified: Whether the raw files are known to be what they were.
    """
    kept = is_kept(card)
    if kept and (graph := find_kept(card, root, options)) is not None:
        return graph
    folder = find_raw(card, root)
    other = _SPLIT_ANEW.get(card.name)
    base = None if other is None else find_kept(load_card(other), root, {})
    if folder is None and base is None:
        raise not_there(card, root)

    def read() -> GraphData:
        if base is not None:
            return _cluster_gcn_split(base)
        assert folder is not None
        if not verified:
            verify(card, folder, root=root)
        try:
            graph = _LOADERS[card.name](folder=folder, card=card, **options)
            _check_sizes(graph, card, folder)
        except DataError as error:
            raise DataError(
                error.what,
                got=error.got,
                expected=error.expected,
                remedy=error.remedy or f"delete the damaged files and run {preparing(card, root)}",
            ) from error
        return graph

    return keep(card, root, options, read) if kept else read()


def _check_sizes(graph: GraphData, card: GraphCard, folder: Path) -> None:
    """Refuses a graph without the sizes on the card, which counts edges in both directions."""
    edges = graph.num_edges
    if graph.directed:
        edges = to_undirected(graph.edge_index, num_nodes=graph.num_nodes).size(1)
    got = (graph.num_nodes, edges, graph.num_features, graph.num_classes)
    expected = (card.nodes, card.edges, card.features, card.classes)
    if got != expected:
        raise DataError(
            f"the raw files in {folder / 'raw'} are not those of {card.name}",
            got="{:,} nodes, {:,} edges, {:,} features, {:,} classes".format(*got),
            expected="{:,}, {:,}, {:,} and {:,}".format(*expected),
        )


def find_card(
    name: str | os.PathLike[str], options: Mapping[str, Any] | None = None
) -> GraphCard | None:
    """The card of a graph; None where the name is the path of a saved graph.

    A path ends in ``.npz``, has a separator in it, or exists. A known name is never one.

    Raises:
        ConfigError: an unknown dataset, one that is no graph, or options for a saved graph.
    """
    name = os.fspath(name)
    is_path = name.endswith(".npz") or os.sep in name or Path(name).exists()
    if name.lower() in list_cards() or not is_path:
        return _graph_card(name)
    if options:
        raise ConfigError(
            "a saved graph has no options",
            got=f"{', '.join(sorted(options))} for {name}",
            remedy="leave them out; the graph is what it was when it was saved",
        )
    return None


def _graph_card(name: str) -> GraphCard:
    card = load_card(name)
    if not isinstance(card, GraphCard):
        raise ConfigError(
            "a dataset of independent samples is no graph",
            got=card.name,
            expected="the name of a graph, or the path of a saved one",
            remedy="gist.load_dataset reads both kinds",
        )
    return card


def is_kept(card: GraphCard) -> bool:
    """Whether what is made of a dataset's raw files is kept, and mapped into memory from there."""
    return bool(card.checksums) and card.name not in _READ_EACH_TIME


def prepare_dataset(name: str, root: str | Path | None = None, **options: Any) -> Path | None:
    """Downloads the raw files of a graph, unless they are there, verifies and reads them.

    What takes long to read is kept, so that :func:`load_dataset` has it at once.

    Args:
        name: As for :func:`load_dataset`.
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
    card = _graph_card(name)
    if not card.checksums:
        return None
    every = every_option(card.name, _LOADERS[card.name], options)
    if (folder := find_raw(card, root)) is not None:
        verify(card, folder, root=root)
    elif (folder := _kept_folder(card, root, every)) is None:
        folder = fetch(card, root)
    _of_raw_files(card, root, every, verified=True)
    return folder


def _kept_folder(
    card: GraphCard, root: str | Path | None, options: Mapping[str, Any]
) -> Path | None:
    """Where a graph was kept that makes raw files needless."""
    folder, other = kept_folder(card, root, options), _SPLIT_ANEW.get(card.name)
    if folder is None and other is not None:
        return kept_folder(load_card(other), root, {})
    return folder


def _read_amazon2m(folder: Path, card: GraphCard) -> GraphData:
    return _cluster_gcn_split(read_products(folder, card))


def _cluster_gcn_split(graph: GraphData) -> GraphData:
    """ogbn-products with a random split; the card of amazon2m says how it differs from others."""
    nodes = graph.num_nodes
    train = nodes * 1_709_997 // 2_449_029  # of Cluster-GCN; in proportion, if ever of others
    last = train + -(-(nodes - train) // 10)
    order = np.random.default_rng(0).permutation(nodes)
    return replace(
        graph,
        train_mask=as_mask("train", order[:train], nodes),
        val_mask=as_mask("val", order[train:last], nodes),
        test_mask=as_mask("test", order[last:], nodes),
        name="amazon2m",
    )


_LOADERS: dict[str, Callable[..., GraphData]] = {
    "digits": digits,
    "csbm": csbm,
    "arxiv-like": arxiv_like,
    "cora": partial(read_planetoid, "Cora"),
    "citeseer": partial(read_planetoid, "CiteSeer"),
    "pubmed": partial(read_planetoid, "PubMed"),
    "ogbn-arxiv": read_arxiv,
    "ogbn-products": read_products,
    "ogbn-proteins": read_proteins,
    "amazon2m": _read_amazon2m,
    "reddit": partial(read_single, Reddit),
    "flickr": partial(read_single, Flickr),
    "yelp": partial(read_single, Yelp),
    "ppi": read_ppi,
}

_READ_EACH_TIME = frozenset({"cora", "citeseer", "pubmed"})
"""Datasets of which reading takes no longer than what was kept would."""

_SPLIT_ANEW = {"amazon2m": "ogbn-products"}
"""Datasets that are another one with another split: the graph that was kept of it will do."""
