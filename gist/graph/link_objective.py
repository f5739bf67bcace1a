"""Link prediction as an objective: an encoder of nodes, and dot products of what it puts out.

Shape legend: ``N`` nodes, ``n`` nodes of a batch, ``C`` columns of an embedding, ``m`` stacked
subnets, ``t`` pairs of a batch.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from gist.errors import ConfigError
from gist.graph.adjacency import Adjacency
from gist.graph.batch import BatchRecipe, FullGraph, GraphBatch
from gist.graph.clusters import Cluster, ClusterSource
from gist.graph.data import GraphData
from gist.graph.link_metrics import link_loss, link_metric, link_scores
from gist.graph.link_sampling import links_of, pairs_without_link
from gist.graph.links import HELD_OUT, LinkData
from gist.graph.objective import GraphObjective
from gist.metrics import refuse_diverged


class LinkBatch(GraphBatch):
    """One training step's share of a graph, and pairs of its nodes.

    Attributes:
        targets: ``[2, t]`` int64: pairs of nodes of the batch.
        y: ``[t]``: 1 for a link, 0 for none.
    """

    def outputs(self, out: Tensor) -> Tensor:
        """Scores ``[t, 1]`` of the pairs, of embeddings ``[n, C]``; stacked ``[t, m, 1]``."""
        assert self.targets is not None
        return link_scores(out, self.targets).unsqueeze(-1)


class LinkObjective(GraphObjective):
    """Binary cross entropy on the links of a batch, and on as many pairs without one.

    The model puts out embeddings, of any width; the score of a pair is the dot product of two. With
    independent subnets it is as well defined as with one model: output units are not partitioned,
    so every subnet puts out embeddings of the whole width, and the loss is taken of these.

    Messages pass along the training links, and the same links are what a step learns to tell from
    pairs without one. These are drawn anew in every step, among the nodes of the batch, by PyG's
    ``negative_sampling``: what is drawn depends on (seed, round, subnet, step) alone. A pair held
    out for validation or testing may be among them, since training does not know these.

    Args:
        data: The graph and its links.
        device: Where the model lives.
        batches: ``FullGraph`` or ``Cluster``; the whole graph by default.
        inductive: Refused.
        evaluation: As for :class:`GraphObjective`.

    Attributes:
        links: The data, on ``device``.

    Raises:
        ConfigError: batches without the edges between their nodes, or of single nodes; inductive
            training.
    """

    scores_edges = True

    def __init__(
        self,
        data: LinkData,
        device: torch.device,
        batches: BatchRecipe | None = None,
        *,
        inductive: bool = False,
        evaluation: str = "auto",
    ) -> None:
        if inductive:
            raise ConfigError(
                "inductive training is on the subgraph of the training nodes: links have none",
                got="inductive=True",
                remedy="leave it out; links that are held out are never seen in training",
            )
        if not isinstance(batches or FullGraph(), FullGraph | Cluster):
            raise ConfigError(
                "link prediction needs batches with all edges between their nodes",
                got=type(batches).__name__,
                expected="FullGraph or Cluster",
                remedy="give clusters, the number of parts, or no batches",
            )
        self.links = data.to(device)
        self._links_of: WeakKeyDictionary[Adjacency, Tensor] = WeakKeyDictionary()
        super().__init__(_as_nodes(self.links.graph), device, batches, evaluation=evaluation)
        if isinstance(self.source, ClusterSource):
            smallest = int(self.source.parts.bincount().min())
            if smallest < 2:
                raise ConfigError(
                    "a cluster has one node alone, so that it may be a batch without a pair",
                    got=f"{self.source.num_clusters} clusters of {data.num_nodes} nodes",
                    remedy="fewer clusters",
                )

    def batches(self, *, seed: int, round: int, subnet: int, steps: int) -> Iterator[GraphBatch]:
        """The ``steps`` batches of one subnet in one round, with their pairs."""
        every = super().batches(seed=seed, round=round, subnet=subnet, steps=steps)
        for step, batch in enumerate(every):
            yield self._with_pairs(batch, seed, round, subnet, step)

    def largest_batch(self) -> GraphBatch:
        """See :meth:`GraphObjective.largest_batch`."""
        return self._with_pairs(super().largest_batch(), 0)

    def _with_pairs(self, batch: GraphBatch, *key: int) -> LinkBatch:
        """The same batch with its links, and as many pairs without one, drawn under the key."""
        graph = batch.graph
        assert isinstance(graph, Adjacency)
        links = self._links_of.get(graph)
        if links is None:  # of the whole graph, and of clusters that are kept, once for a run
            links = self._links_of[graph] = links_of(graph.edge_index, graph.num_nodes)
        count = max(links.size(1), 1)  # a mean over no pair at all is undefined
        others = pairs_without_link(links, graph.num_nodes, count, "pairs", *key)
        y = torch.cat([batch.x.new_ones(links.size(1)), batch.x.new_zeros(others.size(1))])
        return LinkBatch(x=batch.x, graph=graph, y=y, targets=torch.cat([links, others], dim=1))

    def measure(self, scores: Tensor) -> dict[str, float]:
        """Metric on the links held out, and the validation loss, of embeddings ``[N, C]``.

        There is none on the training links: no pairs are drawn to tell them from.
        """
        refuse_diverged(int((~torch.isfinite(scores)).sum()), scores.numel())
        of = {name: self.links.scores(scores, name) for name in HELD_OUT}
        out = {f"{name}_metric": link_metric(self.links.metric, *of[name]) for name in HELD_OUT}
        return {**out, "val_loss": link_loss(*of["val"])}

    def fingerprint(self) -> str:
        """Identifies the data."""
        return self.links.fingerprint()

    def _check_width(self, model: nn.Module, out: Tensor) -> None:
        """Any width will do, and is from now on that of ``data``."""
        self.data = _as_nodes(self.links.graph, out.shape[-1:].numel())
        super()._check_width(model, out)


def _as_nodes(graph: GraphData, width: int = 1) -> GraphData:
    """What recipes and costs see: a graph all of whose nodes train, with ``width`` outputs."""
    nodes = copy.copy(graph)  # checked already; the constructor wants every split
    every = torch.ones_like(graph.train_mask)
    known: dict[str, Any] = {
        "y": graph.x.new_zeros(1, 1).expand(graph.num_nodes, width),
        "task": "multilabel",
        "metric": "micro_f1",
        "num_classes": width,
        "train_mask": every,
        "val_mask": ~every,
        "test_mask": ~every,
    }
    for name, value in known.items():
        object.__setattr__(nodes, name, value)
    return nodes
