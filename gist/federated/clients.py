"""Who has which data: the data side of a federated run.

Shape legend: ``K`` clients, ``C`` classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.data import Data

from gist.config import FederatedConfig, GraphConfig, SampleConfig
from gist.csr import is_csr
from gist.errors import ConfigError, DataError
from gist.federated.local import client_metrics
from gist.federated.splits import SPLITS, label_counts, make_split, owners_of
from gist.graph.client_batches import ClientGraphs, spread_clusters
from gist.graph.data import GraphData
from gist.graph.dgl_graph import is_from
from gist.graph.objective import GraphObjective
from gist.samples.data import SampleData
from gist.samples.objective import SampleObjective

_CLUSTERS_PER_CLIENT = (1, 2, 4)
"""Of METIS cuts, tried in turn."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Clients:
    """The clients' data.

    Attributes:
        objective: Batches, by client and its own task; and loss.
        parts: Of each client, positions among the training samples; of a graph, numbers of nodes.
        samples: Training samples of each client.
        classes: ``[K, C]`` bool: which classes each has training samples of; None where labels are
            no class numbers.
    """

    objective: SampleObjective | GraphObjective
    parts: Sequence[Tensor]
    samples: Sequence[float]
    classes: Tensor | None

    @property
    def largest(self) -> int:
        """The client with most samples."""
        return max(range(len(self.samples)), key=self.samples.__getitem__)

    def describe(self) -> dict[str, Any]:
        """What is trained on, as JSON values."""
        return self.objective.describe()

    def metrics(self, model: nn.Module) -> dict[str, Any]:
        """Mean and worst of the clients' metrics on their own data, as JSON values."""
        found = client_metrics(self.objective, model, self.parts)
        return {"mean": found.mean, "worst": found.worst, "measured_on": found.measured_on}

    def predict(self, model: nn.Module, x: Tensor | str | Any = None) -> Tensor:
        """Scores of samples, of the test split by default; or of every node of the graph.

        Raises:
            ConfigError: samples of another form, or samples for a graph.
        """
        if isinstance(self.objective, SampleObjective):
            return self.objective.predict(model, "test" if x is None else x)
        if x is not None:
            raise ConfigError("the nodes of the graph are scored, all of them", remedy="predict()")
        return self.objective.predict(model)


def is_graph(data: Any) -> bool:
    """Whether this is a graph, in any form that :meth:`GraphData.of` takes."""
    kind: type = type(data)
    return isinstance(data, GraphData | Data) or is_from(kind, "dgl") or is_from(kind, "ogb")


def clients_of_samples(
    data: SampleData,
    device: torch.device,
    config: FederatedConfig,
    samples: SampleConfig,
    *,
    local_steps: int,
    seed: int,
) -> Clients:
    """Deals the training samples to the clients.

    Raises:
        ConfigError: a split that cannot be made, or settings that clients have no use for.
    """
    if samples.shards:
        raise ConfigError("shards are those of subnets; clients have a split", remedy="give split")
    if config.split == "clusters":
        raise ConfigError(
            "clusters are of the nodes of a graph, and these are samples",
            got="split='clusters'",
            expected=" or ".join(SPLITS),
        )
    labels = data.labels(data.train)
    parts = make_split(config.split).split(labels, config.clients, seed=seed)
    objective = SampleObjective(
        data, device, samples, num_subnets=1, local_steps=local_steps, parts=parts
    )
    return Clients(
        objective=objective,
        parts=parts,
        samples=[len(part) for part in parts],
        classes=_present(labels, parts, data.num_classes),
    )


def clients_of_graph(
    data: GraphData,
    device: torch.device,
    config: FederatedConfig,
    graph: GraphConfig,
    *,
    local_steps: int,
    seed: int,
) -> Clients:
    """Deals the nodes to the clients.

    Raises:
        ConfigError: a split that cannot be made, or settings that clients have no use for.
        DataError: a client without training nodes.
    """
    del local_steps
    if graph.clusters is not None or graph.batches is not None or graph.inductive:
        raise ConfigError(
            "a client's batch is its part of the graph",
            got=f"clusters={graph.clusters}, batches={graph.batches}, inductive={graph.inductive}",
            remedy="leave them out, and give split and clients",
        )
    if config.split == "clusters":
        owner = _spread(data, config.clients, seed)
    else:
        parts = make_split(config.split, others=["clusters"]).split(
            data.y, config.clients, seed=seed
        )
        owner = owners_of(parts, data.num_nodes)
    order = torch.argsort(owner, stable=True)
    parts = torch.split(order, torch.bincount(owner, minlength=config.clients).tolist())
    objective = GraphObjective(
        data, device, ClientGraphs(clients=owner), evaluation=graph.evaluation
    )
    train = data.train_mask.cpu()
    own = [part[train[part]] for part in parts]
    return Clients(
        objective=objective,
        parts=parts,
        samples=[len(part) for part in own],
        classes=_present(data.y, own, data.num_classes),
    )


def _present(labels: Tensor, parts: Sequence[Tensor], num_classes: int) -> Tensor | None:
    """``[K, C]`` bool: which classes each client has."""
    if labels.dim() != 1 or is_csr(labels) or labels.is_floating_point():
        return None
    return label_counts(labels, parts, num_classes) > 0


def _spread(data: GraphData, clients: int, seed: int) -> Tensor:
    """The client of every node, of as few clusters each as give every client a training node."""
    for each in _CLUSTERS_PER_CLIENT[:-1]:
        try:
            return spread_clusters(data, clients, clusters_per_client=each, seed=seed)
        except (ConfigError, DataError):
            continue
    return spread_clusters(data, clients, clusters_per_client=_CLUSTERS_PER_CLIENT[-1], seed=seed)
