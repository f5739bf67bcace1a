"""Datasets that PyTorch Geometric parses, from their raw files: nothing is unpickled but these.

Shape legend: ``N`` nodes.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch_geometric.data import Batch, Data, InMemoryDataset
from torch_geometric.datasets import PPI
from torch_geometric.io import read_planetoid_data
from torch_geometric.transforms import NormalizeFeatures

from gist.catalog.records import Card
from gist.errors import DataError
from gist.graph.data import GraphData


def read_planetoid(
    name: str, folder: Path, card: Card, *, normalize_features: bool = True
) -> GraphData:
    """Cora, CiteSeer or PubMed with the public split (Yang, Cohen & Salakhutdinov, ICML 2016).

    Args:
        name: As PyG has it.
        folder: The dataset's folder.
        card: Its card.
        normalize_features: Scale each row of word counts to sum 1 (Kipf & Welling, 2017).

    Raises:
        DataError: the raw files are damaged.
    """
    with _reading(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the files are pickles of an old numpy and scipy
        data = read_planetoid_data(str(folder / "raw"), name)
    return GraphData.from_pyg(
        NormalizeFeatures()(data) if normalize_features else data, name=card.name
    )


def read_single(kind: type[InMemoryDataset], folder: Path, card: Card) -> GraphData:
    """Reddit, Flickr or Yelp: one graph.

    Args:
        kind: PyG's class of the dataset.
        folder: The dataset's folder.
        card: Its card.

    Raises:
        DataError: the raw files are damaged.
    """
    ((data,),) = _parsed(kind, folder)
    return GraphData.from_pyg(data, name=card.name)


def read_ppi(folder: Path, card: Card) -> GraphData:
    """PPI: the graphs for training, validation and testing side by side, as one graph.

    Args:
        folder: The dataset's folder.
        card: Its card.

    Raises:
        DataError: the raw files are damaged.
    """
    splits = _parsed(PPI, folder)
    union = Batch.from_data_list([data for split in splits for data in split])
    counts = [sum(data.num_nodes for data in split) for split in splits]
    part = torch.arange(3).repeat_interleave(torch.tensor(counts))
    data = Data(x=union.x, edge_index=union.edge_index, y=union.y)
    data.train_mask, data.val_mask, data.test_mask = part == 0, part == 1, part == 2
    return GraphData.from_pyg(data, name=card.name)


def _parsed(kind: type[InMemoryDataset], folder: Path) -> list[list[Data]]:
    """What PyG's class makes of the raw files, for each file that it would keep.

    It neither downloads, since the raw files are there, nor writes what it made, which may be
    gigabytes, nor unpickles it.
    """
    made: list[list[Data]] = []

    class Parsed(kind):  # type: ignore[misc]
        raw_dir = str(folder / "raw")

        def save(self, data_list: list[Data], path: str) -> None:
            made.append(data_list)

        def load(self, path: str, data_cls: type[Any] = Data) -> None:
            """What was made is returned, not kept in the dataset."""

    with (
        _reading(folder),
        tempfile.TemporaryDirectory() as elsewhere,
        contextlib.redirect_stderr(io.StringIO()),  # it says that it is processing
    ):
        Parsed(elsewhere)
    return made


@contextlib.contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Turns whatever parsing raises on other content into one error."""
    try:
        yield
    except (
        EOFError,
        LookupError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise DataError(
            f"cannot read the raw files in {folder / 'raw'}",
            got=f"{type(error).__name__}: {error}",
        ) from error
