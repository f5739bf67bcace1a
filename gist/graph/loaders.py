"""PyTorch Geometric's loaders as batches for subnet training.

Shape legend: ``n`` nodes of a batch, ``t`` of them with a loss.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, count, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from torch_geometric.data import Batch, Data

from gist.errors import ConfigError, DataError, MissingDependencyError
from gist.graph.adjacency import Adjacency, true_positions
from gist.graph.batch import BatchRecipe, BatchSource, GraphBatch
from gist.graph.convert import as_edge_values, pyg_edge_values
from gist.graph.data import GraphData
from gist.partition.streams import stream_seed
from gist.random_states import RandomStates


@dataclass(frozen=True)
class PyGLoader(BatchRecipe):
    """Batches from a loader of PyG ``Data``.

    For example::

        PyGLoader(lambda data: NeighborLoader(
            data, num_neighbors=[10, 10], batch_size=512, input_nodes=data.train_mask, shuffle=True
        ))

    The loss is taken over the training nodes of a batch; where it has a ``batch_size``, as
    ``NeighborLoader`` gives it, over those of the first ``batch_size`` nodes, its seeds. A batch
    without any is passed over. Features, labels, edges and edge weights are those of the batch;
    other attributes, as ``node_norm`` of GraphSAINT, are not used.

    The passes of a subnet number over the loader go on from round to round: step ``k`` of a round
    of ζ steps is step ``round * ζ + k`` of an endless series of passes, so that a loader without
    ``shuffle`` gives all of its batches too. In a torch ``DataLoader``, as PyG's own are, what
    earlier rounds have seen of a pass is skipped before it is sampled; any other iterable is
    iterated up to there. A batch that is passed over counts as a step of the series, although the
    next one takes its place: where there are such, the loader should shuffle.

    Each pass, and each batch in it, has random states of its own, named by (seed, subnet, pass,
    batch): torch's, numpy's and Python's global ones while the loader works, and for each pass the
    loader's ``generator``; the training sees none of them. Worker processes of a loader draw from
    their own, of which what they sample depends on where in a pass the round begins. A loader that
    is random in another way makes runs that cannot be repeated.

    Attributes:
        make_loader: Makes the loader, once, from the training graph: a ``Data`` on the CPU with
            ``x``, ``edge_index``, ``edge_weight`` and ``edge_attr`` if there are any, ``y``,
            ``train_mask``, ``val_mask`` and ``test_mask``. It may be any iterable of ``Data`` that
            can be iterated over again.
        steps_per_epoch: Batches of one pass, where the loader has no ``len``.
    """

    make_loader: Callable[[Data], Iterable[Data]]
    steps_per_epoch: int | None = None

    def bind(self, data: GraphData) -> LoaderSource:
        """See :meth:`BatchRecipe.bind`. Draws a first batch to see that the loader works here.

        Raises:
            MissingDependencyError: the loader needs a package that is not installed.
            ConfigError: no iterable, no length, or it gives no batch with a training node.
            DataError: a batch does not fit the data.
        """
        return LoaderSource(self, data)


class LoaderSource(BatchSource):
    """A loader bound to one graph.

    Args:
        recipe: The loader.
        data: The graph.
    """

    def __init__(self, recipe: PyGLoader, data: GraphData) -> None:
        self.recipe, self.data = recipe, data
        if not callable(recipe.make_loader):
            raise ConfigError(
                "PyGLoader takes a function that makes the loader",
                got=type(recipe.make_loader).__name__,
                expected="such as lambda data: RandomNodeLoader(data, num_parts=10)",
            )
        try:
            self.loader = recipe.make_loader(_pyg(data))
            if not isinstance(self.loader, Iterable):
                raise ConfigError(
                    "make_loader must return something to iterate over",
                    got=type(self.loader).__name__,
                )
            self._steps, self._length = self._count()
            self._indices = _skippable(self.loader)
            # a probe: whether it works, and what identifies it
            first = next(self.batches(seed=0, round=0, subnet=0, steps=1))
        except ImportError as error:
            raise MissingDependencyError(
                "this loader cannot sample here",
                got=error,
                remedy="install that package for this version of torch, or use gist.Cluster, "
                "gist.LADIES or gist.FastGCN, which need nothing more",
            ) from error
        digest = hashlib.sha256()
        assert isinstance(first.graph, Adjacency)
        for tensor in (first.graph.edge_index, first.x, first.targets):
            if tensor is not None:
                digest.update(tensor.cpu().contiguous().numpy().data)
        self._first_batch = digest.hexdigest()[:16]

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one pass of the loader."""
        return self._steps

    def batches(self, *, seed: int, round: int, subnet: int, steps: int) -> Iterator[GraphBatch]:
        """Batches of a series of passes that goes on from round to round."""
        position = round * steps
        while steps > 0:
            number, first = divmod(position, self._length)
            position += self._length - first
            found = False
            for item in self._pass(first, seed, subnet, number):
                if (batch := self._batch(item)) is not None:
                    found, steps = True, steps - 1
                    yield batch
                    if not steps:
                        return
            if not found and not first:
                raise ConfigError(
                    "a whole pass of the loader gave no batch with a training node",
                    got=type(self.loader).__name__,
                    remedy="give it input_nodes=data.train_mask, or fewer and larger batches",
                )

    def _pass(self, first: int, seed: int, subnet: int, number: int) -> Iterator[Any]:
        """What the loader gives in one pass, without the first so many."""
        key = ("loader", seed, subnet, number)
        skipped = 0
        if self._indices is not None:
            self._indices.first = skipped = first
        if isinstance(generator := getattr(self.loader, "generator", None), torch.Generator):
            generator.manual_seed(stream_seed(*key))
        with RandomStates(stream_seed(*key)):
            items = iter(self.loader)
        for place in count(skipped):
            with RandomStates(stream_seed(*key, place)):
                item = next(items, None)
            if item is None:
                return
            if place >= first:
                yield item

    def describe(self) -> dict[str, Any]:
        """The loader's class, and what identifies its batches."""
        return {
            "name": "PyGLoader",
            "loader": type(self.loader).__name__,
            "steps_per_epoch": self.steps_per_epoch,
            "first_batch": self._first_batch,
        }

    def _count(self) -> tuple[int, int]:
        """Batches of an epoch, and of one pass where that is known."""
        length = None
        if isinstance(self.loader, Sized):
            with suppress(TypeError):  # a DataLoader whose data have no length
                length = len(self.loader)
        steps = length if self.recipe.steps_per_epoch is None else self.recipe.steps_per_epoch
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise ConfigError(
                "how many batches make one pass of the loader is not known",
                got=repr(steps),
                expected="a whole number of at least 1",
                remedy="give PyGLoader(..., steps_per_epoch=...)",
            )
        return steps, length or steps

    def _batch(self, item: Any) -> GraphBatch | None:
        x, y, edges = (getattr(item, name, None) for name in ("x", "y", "edge_index"))
        mask = getattr(item, "train_mask", None)
        if not (isinstance(x, Tensor) and isinstance(y, Tensor) and isinstance(edges, Tensor)):
            raise DataError(
                "a loader must give Data with x, y and edge_index",
                got=f"{type(item).__name__} with {sorted(getattr(item, 'keys', list)())}",
            )
        # the batch_size of joined graphs is their number
        seeds = None if isinstance(item, Batch) else getattr(item, "batch_size", None)
        if mask is None and seeds is None:
            raise DataError(
                "a batch does not say which of its nodes to train on",
                got=f"{type(item).__name__} with {sorted(item.keys())}",
                expected="train_mask, batch_size or both",
            )
        data = self.data
        if x.size(1) != data.num_features or y.shape[1:] != data.y.shape[1:]:
            raise DataError(
                "a batch of the loader does not fit the data",
                got=f"features of shape {tuple(x.shape)}, labels of shape {tuple(y.shape)}",
                expected=f"{data.num_features} features, labels {('n', *data.y.shape[1:])}",
                remedy="build the loader on the Data that make_loader is given",
            )
        wanted = torch.ones(x.size(0), dtype=torch.bool) if mask is None else mask.cpu()
        targets = true_positions(wanted[: x.size(0) if seeds is None else int(seeds)])
        if not targets.numel():
            return None
        device = data.x.device
        values = pyg_edge_values(item)
        if data.num_edge_features:  # else one column is a weight
            values = {name: getattr(item, name, None) for name in values}
        carried = {name: as_edge_values(name, value, x) for name, value in values.items()}
        graph = Adjacency(edges, x.size(0), **carried)
        x, graph = x.to(device), graph.to(device)
        graph.remember(x)
        y = y[targets.to(y.device)].to(device, data.y.dtype)
        return GraphBatch(x=x, graph=graph, y=y, targets=targets.to(device))


class _Indices:
    """The order in which a ``DataLoader`` takes its data, from the ``first`` batch on.

    What comes before is drawn at once and dropped, so that all of a pass's order comes from the
    random states in which the pass begins, wherever in it that may be.
    """

    def __init__(self, order: Iterable[Any]) -> None:
        self.order, self.first = order, 0

    def __iter__(self) -> Iterator[Any]:
        order = iter(self.order)
        drawn = list(islice(order, self.first + 1))
        return chain(drawn[self.first :], order)

    def __len__(self) -> int:
        return len(self.order)  # type: ignore[arg-type]  # a TypeError where it has none


def _skippable(loader: Iterable[Data]) -> _Indices | None:
    """Makes a ``DataLoader`` start wherever it is told to; None for what has no such order."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    if type(loader).__iter__ is not DataLoader.__iter__:
        return None
    name = "sampler" if loader.batch_sampler is None else "batch_sampler"
    indices = _Indices(getattr(loader, name))
    # A DataLoader allows no other order once it is made; this is the same one.
    vars(loader)[name] = indices
    return indices


def _pyg(data: GraphData) -> Data:
    data = data.to("cpu")
    masks = {f"{split}_mask": data.mask(split) for split in ("train", "val", "test")}
    out = Data(x=data.x, edge_index=data.edge_index, y=data.y, **masks)
    for name in ("edge_weight", "edge_attr"):
        if (values := getattr(data, name)) is not None:
            out[name] = values
    return out
