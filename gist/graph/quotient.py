"""A graph seen from afar: one node for each of its parts, to look at or to plot.

Shape legend: ``N`` nodes, ``E`` stored edges, ``c`` parts.
"""

from __future__ import annotations

import networkx as nx
import numpy as np
import scipy.sparse as sp
from torch import Tensor

from gist.errors import DataError
from gist.graph.adjacency import Adjacency


def quotient_graph(
    adjacency: Adjacency, parts: Tensor, train_mask: Tensor | None = None
) -> nx.Graph:
    """The parts of a graph, and what lies between them.

    Edges are counted as they are stored, an undirected one twice: those inside parts and those
    between them are ``E`` together.

    Args:
        adjacency: The graph.
        parts: ``[N]`` whole numbers from 0, the part of every node, as
            :func:`~gist.graph.parts.cut_graph` gives them.
        train_mask: ``[N]`` bool, the training nodes.

    Returns:
        Nodes 0 to ``c - 1`` with the attributes ``size`` (nodes of the part), ``edges`` (inside it)
        and, with a mask, ``train`` (training nodes of it). An edge joins two parts where the graph
        has edges from one to the other; its attributes are ``edges``, their number in either
        direction, and ``weight``, the sum of their weights, the same in an unweighted graph.

    Raises:
        DataError: ``parts`` are not the parts of this graph.
    """
    if parts.shape != (adjacency.num_nodes,) or parts.is_floating_point() or int(parts.min()) < 0:
        raise DataError(
            "parts must be a number from 0 for every node",
            got=f"{parts.dtype} of shape {tuple(parts.shape)}",
            expected=f"whole numbers of shape ({adjacency.num_nodes},)",
        )
    part = parts.cpu().numpy()
    numbers = {"size": np.bincount(part)}
    c = len(numbers["size"])
    if train_mask is not None:
        numbers["train"] = np.bincount(part[train_mask.cpu().numpy()], minlength=c)
    rows = adjacency.rows.to("cpu")
    ends = np.repeat(part, rows.counts().numpy()), part[rows.indices.numpy()]
    pairs = np.minimum(*ends), np.maximum(*ends)

    def added_up(values: np.ndarray) -> sp.csr_array:
        return sp.coo_array((values, pairs), shape=(c, c)).tocsr()

    count = added_up(np.ones(adjacency.num_edges, dtype=np.int64))
    numbers["edges"] = count.diagonal()
    weight = count if rows.weight is None else added_up(rows.weight.double().numpy())
    graph = nx.from_scipy_sparse_array(sp.triu(count, k=1), edge_attribute="edges")
    for name, values in numbers.items():
        nx.set_node_attributes(graph, dict(enumerate(values.tolist())), name)
    between = sp.triu(weight, k=1).tocoo()
    joined = zip(between.row.tolist(), between.col.tolist(), strict=True)
    nx.set_edge_attributes(graph, dict(zip(joined, between.data.tolist(), strict=True)), "weight")
    return graph
