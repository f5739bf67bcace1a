"""Evaluation of a model whose parameters are spread over ranks, on all of them.

Brings :mod:`gist.graph.spread`, which knows graphs and no processes, together with
:mod:`gist.execution.shards`, which knows processes and no graphs.

Shape legend: ``N`` nodes, ``F`` features, ``C`` classes, ``W`` ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gist.batchnorm import tracks_statistics
from gist.config import TrainConfig
from gist.errors import ConfigError
from gist.execution.comm import Pending
from gist.execution.distributed import ShardedStore
from gist.execution.shards import Shards
from gist.graph.adjacency import Adjacency
from gist.graph.layerwise import layerwise_obstacle
from gist.graph.spread import SpreadLayerwise, index_bytes
from gist.partition.spec import ParamLayout, PartitionSpec, model_tensors
from gist.partition.transfer import Index, Selection

SPREAD_BYTES = 64 * 2**20
"""A larger model is evaluated by all ranks where it can be; others are assembled on rank 0."""


class _Rows(Selection):
    """Some rows of every tensor, whatever its units; None for all of them."""

    def __init__(self, spec: PartitionSpec, rows: slice | None) -> None:
        self.spec, self._rows = spec, rows

    def holds(self, layout: ParamLayout) -> bool:
        """See :meth:`Selection.holds`."""
        return True

    def index(self, layout: ParamLayout) -> Index:
        """See :meth:`Selection.index`."""
        rest: Index = (None,) * len(layout.shape)
        if self._rows is None or self._rows == slice(0, layout.shape[0]):
            return rest
        return (torch.arange(self._rows.start, self._rows.stop), *rest[1:])


class ShardPeers:
    """The ranks of a sharded model, as its evaluation sees them: a :class:`Peers`.

    Args:
        shards: The model's tensors.
    """

    def __init__(self, shards: Shards) -> None:
        self.shards = shards
        self.rank, self.size = shards.comm.rank, shards.comm.size

    def take(self, names: Sequence[str], cuts: Sequence[slice] | None) -> dict[str, Tensor]:
        """See :meth:`Peers.take`."""
        shards = self.shards
        rows = [None] * self.size if cuts is None else cuts
        (part,) = shards.deal([_Rows(shards.spec, each) for each in rows], names)
        own = rows[self.rank]
        if own is None:
            return part
        return {  # what no unit indexes is dealt whole
            name: tensor[own] if shards.homes[name] is None else tensor
            for name, tensor in part.items()
        }

    def taking(self, names: Sequence[str], cuts: Sequence[slice] | None) -> tuple[int, int]:
        """See :meth:`Peers.taking`."""
        peak, kept = [0] * self.size, [0] * self.size
        for name in names:
            home, layout = self.shards.homes[name], self.shards.spec.layouts[name]
            item, owner = self.shards.tensors[name].element_size(), self.shards.owner(name)
            for rank in range(self.size):
                shape = list(layout.shape)
                if cuts is not None and owner is not None:
                    shape[0] = cuts[rank].stop - cuts[rank].start
                size = math.prod(shape) * item
                if home is None or owner is None:
                    peak[rank] += size
                    kept[rank] += size
                    continue
                wanted = owner if cuts is None or home.dim else owner[cuts[rank]]
                peak = [each + index_bytes(wanted.numel()) for each in peak]
                counts = torch.bincount(wanted, minlength=self.size).tolist()
                if counts[rank] == wanted.numel() == int((owner == rank).sum()):
                    continue  # its own, as it is
                row = size // max(wanted.numel(), 1)
                kept[rank] += size
                peak[rank] += 2 * size + (wanted.numel() - counts[rank]) * row
                for giver in range(self.size):
                    peak[giver] += counts[giver] * row if giver != rank else 0
        return max(peak), max(kept)

    def start(
        self, outgoing: Tensor, counts_out: Sequence[int], counts_in: Sequence[int]
    ) -> Pending:
        """See :meth:`Peers.start`."""
        return self.shards.comm.start(outgoing, counts_out, counts_in)


@dataclass(frozen=True, kw_only=True, eq=False)
class SpreadEvaluation:
    """Scores of all nodes by a model that is spread over ranks; see :class:`SpreadLayerwise`.

    Attributes:
        store: Where the model is.
        x: ``[N, F]`` features.
        graph: The edges.
        memory_limit: Bytes that each rank may take beside shards, features and graph.
    """

    store: ShardedStore
    x: Tensor
    graph: Adjacency
    memory_limit: int

    def layers(self) -> SpreadLayerwise:
        """The model as it is now; all ranks take part."""
        peers = ShardPeers(self.store.shards)
        return SpreadLayerwise(self.store.model, self.x, self.graph, peers)

    def check(self) -> None:
        """Refuses a limit without room for the smallest block; all ranks take part.

        Raises:
            ConfigError: see above, with the numbers.
        """
        self.layers().check(self.memory_limit)

    def scores(self) -> Tensor:
        """``[N, C]``: the same on every rank; all of them take part."""
        return self.layers().run(self.memory_limit)


def is_spread(
    model: nn.Module,
    how: str,
    config: TrainConfig,
    *,
    say: Callable[[str], None] = lambda text: None,
) -> bool:
    """Whether all ranks evaluate a sharded model, layer by layer, or rank 0 a whole copy of it.

    Args:
        model: The whole model; its layers and sizes count.
        how: The ``evaluation`` of :class:`~gist.config.GraphConfig`.
        config: Settings of the training.
        say: Called with what keeps a large model from being evaluated by all ranks.

    Raises:
        ConfigError: ``"layerwise"``, and BatchNorm that is to be re-estimated between.
    """
    if how not in ("auto", "layerwise"):
        return False
    nbytes = sum(tensor.nbytes for tensor in model_tensors(model).values())
    if how == "auto" and nbytes <= SPREAD_BYTES:
        return False
    wanted, most = config.recalibrate_bn, max(m for _, m in config.phases)
    recalibrates = (most > 1 if wanted is None else wanted) and tracks_statistics(model)
    if recalibrates and how == "layerwise":
        raise ConfigError(
            "BatchNorm cannot be re-estimated while no worker has the whole model",
            got=f"evaluation='layerwise', recalibrate_bn={wanted}, {type(model).__name__} with "
            "running statistics, several workers",
            expected="recalibrate_bn=False, or evaluation='auto' or 'full'",
            remedy="recalibrate_bn=False evaluates with the statistics that the subnets tracked; "
            "evaluation='full' assembles the model on rank 0; norm='layer' needs no statistics",
        )
    obstacle = layerwise_obstacle(model)
    if recalibrates:
        obstacle = "BatchNorm is re-estimated, which needs the whole model"
    if obstacle is not None:
        say(f"every evaluation assembles a model of {nbytes:,} bytes on rank 0: {obstacle}")
    return obstacle is None
