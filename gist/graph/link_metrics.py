"""How well scores tell links from other pairs of nodes, as the Open Graph Benchmark measures it.

Shape legend: ``N`` nodes, ``C`` columns of an embedding, ``m`` stacked subnets, ``K`` pairs, ``n``
negatives of each link, ``M`` negatives that all links share.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gist.errors import ConfigError, DataError
from gist.graph import convert

_CHUNK_ENTRIES = 2**20
"""Entries of embeddings that are multiplied at a time."""


def link_scores(z: Any, pairs: Any) -> Tensor:
    """Dot products of the embeddings of pairs of nodes: ``z_u · z_v``, the logit of a link.

    Gradients are added up in the order of the pairs, on the CPU the same on any number of threads.

    Args:
        z: ``[N, C]`` embeddings, as a tensor, an array or lists; of ``m`` stacked subnets
            ``[N, m, C]``.
        pairs: ``[2, K]`` numbers of nodes, likewise.

    Returns:
        ``[K]``; ``[K, m]`` of stacked subnets.

    Raises:
        DataError: something else is given as pairs or embeddings.
    """
    rows: Tensor = z if isinstance(z, Tensor) else convert.as_tensor("z", z)  # keeps gradients
    nodes = convert.as_tensor("pairs", pairs)
    if nodes.dtype not in (torch.int32, torch.int64) or nodes.dim() != 2 or nodes.size(0) != 2:
        raise DataError(
            "pairs must hold numbers of nodes",
            got=f"{nodes.dtype} of shape {tuple(nodes.shape)}",
            expected="whole numbers of shape (2, K)",
        )
    first, second = (rows.index_select(0, ends) for ends in nodes.to(rows.device))
    return (first * second).sum(dim=-1)


@torch.no_grad()
def rank_scores(z: Tensor, pairs: Tensor) -> Tensor:
    """What :func:`link_scores` gives, some at a time: for more pairs than there is room for.

    Args:
        z: ``[N, C]`` embeddings.
        pairs: ``[2, ...]`` int64.

    Returns:
        ``[...]``.
    """
    most = max(_CHUNK_ENTRIES // z.size(1), 1)
    parts = [link_scores(z, some) for some in torch.split(pairs.flatten(1), most, dim=1)]
    return torch.cat(parts).view(pairs.shape[1:])


def hits_of(metric: str) -> int | None:
    """K of the metric ``"hits@K"``; None of ``"mrr"``.

    Raises:
        ConfigError: any other metric.
    """
    found = re.fullmatch(r"hits@([1-9][0-9]*)", str(metric))
    if found is None and metric != "mrr":
        raise ConfigError(
            "unknown metric of link prediction",
            got=repr(metric),
            expected="'mrr', or 'hits@K' with a whole number K, such as 'hits@50'",
        )
    return None if found is None else int(found[1])


def link_metric(metric: str, positive: Tensor, negative: Tensor) -> float:
    """Measures scores of links against those of other pairs.

    - ``mrr``: the mean of ``1 / rank`` of each link among its own negatives. A tie counts half:
      ``rank = 1 + (#{larger} + #{larger or equal}) / 2``.
    - ``hits@K``: the share of links that score higher than the ``K``-th best negative, of those
      that all links share.

    Both are what the Open Graph Benchmark computes (Hu et al., NeurIPS 2020).

    Args:
        metric: ``"mrr"`` or ``"hits@K"``.
        positive: ``[K]`` scores of links.
        negative: ``[K, n]`` for ``mrr``; ``[M]``, at least K of them, for ``hits@K``.

    Returns:
        A number between 0 and 1.

    Raises:
        ConfigError: the metric is unknown.
    """
    hits = hits_of(metric)
    if hits is not None:
        return float((positive > negative.topk(hits).values[-1]).sum()) / len(positive)
    own = positive[:, None]
    ranks = 1 + 0.5 * ((negative > own).sum(dim=1) + (negative >= own).sum(dim=1))
    return float(ranks.reciprocal().mean())


def link_loss(positive: Tensor, negative: Tensor) -> float:
    """Mean binary cross entropy of scores; all links count as much as all other pairs."""
    return float(F.softplus(-positive).mean() + F.softplus(negative).mean()) / 2
