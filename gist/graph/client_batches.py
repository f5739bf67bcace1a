"""The graphs of clients as batches: each sees its own nodes, and the edges between them.

Shape legend: ``N`` nodes, ``E`` stored edges, ``K`` clients, ``n`` nodes of a client.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gist.errors import DataError
from gist.graph.adjacency import Adjacency, offsets, true_positions
from gist.graph.batch import BatchRecipe, BatchSource, GraphBatch
from gist.graph.data import GraphData
from gist.graph.parts import Method, cut_graph
from gist.partition.streams import stream

_KEPT_BYTES = 2**30
"""What clients' graphs that are kept, with their products, may take."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ClientGraphs(BatchRecipe):
    """Every step of subnet ``i`` sees the graph of client ``i``: its nodes, and edges between them.

    Edges to nodes of other clients are lost, and degrees are those of what is left, since a client
    knows no more. The loss is taken over its training nodes. A client without any is refused: it
    would have nothing to train on. Subnets that share their batches all see client 0.

    Attributes:
        clients: ``[N]`` int64, the client of every node, numbered from 0 without gaps. In inductive
            training, of every training node.

    Raises:
        DataError: no numbers of clients.
    """

    clients: Tensor

    def __post_init__(self) -> None:
        given = self.clients
        if given.dtype != torch.int64 or given.dim() != 1 or not len(given) or given.min() < 0:
            raise DataError(
                "clients must hold one number for each node",
                got=f"{given.dtype} of shape {tuple(given.shape)}",
                expected="torch.int64 of shape [N], from 0 on",
            )

    def bind(self, data: GraphData) -> ClientGraphSource:
        """See :meth:`BatchRecipe.bind`.

        Raises:
            DataError: another number of nodes, or a client without a training node.
        """
        return ClientGraphSource(self, data)


class ClientGraphSource(BatchSource):
    """A graph whose nodes belong to clients.

    A client's graph is made when it is first asked for. Those that were used last are kept, up to
    1 GiB, so that memory does not grow with the number of clients.

    Args:
        recipe: Who has which nodes.
        data: The graph.

    Attributes:
        num_clients: ``K``.
        client_samples: ``[K]`` int64, training nodes of each client.
        edges_within: Share of the edges that some client has.
    """

    def __init__(self, recipe: ClientGraphs, data: GraphData) -> None:
        clients = recipe.clients.to(data.x.device)
        if len(clients) != data.num_nodes:
            raise DataError(
                "clients and graph disagree on the number of nodes",
                got=f"{len(clients):,} clients of nodes",
                expected=f"{data.num_nodes:,} nodes",
                remedy="in inductive training, clients[data.train_mask]",
            )
        self.data, self._clients = data, recipe.clients.cpu()
        self._order = torch.argsort(clients, stable=True)
        sizes = torch.bincount(clients)
        self.num_clients = len(sizes)
        self._start = offsets(sizes).tolist()
        self.client_samples = torch.bincount(
            clients[data.train_mask], minlength=self.num_clients
        ).cpu()
        if idle := true_positions(self.client_samples == 0).tolist():
            raise DataError(
                "there are clients without a training node",
                got=f"{len(idle):,} of {self.num_clients:,}, first client {idle[0]}",
                expected="at least one training node for each",
                remedy="fewer clients, or another split of the nodes",
            )
        rows, counts = data.adjacency.rows, data.adjacency.rows.counts()
        receiver = clients.repeat_interleave(counts, output_size=data.num_edges)
        within = receiver == clients.index_select(0, rows.indices)
        self.edges_within = int(within.sum()) / max(data.num_edges, 1)
        # Features with their product, and once more if sparse; edges in two normalised forms.
        row = data.num_features * data.x.element_size()
        edges = torch.bincount(receiver[within], minlength=self.num_clients)
        self._needed: list[int] = (sizes * (3 * row + 32) + edges * 32).tolist()
        self._kept: OrderedDict[int, GraphBatch] = OrderedDict()  # the one used last at the end
        self._held = 0

    @property
    def steps_per_epoch(self) -> int:
        """``K``: a step of every client sees each training node once."""
        return self.num_clients

    def batches(self, *, seed: int, round: int, subnet: int, steps: int) -> Iterator[GraphBatch]:
        """The graph of client ``subnet % K``, ``steps`` times."""
        batch = self.batch(subnet % self.num_clients)
        for _ in range(steps):
            yield batch

    def batch(self, client: int) -> GraphBatch:
        """The graph of a client."""
        if client in self._kept:
            self._kept.move_to_end(client)
            return self._kept[client]
        self._held += self._needed[client]
        while self._kept and self._held > _KEPT_BYTES:
            oldest, _ = self._kept.popitem(last=False)
            self._held -= self._needed[oldest]
        self._kept[client] = self._build(client)
        return self._kept[client]

    def nodes(self, client: int) -> Tensor:
        """``[n]`` int64: the nodes of a client, in the order of its batch."""
        return self._order[self._start[client] : self._start[client + 1]]

    def largest_batch(self) -> GraphBatch:
        """The graph that takes most."""
        return self.batch(max(range(self.num_clients), key=self._needed.__getitem__))

    @property
    def kept_bytes(self) -> int:
        """Of the graphs that are kept."""
        return min(sum(self._needed), max(_KEPT_BYTES, *self._needed))

    def describe(self) -> dict[str, Any]:
        """What identifies the clients."""
        return {
            "name": "ClientGraphs",
            "num_clients": self.num_clients,
            "clients": hashlib.sha256(self._clients.numpy().data).hexdigest()[:16],
            "edges_within": self.edges_within,
        }

    def _build(self, client: int) -> GraphBatch:
        data, nodes = self.data, self.nodes(client)
        rows = data.adjacency.rows.take(nodes)
        # As Adjacency.subgraph, but without a vector of all nodes: these are in rising order.
        own = nodes.to(rows.indices.dtype)
        place = torch.searchsorted(own, rows.indices).clamp_(max=len(own) - 1)
        inside = own[place] == rows.indices
        rows = rows._replace(indices=place.to(own.dtype)).keep(inside)
        graph = Adjacency.from_csr(*rows, part_of=data.adjacency)
        x = data.x[nodes]
        graph.remember(x)
        targets = true_positions(data.train_mask[nodes])
        every = len(targets) == len(nodes)
        y = data.y[nodes[targets]]
        return GraphBatch(x=x, graph=graph, y=y, targets=None if every else targets)


def spread_clusters(
    data: GraphData,
    num_clients: int,
    *,
    clusters_per_client: int = 1,
    method: Method = "metis",
    seed: int = 0,
    cache: str | os.PathLike[str] | bool = True,
) -> Tensor:
    """Cuts a graph, and deals its clusters to clients at random.

    Clusters with training nodes are dealt evenly, then the others.

    Args:
        data: The graph.
        num_clients: ``K``.
        clusters_per_client: Clusters of each, more or less: METIS may leave some empty. The more,
            the more edges are lost, and the more the clients are alike.
        method: See :func:`~gist.graph.parts.cut_graph`.
        seed: Of the deal. The cut is the same whatever it is, so that all runs share one.
        cache: See :func:`~gist.graph.parts.cut_graph`.

    Returns:
        ``[N]`` int64, the client of every node, on the CPU: for :class:`ClientGraphs`.

    Raises:
        ConfigError: more clusters than nodes.
        DataError: fewer clusters with training nodes than clients; or a damaged cache.
    """
    cut = cut_graph(data.adjacency, num_clients * clusters_per_client, method=method, cache=cache)
    numbers, cluster = torch.unique(cut, return_inverse=True)
    labelled = torch.zeros(len(numbers), dtype=torch.bool)
    labelled[cluster[data.train_mask.cpu()]] = True
    if int(labelled.sum()) < num_clients:
        raise DataError(
            "there are fewer clusters with training nodes than clients",
            got=f"{int(labelled.sum()):,} of {len(numbers):,} clusters, {num_clients:,} clients",
            remedy="fewer clients, or more clusters_per_client",
        )
    generator = stream("clients", seed)
    order = torch.cat(
        [
            places[torch.randperm(len(places), generator=generator)]
            for places in (true_positions(labelled), true_positions(~labelled))
        ]
    )
    client = torch.empty_like(order)
    client[order] = torch.arange(len(order)) % num_clients
    return client[cluster]
