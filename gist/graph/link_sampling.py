"""Links that are held out, and pairs of nodes without a link, drawn by PyG.

PyG draws from the global random states of torch and Python. Here these start from a seed, and are
left as they were found.

Shape legend: ``E`` directed edges, ``K`` links, ``n`` negatives of each link, ``M`` negatives.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.transforms import RandomLinkSplit
from torch_geometric.utils import (
    coalesce,
    negative_sampling,
    structured_negative_sampling,
    structured_negative_sampling_feasible,
)

from gist.errors import ConfigError, DataError
from gist.graph.link_metrics import hits_of
from gist.partition.streams import stream_seed
from gist.random_states import RandomStates

_NEGATIVES_OF_EACH = 100


def links_of(edge_index: Tensor, num_nodes: int) -> Tensor:
    """The links of an undirected graph, each once: ``[2, K]`` with ``u < v``, in order.

    Self loops are none, and parallel edges are one.

    Args:
        edge_index: ``[2, E]``, both directions of each edge.
        num_nodes: Nodes of the graph.
    """
    links: Tensor = coalesce(edge_index[:, edge_index[0] < edge_index[1]], num_nodes=num_nodes)
    return links


def hold_out(
    links: Tensor, num_nodes: int, *, val_share: float, test_share: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Draws links for validation and for testing, and which node of each comes first.

    Args:
        links: ``[2, K]``, each once.
        num_nodes: Nodes of the graph.
        val_share: Share of the links.
        test_share: Likewise.
        seed: Names the draw.

    Returns:
        ``[2, K]`` of either split.
    """
    draw = RandomLinkSplit(
        val_share,
        test_share,
        is_undirected=True,
        split_labels=True,
        add_negative_train_samples=False,
        neg_sampling_ratio=0.0,
    )
    with RandomStates(stream_seed("links", seed)):
        _, *parts = draw(Data(edge_index=links.cpu(), num_nodes=num_nodes))
        each = [part.pos_edge_label_index for part in parts]
        val, test = (torch.where(torch.rand(p.size(1)) < 0.5, p, p.flip(0)) for p in each)
    return val.to(links.device), test.to(links.device)


def pairs_without_link(links: Tensor, num_nodes: int, count: int, *key: int | str) -> Tensor:
    """Different pairs of different nodes that are no links, from all pairs alike: ``[2, M]``.

    Less than ``count`` where there are no more, or no more are found in a few tries.

    Args:
        links: ``[2, K]`` with ``u < v``.
        num_nodes: Nodes of the graph.
        count: Pairs that are wanted.
        *key: Names the draw.
    """
    with RandomStates(stream_seed(*key)):
        both = negative_sampling(links, num_nodes, 2 * count, force_undirected=True)
    pairs: Tensor = both[:, : both.size(1) // 2]
    return pairs


def _nodes_without_link(
    pairs: Tensor, links: Tensor, num_nodes: int, count: int, *key: int | str
) -> Tensor:
    """``[K, n]``: for each pair, nodes without a link to its first one; some may come twice."""
    every = torch.cat([links, links.flip(0)], dim=1)
    if not structured_negative_sampling_feasible(every, num_nodes, contains_neg_self_loops=False):
        raise DataError(
            "a node has a link with every other, so that there is none to tell its links from",
            expected="for each node another one that it has no link with",
            remedy="use the metric hits@K, for which pairs are drawn from the whole graph",
        )
    wanted = pairs.repeat_interleave(count, dim=1)
    with RandomStates(stream_seed(*key)):
        drawn: Tensor = structured_negative_sampling(
            torch.cat([wanted, every], dim=1), num_nodes, contains_neg_self_loops=False
        )[2]
    return drawn[: wanted.size(1)].view(-1, count)


def negatives_for(
    pairs: Tensor,
    links: Tensor,
    num_nodes: int,
    metric: str,
    count: int | None,
    *key: int | str,
) -> Tensor:
    """What the links of a split are to be told from.

    Args:
        pairs: ``[2, K]``: the links of the split.
        links: All links of the graph, each once, with ``u < v``.
        num_nodes: Nodes of the graph.
        metric: ``"mrr"`` or ``"hits@K"``.
        count: Negatives of each link, or of all; None for 100 of each, or as many as links.
        *key: Names the draw.

    Returns:
        ``[K, n]`` nodes in place of the second of each pair for ``"mrr"``, ``[2, M]`` pairs for
        ``"hits@K"``.

    Raises:
        ConfigError: an unknown metric, or a ``count`` that is no number from 1 on.
        DataError: there are not so many.
    """
    if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
        raise ConfigError("num_negatives must be a whole number of at least 1", got=repr(count))
    if hits_of(metric) is None:
        count = count or _NEGATIVES_OF_EACH
        return _nodes_without_link(pairs, links, num_nodes, count, "negatives", *key)
    count = count or pairs.size(1)
    found = pairs_without_link(links, num_nodes, count, "negatives", *key)
    if found.size(1) < count:
        raise DataError(
            "the graph has fewer pairs without a link than are wanted",
            got=f"{found.size(1):,} pairs",
            expected=f"{count:,}",
            remedy="a smaller num_negatives",
        )
    return found
