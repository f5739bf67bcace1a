"""Datasets by name: generated ones at once, downloaded ones from a folder with their raw files.

Raw files lie below a data folder as ``planetoid/Cora/raw/ind.cora.x``. The folder is ``root=``, or
``GIST_DATA`` (only ever read) and then the cache: ``GIST_CACHE``, by default ``~/.cache/gist``.
Raw files are checked against the card and parsed each time: nothing else is written or unpickled.
"""

from __future__ import annotations

import hashlib
import http.client
import inspect
import os
import pickle
import shutil
import tempfile
import urllib.request
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch_geometric.datasets import Planetoid
from torch_geometric.io import read_planetoid_data
from torch_geometric.transforms import NormalizeFeatures

from gist.errors import ConfigError, DataError
from gist.graph.cards import Card, load_card
from gist.graph.data import GraphData
from gist.graph.generate import csbm, digits

_TIMEOUT_SECONDS = 60


def load_dataset(
    name: str, /, *, root: str | Path | None = None, seed: int = 0, **options: Any
) -> GraphData:
    """A dataset by name; never touches the network.

    Args:
        name: ``"digits"``, ``"csbm"``, ``"cora"``, ``"citeseer"`` or ``"pubmed"``.
        root: Folder to read raw files from, in place of ``GIST_DATA`` and the cache.
        seed: What a random graph is drawn from; of no effect on fixed data.
        **options: Planetoid: ``normalize_features=True`` scales each row of word counts to sum 1,
            as is usual (Kipf & Welling, 2017). digits and csbm: the arguments of
            :func:`gist.graph.generate.digits` and :func:`gist.graph.generate.csbm`.

    Raises:
        ConfigError: an unknown dataset or option; lists the known ones.
        DataError: raw files are missing (says which go where) or damaged (names them).
    """
    card = load_card(name)
    load = _LOADERS[card.name]
    accepted = inspect.signature(load).parameters.keys() - {"card", "root", "seed"}
    if unknown := sorted(options.keys() - accepted):
        raise ConfigError(
            f"options that {card.name} does not have",
            got=", ".join(unknown),
            expected=" or ".join(sorted(accepted)),
        )
    given = {"card": card, "root": root, "seed": seed}
    taken = {key: given[key] for key in given.keys() & inspect.signature(load).parameters.keys()}
    return load(**taken, **options)


def prepare_dataset(name: str, root: str | Path | None = None) -> Path | None:
    """Downloads the raw files of a dataset, unless they are there, and verifies them.

    Args:
        name: As for :func:`load_dataset`.
        root: Folder to put them in, in place of the cache.

    Returns:
        The data folder that holds them; None where the dataset is generated and needs none.

    Raises:
        ConfigError: an unknown dataset.
        DataError: the download failed, or what came is not what the card says. Then nothing is
            left behind.
    """
    card = load_card(name)
    if not card.checksums:
        return None
    for place in data_folders(root):
        if not missing_files(card, place):
            _verify(card, place)
            return place
    target = data_folders(root)[-1]
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{card.name}-", dir=target) as folder:
        for file in card.checksums:
            _download(f"{Planetoid.url}/{Path(file).name}", Path(folder) / file)
        _verify(card, Path(folder))
        for file in card.checksums:
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            (Path(folder) / file).replace(target / file)
    return target


def _planetoid(
    folder: str, card: Card, root: str | Path | None, *, normalize_features: bool = True
) -> GraphData:
    """Cora, CiteSeer or PubMed with the public split (Yang, Cohen & Salakhutdinov, ICML 2016)."""
    place = _find(card, root)
    _verify(card, place)
    raw = place / "planetoid" / folder / "raw"
    try:
        with warnings.catch_warnings():  # the files are pickles of an old numpy and scipy
            warnings.simplefilter("ignore")
            data = read_planetoid_data(str(raw), folder)
    except (EOFError, pickle.UnpicklingError, ValueError, IndexError, RuntimeError) as error:
        raise DataError(
            f"cannot read the raw files in {raw}",
            got=error,
            remedy=f"delete them and run `gist prepare {card.name}`",
        ) from error
    if normalize_features:
        data = NormalizeFeatures()(data)
    graph = GraphData.from_pyg(data, name=card.name)
    got = (graph.num_nodes, graph.num_edges, graph.num_features, graph.num_classes)
    expected = (card.nodes, card.edges, card.features, card.classes)
    if got != expected:
        raise DataError(
            f"the raw files in {raw} are not those of {card.name}",
            got="{:,} nodes, {:,} edges, {:,} features, {:,} classes".format(*got),
            expected="{:,}, {:,}, {:,} and {:,}".format(*expected),
            remedy=f"delete them and run `gist prepare {card.name}`",
        )
    return graph


_LOADERS: dict[str, Callable[..., GraphData]] = {
    "digits": digits,
    "csbm": csbm,
    "cora": partial(_planetoid, "Cora"),
    "citeseer": partial(_planetoid, "CiteSeer"),
    "pubmed": partial(_planetoid, "PubMed"),
}


def data_folders(root: str | Path | None) -> list[Path]:
    """Folders to look in; the last is the one to write to."""
    if root is not None:
        return [Path(root).expanduser()]
    data = os.environ.get("GIST_DATA")
    cache = Path(os.environ.get("GIST_CACHE") or "~/.cache/gist").expanduser()
    return [Path(data).expanduser(), cache] if data else [cache]


def missing_files(card: Card, place: Path) -> list[str]:
    """Raw files of a dataset that a data folder lacks."""
    return [file for file in card.checksums if not (place / file).is_file()]


def _find(card: Card, root: str | Path | None) -> Path:
    places = data_folders(root)
    for place in places:
        if not missing_files(card, place):
            return place
    searched = "; ".join(
        f"{place} lacks {', '.join(missing_files(card, place))}" for place in places
    )
    raise DataError(
        f"the raw files of {card.name} are not there",
        got=searched,
        expected="all of them in one of these folders",
        remedy=f"run `gist prepare {card.name}`, which downloads them, or set GIST_DATA to a "
        "folder that holds them",
    )


def _verify(card: Card, place: Path) -> None:
    for file, expected in card.checksums.items():
        if expected is not None:
            with (place / file).open("rb") as stream:
                got = hashlib.file_digest(stream, "sha256").hexdigest()
            if got != expected:
                raise DataError(
                    f"{place / file} is damaged or of another version",
                    got=f"SHA-256 {got}",
                    expected=expected,
                    remedy=f"delete it and run `gist prepare {card.name}`",
                )


def _download(url: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with (
            urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as stream,
            path.open("wb") as target,
        ):
            shutil.copyfileobj(stream, target)
    except (OSError, http.client.HTTPException) as error:
        raise DataError(
            f"cannot download {url}",
            got=error,
            remedy="check the network, or copy the raw files into GIST_DATA by hand",
        ) from error
