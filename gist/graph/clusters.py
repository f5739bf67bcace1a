"""Clusters of a graph as mini-batches (Cluster-GCN: Chiang et al., KDD 2019).

Shape legend: ``N`` nodes, ``E`` stored edges, ``c`` clusters, ``q`` clusters of a batch, ``n``
nodes of a batch, ``F`` features.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from typing import Any, Literal

import networkx as nx
import torch
from torch import Generator, Tensor, nn

from gist.errors import ConfigError
from gist.graph.adjacency import Adjacency, Form, Rows, offsets, true_positions
from gist.graph.batch import BatchRecipe, BatchSource, GraphBatch, passes
from gist.graph.data import GraphData
from gist.graph.layout import lay_out
from gist.graph.parts import METHODS, Method
from gist.graph.prefetch import prefetched
from gist.graph.quotient import quotient_graph

NORMALIZATIONS = ("batch", "full")

_KEPT_BYTES = 2**30
"""What single clusters that are built once and kept, with their products, may take."""


@dataclass(frozen=True, kw_only=True)
class Cluster(BatchRecipe):
    """A batch is the union of a few clusters, with all edges between its nodes.

    One pass deals every cluster to a batch at random (stochastic multiple partitions: Chiang et
    al., 2019, section 3.2). Batches hold ``parts_per_batch`` clusters, or one less where they do
    not divide the number of clusters, and at least one cluster with training nodes: such clusters
    are dealt evenly. Where these are fewer than the batches, there is one batch for each, and what
    does not fit into these is left out of the pass.

    Attributes:
        num_parts: Clusters to cut the graph into.
        parts_per_batch: Clusters of a batch.
        method: ``"metis"`` cuts few edges; ``"random"`` deals nodes at random.
        normalization: Degrees that normalise a batch: ``"batch"``, of the batch itself as in
            Cluster-GCN, or ``"full"``, of the whole graph.
        seed: Of the cut alone, so that all runs on a graph share one.
        cache: Where METIS cuts are kept: a folder; True for the cache folder of the datasets, if
            that exists; False for nowhere.

    Raises:
        ConfigError: a value that cannot be used.
    """

    num_parts: int
    parts_per_batch: int = 1
    method: Method = "metis"
    normalization: Literal["batch", "full"] = "batch"
    seed: int = 0
    cache: str | os.PathLike[str] | bool = True

    def __post_init__(self) -> None:
        for name, least in (("num_parts", 1), ("parts_per_batch", 1), ("seed", 0)):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole or not least <= value < 2**31:
                raise ConfigError(
                    f"{name} must be a whole number of at least {least}", got=repr(value)
                )
        if self.parts_per_batch > self.num_parts:
            raise ConfigError(
                "a batch cannot hold more clusters than there are",
                got=f"num_parts={self.num_parts}, parts_per_batch={self.parts_per_batch}",
            )
        for name, choices in (("method", METHODS), ("normalization", NORMALIZATIONS)):
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"unknown {name}", got=repr(getattr(self, name)), expected=" or ".join(choices)
                )

    def bind(self, data: GraphData) -> ClusterSource:
        """See :meth:`BatchRecipe.bind`.

        Raises:
            ConfigError: more clusters than nodes.
            DataError: the cached cut is damaged, or one of another graph.
        """
        return ClusterSource(self, data)


class ClusterSource(BatchSource):
    """A graph whose nodes are laid out cluster by cluster, so that batches are made of slices.

    Args:
        recipe: Settings.
        data: The graph.

    Attributes:
        parts: ``[N]`` int64, the cluster of every node.
        num_clusters: ``c``; parts that METIS left empty do not count.
        edges_within: Share of the edges that lie within a cluster.
        kept_edges: Share of the edges that one pass over the clusters is expected to see: those
            within a cluster, and those between two that are dealt to the same batch.
    """

    def __init__(self, recipe: Cluster, data: GraphData) -> None:
        self.recipe = recipe
        layout = lay_out(
            data, recipe.num_parts, method=recipe.method, seed=recipe.seed, cache=recipe.cache
        )
        self.parts, self.num_clusters = layout.parts, layout.starts.numel() - 1
        self.edges_within = layout.edges_within
        self._order, self._x, rows = layout.order, layout.x, layout.rows
        self._start = layout.starts.tolist()
        self._graph = Adjacency.from_csr(*rows, part_of=data.adjacency)
        self._counts = rows.counts()
        self._entry = rows.indptr.index_select(0, layout.starts).tolist()
        self._cluster = layout.parts.to(self._order.device, rows.indices.dtype)[self._order]

        self._train = true_positions(data.train_mask[self._order])
        self._y = data.y[self._order[self._train]]
        self._first_target = torch.searchsorted(self._train, layout.starts).tolist()
        has_targets = torch.tensor([b > a for a, b in pairwise(self._first_target)])
        self._labelled = true_positions(has_targets)
        self._unlabelled = true_positions(~has_targets)

        batches = -(-self.num_clusters // recipe.parts_per_batch)
        self._steps_per_epoch = min(batches, self._labelled.numel())
        self._most = min(self.num_clusters, self._steps_per_epoch * recipe.parts_per_batch)
        self.kept_edges = self._kept_share()
        self._scales: dict[tuple[Form, torch.dtype], Tensor] = {}
        self._forms: frozenset[Form] = frozenset()
        self._kept: dict[int, GraphBatch] = {}
        self._keepable = self._fits() if recipe.parts_per_batch == 1 else 0

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one pass: ``c / q`` rounded up, or the clusters with training nodes."""
        return self._steps_per_epoch

    def batches(self, *, seed: int, round: int, subnet: int, steps: int) -> Iterator[GraphBatch]:
        """Batches of shuffled passes over the clusters: see :func:`~gist.graph.batch.passes`."""
        groups = passes(
            self.deal,
            steps_per_epoch=self.steps_per_epoch,
            seed=seed,
            round=round,
            subnet=subnet,
            steps=steps,
        )
        if self._keepable == self.num_clusters:
            yield from map(self.batch, groups)
            return
        for batch in prefetched(self._prepared(group) for group in groups):
            yield batch
            assert isinstance(batch.graph, Adjacency)
            self._forms |= batch.graph.remembered(batch.x)

    def deal(self, generator: Generator) -> Sequence[list[int]]:
        """The clusters of each batch of one pass, in rising order."""
        labelled, unlabelled = (
            clusters[torch.randperm(clusters.numel(), generator=generator)]
            for clusters in (self._labelled, self._unlabelled)
        )
        order = torch.cat([labelled, unlabelled])[: self._most]
        step = self.steps_per_epoch
        return [order[first::step].sort().values.tolist() for first in range(step)]

    def batch(self, clusters: Sequence[int]) -> GraphBatch:
        """The union of the given clusters: the subgraph that their nodes induce.

        Args:
            clusters: Different numbers in ``[0, c)``; nodes come in their order.
        """
        if len(clusters) > 1 or clusters[0] >= self._keepable:
            return self._build(clusters)
        if clusters[0] not in self._kept:
            self._kept[clusters[0]] = self._build(clusters)
        return self._kept[clusters[0]]

    def largest_batch(self) -> GraphBatch:
        """The union of the clusters that take most."""
        size = -(-self._most // self.steps_per_epoch)
        return self.batch(self._needed().topk(size).indices.sort().values.tolist())

    @property
    def kept_bytes(self) -> int:
        """Of the clusters that are kept, or of the largest batch, which may be made ahead."""
        needed = self._needed()
        if self._keepable == self.num_clusters:
            return int(needed.sum())
        size = -(-self._most // self.steps_per_epoch)
        return int(needed[: self._keepable].sum() + needed.topk(size).values.sum())

    def nodes(self, clusters: Sequence[int]) -> Tensor:
        """``[n]``: the nodes of the union, as the whole graph numbers them, in its order."""
        return _joined(self._order, self._spans(self._start, clusters))

    def quotient(self) -> nx.Graph:
        """The clusters and what lies between them: see :func:`~gist.graph.quotient.quotient_graph`.

        They have the numbers that batches are made of.
        """
        train = torch.zeros_like(self._cluster, dtype=torch.bool)
        train[self._train] = True
        return quotient_graph(self._graph, self._cluster, train)

    def describe(self) -> dict[str, Any]:
        """Settings, and what identifies the cut."""
        settings = asdict(self.recipe)
        del settings["cache"]
        return {
            "name": "Cluster",
            **settings,
            "cut": hashlib.sha256(self.parts.numpy().data).hexdigest()[:16],
            "edges_within": self.edges_within,
            "kept_edges": self.kept_edges,
        }

    def check(self, model: nn.Module) -> None:
        """Refuses models whose layers normalise for themselves where the whole graph should.

        Raises:
            ConfigError: see above.
        """
        if self.recipe.normalization == "full" and not getattr(model, "accepts_adjacency", False):
            raise ConfigError(
                f"{type(model).__name__} is given the edges of a batch and normalises by these",
                got="normalization='full'",
                expected="normalization='batch'",
                remedy="use that, or a model of gist.nn",
            )

    def _prepared(self, clusters: Sequence[int]) -> GraphBatch:
        batch = self.batch(clusters)
        assert isinstance(batch.graph, Adjacency)
        if not batch.graph.remembered(batch.x):  # the products that the last batch needed
            batch.graph.remember(batch.x, self._forms)
        return batch

    def _build(self, clusters: Sequence[int]) -> GraphBatch:
        spans = self._spans(self._start, clusters)
        starts = list(accumulate((b - a for a, b in spans), initial=0))[:-1]
        # How far each cluster's nodes move; those of other clusters move below zero.
        moves = torch.tensor(starts) - torch.tensor([a for a, _ in spans])
        shift = torch.full((self.num_clusters,), -self._x.size(0), dtype=self._cluster.dtype)
        shift[list(clusters)] = moves.to(shift.dtype)
        shift = shift.to(self._cluster.device)

        entries = self._spans(self._entry, clusters)
        _, indices, weight, attr = self._graph.rows
        sources = _joined(indices, entries)
        cluster = self._cluster.index_select(0, sources)
        moved = sources + shift.index_select(0, cluster)
        rows = Rows(
            offsets(_joined(self._counts, spans)),
            moved,
            None if weight is None else _joined(weight, entries),
            None if attr is None else _joined(attr, entries),
        ).keep(moved >= 0)
        full = self.recipe.normalization == "full"
        graph = Adjacency.from_csr(
            *rows,
            part_of=self._graph,
            node_scale=(lambda *key: _joined(self._scale(*key), spans)) if full else None,
        )
        x = _joined(self._x, spans)
        graph.remember(x)
        labels = self._spans(self._first_target, clusters)
        targets = _joined(self._train, labels)
        counts = torch.tensor([b - a for a, b in labels])
        repeated = moves.repeat_interleave(counts, output_size=targets.numel())
        targets = targets + repeated.to(targets.device)
        every = targets.numel() == x.size(0)
        y = _joined(self._y, labels)
        return GraphBatch(x=x, graph=graph, y=y, targets=None if every else targets)

    def _scale(self, form: Form, dtype: torch.dtype) -> Tensor:
        if (form, dtype) not in self._scales:
            self._scales[form, dtype] = self._graph.node_scale(form, dtype)
        return self._scales[form, dtype]

    def _kept_share(self) -> float:
        if self.num_clusters == 1:
            return 1.0
        small, more = divmod(self._most, self.steps_per_epoch)
        pairs = more * (small + 1) * small + (self.steps_per_epoch - more) * small * (small - 1)
        together = pairs / (self.num_clusters * (self.num_clusters - 1))
        dealt = self._most / self.num_clusters
        return self.edges_within * dealt + (1 - self.edges_within) * together

    def _fits(self) -> int:
        """How many clusters, the first ones, can be kept with what training makes of them."""
        return int((self._needed().cumsum(0) <= _KEPT_BYTES).sum())

    def _needed(self) -> Tensor:
        """``[c]``: about the bytes that each cluster takes as a batch, with its products."""
        # Features twice (product and, sparse, their own), edges in two normalised forms.
        nodes = torch.tensor(self._start).diff()
        edges = torch.tensor(self._entry).diff()
        row = self._x.size(1) * self._x.element_size()
        return nodes * (2 * row + 32) + edges * 32

    @staticmethod
    def _spans(bounds: Sequence[int], clusters: Sequence[int]) -> list[tuple[int, int]]:
        return [(bounds[c], bounds[c + 1]) for c in clusters]


def _joined(tensor: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    """Slices of a tensor, one after the other; a single one is not copied."""
    parts = [tensor[first:last] for first, last in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
