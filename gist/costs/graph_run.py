"""Runs on graphs: whole or in clusters, evaluated in one pass, layer by layer or on clusters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gist.costs.rehearsal import Rounds
from gist.costs.run import Choice, Evaluation, Items, Memory, RunOnStage, refusing
from gist.costs.stage import Stage
from gist.execution.mapped import RESIDENT_BYTES
from gist.execution.shards import Home
from gist.graph.inference import default_memory_limit, passes_messages
from gist.graph.layerwise import Layerwise, layerwise_obstacle
from gist.graph.outline import OutlineObjective
from gist.graph.spread import Rehearsed, SpreadLayerwise
from gist.metrics import loss
from gist.modes import keeps_modes
from gist.spread import is_spread

_BUILD_BYTES_PER_EDGE = 24
"""What sorting edges into rows, and looking whether they are symmetric, takes while it is done."""


class GraphRun(RunOnStage[OutlineObjective]):
    """See :class:`~gist.costs.run.RunOnStage`.

    Args:
        *args: As there.
        evaluation: As :class:`~gist.config.GraphConfig` has it.
        **kwargs: As there.
    """

    def __init__(self, *args: Any, evaluation: str, **kwargs: Any) -> None:
        self._how = evaluation
        self._layers: Layerwise | None = None
        super().__init__(*args, **kwargs)

    def sizes(self) -> dict[str, int]:
        """Nodes, edges, features and classes; nodes and edges of a step."""
        data, batch = self.objective.data, self.objective.batch
        graphs = batch.graph if isinstance(batch.graph, tuple) else (batch.graph,)
        return {
            "nodes": data.num_nodes,
            "edges": data.num_edges,
            "features": data.num_features,
            "classes": data.num_classes,
            "batch_nodes": batch.x.size(0),
            "batch_edges": max(graph.num_edges for graph in graphs),
        }

    def rehearse_evaluation(self) -> tuple[int, int]:
        """See :meth:`RunOnStage.rehearse_evaluation`."""
        on_batch = self._how == "clusters"
        return rehearse_evaluation(self.stage, self.model, self.objective, on_batch=on_batch)

    def rehearse_recalibration(self) -> int:
        """See :meth:`RunOnStage.rehearse_recalibration`."""
        return rehearse_evaluation(self.stage, self.model, self.objective, on_batch=True)[0]

    def evaluation(self, standing: int) -> Evaluation:
        """See :meth:`RunOnStage.evaluation`."""
        left = max(self.limit - standing, 0)
        on_disk = self.config.store == "disk"
        if self.config.memory_limit is None:
            model = min(self.model_bytes, RESIDENT_BYTES) if on_disk else self.model_bytes
            before = self.process_bytes + self.data_bytes + model
            left = min(left, default_memory_limit(self.device, max(self.limit - before, 1)))
        layers = self._layers_within(left)
        if layers is None:
            how = "clusters" if self._how == "clusters" else "full"
            return Evaluation(how=how, takes=self.one_pass, may_take=left)
        takes = max(min(left, layers.most), layers.smallest)
        return Evaluation(how="layerwise", takes=takes, may_take=left)

    def _layers_within(self, left: int) -> Layerwise | None:
        """The evaluation layer by layer, if that is how it goes with so many bytes left."""
        if self._how == "clusters":
            return None
        if self._is_spread:
            return self._spread_layers()
        if self.workers > 1 and self._how == "auto":
            return None
        if self._how == "full" or layerwise_obstacle(self.model) is not None:
            return None
        fast = self._how == "auto" and not passes_messages(self.model)
        if fast and self.config.store != "disk" and self.one_pass <= left:
            return None
        if self._layers is None:
            data = self.objective.data
            with refusing(self.model), self.stage.arranging():
                self._layers = Layerwise(self.model.eval(), data.x, data.adjacency)
        return self._layers

    @property
    def _is_spread(self) -> bool:
        """Whether all workers evaluate together."""
        return self.workers > 1 and is_spread(self.model, self._how, self.config)

    def _spread_layers(self) -> SpreadLayerwise:
        """The evaluation by all workers, as rank 0 runs it."""
        if self._layers is None:
            data = self.objective.data
            homes = {name: Home.of(layout) for name, layout in self.spec.layouts.items()}
            at_home = {n for n, home in homes.items() if home and not home.moves and not home.dim}
            peers = Rehearsed(self.model, 0, self.workers, at_home)
            with refusing(self.model), self.stage.arranging():
                model = self.model.eval()
                self._layers = SpreadLayerwise(model, data.x, data.adjacency, peers)
        assert isinstance(self._layers, SpreadLayerwise)
        return self._layers

    @property
    def is_assembled(self) -> bool:
        """See :attr:`RunOnStage.is_assembled`."""
        return super().is_assembled and not self._is_spread

    def more_phases(self, stays: Items, rounds: Rounds) -> Memory:
        """The first step, in which edges are sorted."""
        building = _BUILD_BYTES_PER_EDGE * self.objective.data.num_edges
        return {"first_step": {**stays, "subnets": rounds.subnets, "graph_building": building}}

    def activation_remedies(self, phase: str, evaluation: Evaluation) -> str | None:
        """See :meth:`RunOnStage.activation_remedies`."""
        if phase == "evaluation":
            return {
                "full": "evaluation='layerwise'",
                "layerwise": "evaluation='clusters'",
            }.get(evaluation.how)
        if phase == "recalibration":
            return "recalibrate_bn=False, norm='layer', or batches of fewer clusters"
        return "clusters=..., or smaller batches of them (clusters_per_batch)"

    def more_files(self, choice: Choice) -> Items:
        """Hidden layers of an evaluation layer by layer, where memory has no room for them."""
        if choice.evaluation.how != "layerwise" or self._layers is None:
            return {}
        hidden = self._layers.file_bytes(choice.evaluation.may_take)
        return {"hidden_layers": hidden} if hidden else {}


def rehearse_evaluation(
    stage: Stage, model: nn.Module, objective: OutlineObjective, *, on_batch: bool = False
) -> tuple[int, int]:
    """Bytes that the scores of all nodes take while they are computed, and the operations.

    What the graph keeps from then on, normalised matrices and products with the input, is made in
    it and stays on the stage.

    Args:
        stage: Where the model and the objective are.
        model: The whole model.
        objective: The data side.
        on_batch: Compute them batch by batch, rather than in one pass.
    """
    tally, data = stage.tally, objective.data
    seen: tuple[Tensor, Any] = (data.x, data.adjacency)
    if on_batch:
        seen = (objective.batch.x, objective.batch.graph)
    peaks: dict[str, int] = {}
    with stage.computing(), torch.no_grad(), keeps_modes(model):
        model.eval()
        objective.scores(model, *seen)  # makes what stays
        before, operations = tally.bytes, tally.flops
        with stage.peak(peaks, "evaluation"):
            every = data.x.new_empty(data.num_nodes if on_batch else 0, data.num_classes)
            scores = objective.scores(model, *seen)
            loss(data.task, scores, data.y[: len(scores)])
            del every
    batches = -(-data.num_nodes // len(seen[0]))
    return peaks["evaluation"] - before, (tally.flops - operations) * batches
