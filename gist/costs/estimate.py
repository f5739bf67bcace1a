"""What a run takes, estimated before anything is allocated."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from gist.config import GraphConfig, SampleConfig, TrainConfig, split_settings
from gist.costs.already import bytes_already
from gist.costs.costs import Costs
from gist.costs.graph_run import GraphRun
from gist.costs.sample_run import SampleRun
from gist.errors import ConfigError
from gist.graph.clusters import Cluster
from gist.graph.data import GraphData
from gist.graph.outline import GraphShape, OutlineObjective
from gist.partition.spec import model_tensors
from gist.partition.wiring import Wiring, partition_spec
from gist.samples.data import SampleData
from gist.samples.outline import OutlineSamples, SampleShape


def estimate_costs(
    model: nn.Module,
    data: GraphData | GraphShape | SampleData | SampleShape,
    *,
    wiring: Wiring | None = None,
    workers: int = 1,
    device: torch.device | str = "cpu",
    config: TrainConfig | None = None,
    **settings: Any,
) -> Costs:
    """What training a model takes, before anything is allocated.

    The run is rehearsed on tensors without memory, so neither the data nor the model need to be
    there: ``data`` may be sizes, and the model built under ``torch.device("meta")``. That takes
    seconds, however large they are.

    >>> with torch.device("meta"):
    ...     model = GraphSAGE(100, 32_768, 47, num_layers=3)
    >>> shape = GraphShape(num_nodes=2_449_029, num_edges=123_718_280, num_features=100,
    ...                    num_classes=47)
    >>> costs = estimate_costs(model, shape, num_subnets=8, clusters=15_000, clusters_per_batch=10)
    >>> costs.peak_memory_bytes, costs.flops_ratio

    Args:
        model: As for the trainer; left as it is.
        data: A graph or samples, or their sizes.
        wiring: As for the trainer; ResIST and LoFT have :func:`gist.wire_blocks` and
            :func:`gist.wire_filters`.
        workers: Processes that the subnets are spread over; see :class:`Costs`.
        device: Where the run is to be.
        config: Settings of the training; or give them as keywords.
        **settings: As for :class:`~gist.GISTTrainer`, or for :class:`~gist.SampleTrainer`.

    Raises:
        ConfigError: settings that cannot be used, or a model whose memory depends on the values of
            its data.
        PartitionError: a model that cannot be partitioned, or not into that many subnets.
    """
    on_graph = isinstance(data, GraphData | GraphShape)
    kind: Any = GraphConfig if on_graph else SampleConfig
    own, training = split_settings(settings, kind, TrainConfig)
    if config is not None and training:
        raise ConfigError("give either config or settings", got=sorted(training))
    data_config = kind(**own)
    config = config or TrainConfig.from_settings(training)
    device = torch.device(device)
    there = [*model_tensors(model).values()]
    if isinstance(data, GraphData):
        there += data.tensors()
    elif isinstance(data, SampleData):
        there += [data.x, data.y]
    given: dict[str, Any] = {
        "device": device,
        "counted": bytes_already(there, device),
        "workers": workers,
    }
    spec = partition_spec(model, wiring)
    if isinstance(data, GraphData | GraphShape):
        shape = data if isinstance(data, GraphShape) else GraphShape.of(data)
        outline = partial(_outline_of_graph, shape, device, data_config)
        how = data_config.evaluation
        run = GraphRun(model, spec, outline, config, evaluation=how, **given)
        return run.costs([*_graph_notes(data_config)])
    sizes = data if isinstance(data, SampleShape) else SampleShape.of(data)
    most = max(m for _, m in config.phases)
    samples = partial(OutlineSamples, sizes, device, data_config, num_subnets=most)
    return SampleRun(model, spec, samples, config, **given).costs()


def _outline_of_graph(
    shape: GraphShape, device: torch.device, config: GraphConfig
) -> OutlineObjective:
    clusters, per_batch = _clusters(config) or (None, 1)
    return OutlineObjective.of_shape(
        shape,
        device,
        clusters=clusters,
        clusters_per_batch=per_batch,
        inductive=config.inductive,
    )


def _clusters(config: GraphConfig) -> tuple[int, int] | None:
    if isinstance(config.batches, Cluster):
        return config.batches.num_parts, config.batches.parts_per_batch
    return None if config.clusters is None else (config.clusters, config.clusters_per_batch)


def _graph_notes(config: GraphConfig) -> Iterator[str]:
    if _clusters(config) is not None:
        yield (
            "clusters are taken to be of equal size and to keep all edges into their nodes; how "
            "many are cut is known once the graph is cut"
        )
    elif config.batches is not None:
        yield (
            f"batches of {type(config.batches).__name__} are known once the graph is there: "
            "planned as if every step saw all of it"
        )
