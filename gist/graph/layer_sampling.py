"""Layer sampling by importance: LADIES and FastGCN, as batches for subnet training.

Both estimate a layer's product ``M H`` for a batch of target nodes from a few rows of ``H``: with
nodes ``u_1, ..., u_s`` drawn with replacement from probabilities ``p``, the estimate
``sum_k M[:, u_k] H[u_k] / (s p[u_k])`` has the expectation ``M H``. A node drawn several times is
computed once, and its weights are added.

Shape legend: ``N`` nodes, ``t`` targets of a layer, ``e`` edges that they receive, ``c`` columns
with such an edge, ``s`` nodes drawn.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from gist.errors import ConfigError
from gist.graph.adjacency import Adjacency, Form, Rows, true_positions
from gist.graph.batch import BatchRecipe, BatchSource, GraphBatch, passes
from gist.graph.data import GraphData
from gist.graph.prefetch import prefetched
from gist.graph.sparse import CSR, SparseMatrix
from gist.partition.streams import stream

FORMS = ("gcn", "mean")


class SampledLayer(Adjacency):
    """What the sampled sources of one layer send to its targets, weighted by importance.

    It has the one matrix that it was sampled for, and no edges of its own.

    Args:
        rows: The matrix, ``t x n`` for ``n`` sources.
        form: What it is a sample of.
        targets_first: Whether the first ``t`` sources are the targets themselves.
    """

    def __init__(self, rows: CSR, form: Form, *, targets_first: bool) -> None:
        self._start(rows.indptr.numel() - 1, rows.num_cols, rows.indices.numel())
        self.form, self.targets_first = form, targets_first
        self.rows = Rows(rows.indptr, rows.indices, rows.values)
        matrix = SparseMatrix(rows)
        self._matrices = {(form, kind): matrix for kind in (torch.float32, torch.float64)}

    @property
    def edge_index(self) -> Tensor:
        """Refused: a sample's weights are those of one matrix.

        Raises:
            ConfigError: always.
        """
        raise self._refusal("passes messages along edges")

    def matrix(self, form: Form, dtype: torch.dtype = torch.float32) -> SparseMatrix:
        """The matrix, in the dtype that it was sampled in.

        Raises:
            ConfigError: another form is wanted.
        """
        if form != self.form:
            raise self._refusal(f"multiplies with the form {form!r}")
        return super().matrix(form, dtype)

    def _own(self, x: Tensor) -> Tensor:
        if not self.targets_first:
            raise self._refusal("needs the targets' own features")
        return x[: self.num_targets]

    @property
    def _sends_to_itself(self) -> bool:
        return False  # as many sources as targets are other nodes, or in another order

    def _refusal(self, does: str) -> ConfigError:
        return ConfigError(
            f"layers were sampled for the form {self.form!r}, but the model {does}",
            expected="a gist.nn.GCN for 'gcn', a mean gist.nn.GraphSAGE for 'mean'",
            remedy="set form= of the recipe to what the model multiplies with",
        )


@dataclass(frozen=True, kw_only=True)
class _LayerSampling(BatchRecipe):
    """What the recipes share.

    Raises:
        ConfigError: a value that cannot be used.
    """

    nodes_per_layer: tuple[int, ...]
    batch_size: int = 512
    form: Literal["gcn", "mean"] = "gcn"

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "nodes_per_layer", tuple(self.nodes_per_layer))
        except TypeError:
            object.__setattr__(self, "nodes_per_layer", (None,))
        for count in (*self.nodes_per_layer, self.batch_size, len(self.nodes_per_layer)):
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise ConfigError(
                    "layer sampling needs how many nodes to draw for each layer",
                    got=f"nodes_per_layer={self.nodes_per_layer}, batch_size={self.batch_size}",
                    expected="whole numbers of at least 1, such as (512, 512) for two layers",
                )
        if self.form not in FORMS:
            raise ConfigError("unknown form", got=repr(self.form), expected=" or ".join(FORMS))

    def bind(self, data: GraphData) -> LayerSource:
        """See :meth:`BatchRecipe.bind`."""
        return LayerSource(self, data)

    @abstractmethod
    def importance(self, whole: CSR) -> Tensor | None:
        """``[N]``: fixed probabilities of all nodes; None where each layer has its own."""

    @property
    @abstractmethod
    def normalizes_rows(self) -> bool:
        """Whether sampled rows are scaled to sum 1."""


@dataclass(frozen=True, kw_only=True)
class LADIES(_LayerSampling):
    """Layer-dependent importance sampling (Zou et al., NeurIPS 2019, algorithm 1).

    From the last layer down, ``s`` nodes are drawn for the input of each layer from ``p_u``
    proportional to the squared norm of column ``u`` of the rows of ``M`` that belong to the nodes
    of the layer above, so only their neighbours are drawn. Rows of the sampled matrix are then
    scaled to sum 1, as in the paper; without that (``row_normalize=False``) the estimate of a layer
    is unbiased. Where ``s`` is no less than the neighbours there are, all are taken, each with
    weight 1, and nothing is estimated.

    Attributes:
        nodes_per_layer: Nodes to draw for the input of each layer, first layer first; one number
            for each layer of the model. Drawn with replacement, as the estimate demands: the
            different nodes may be fewer.
        batch_size: Training nodes of a batch.
        form: The matrix ``M`` that the model multiplies with: ``"gcn"``, or ``"mean"`` for
            GraphSAGE, whose targets are then among their own sources.
        row_normalize: See above.
    """

    row_normalize: bool = True

    def importance(self, whole: CSR) -> Tensor | None:
        """None: probabilities depend on the layer above."""
        return None

    @property
    def normalizes_rows(self) -> bool:
        """As ``row_normalize`` says."""
        return self.row_normalize


@dataclass(frozen=True, kw_only=True)
class FastGCN(_LayerSampling):
    """Layer-independent importance sampling (Chen et al., ICLR 2018, algorithm 2).

    For the input of every layer ``s`` nodes are drawn from ``q_u`` proportional to the squared norm
    of column ``u`` of the whole ``M``. Drawn nodes that no target is joined to add nothing and are
    not computed. Where ``s`` is no less than ``N``, all nodes are taken, each with weight 1.

    Attributes:
        nodes_per_layer: Nodes to draw for the input of each layer, first layer first, with
            replacement; one number for each layer of the model.
        batch_size: Training nodes of a batch.
        form: The matrix ``M`` that the model multiplies with: ``"gcn"``, or ``"mean"`` for
            GraphSAGE, whose targets are then among their own sources.
    """

    def importance(self, whole: CSR) -> Tensor | None:
        """``[N]``: squared norms of the columns, scaled to sum 1."""
        mass = torch.zeros(whole.num_cols, dtype=torch.float64, device=whole.values.device)
        mass.index_add_(0, whole.indices, whole.values.double() ** 2)
        return mass / mass.sum()

    @property
    def normalizes_rows(self) -> bool:
        """False: the paper has none."""
        return False


class LayerSource(BatchSource):
    """Batches of training nodes with, for each layer, a sample of what they depend on.

    Args:
        recipe: Settings.
        data: The graph.
    """

    def __init__(self, recipe: _LayerSampling, data: GraphData) -> None:
        self.recipe, self.data = recipe, data
        self._train = true_positions(data.train_mask)
        matrix = data.adjacency.matrix(recipe.form, data.x.dtype).rows.to_scipy().copy()
        matrix.sum_duplicates()  # norms are those of columns, not of single edges
        self._matrix = CSR.from_scipy(matrix).to(data.x.device)
        probability = recipe.importance(self._matrix)
        self._cumulative = None if probability is None else probability.cumsum(0)
        self._probability = probability
        self._forms: frozenset[Form] = frozenset()

    @property
    def steps_per_epoch(self) -> int:
        """Batches that hold every training node once; the last may be smaller."""
        return math.ceil(self._train.numel() / self.recipe.batch_size)

    def batches(self, *, seed: int, round: int, subnet: int, steps: int) -> Iterator[GraphBatch]:
        """Batches of shuffled passes over the training nodes, layers drawn anew for each step."""
        groups = passes(
            self._deal,
            steps_per_epoch=self.steps_per_epoch,
            seed=seed,
            round=round,
            subnet=subnet,
            steps=steps,
        )
        generator = stream("layers", seed, round, subnet)
        for batch in prefetched(self.draw(targets, generator) for targets in groups):
            yield batch
            assert isinstance(batch.graph, tuple)
            self._forms |= batch.graph[0].remembered(batch.x)

    def _deal(self, generator: Generator) -> Sequence[Tensor]:
        order = torch.randperm(self._train.numel(), generator=generator)
        return torch.split(self._train[order.to(self._train.device)], self.recipe.batch_size)

    def draw(self, targets: Tensor, generator: Generator) -> GraphBatch:
        """One batch.

        Args:
            targets: Different training nodes ``[t]``; the model puts out their scores, in this
                order.
            generator: Of the CPU, on every device.
        """
        nodes, graphs = targets, []
        for count in reversed(self.recipe.nodes_per_layer):
            nodes, graph = self.layer(nodes, count, generator)
            graphs.append(graph)
        x = self.data.x.index_select(0, nodes)
        graphs[-1].remember(x, self._forms)
        return GraphBatch(x=x, graph=tuple(reversed(graphs)), y=self.data.y[targets])

    def layer(
        self, targets: Tensor, count: int, generator: Generator
    ) -> tuple[Tensor, SampledLayer]:
        """A sample of what the targets of one layer receive.

        Args:
            targets: Different nodes ``[t]``.
            count: Nodes to draw, ``s``.
            generator: Of the CPU, on every device.

        Returns:
            The sources, int64, which for the form ``"mean"`` begin with the targets; and the
            sampled matrix between them.
        """
        whole = self._matrix
        indptr, indices, values, _ = Rows(whole.indptr, whole.indices, whole.values).take(targets)
        assert values is not None
        columns, column = torch.unique(indices, return_inverse=True)
        weights = self._weights(columns.long(), column, values, count, generator).to(values.dtype)
        drawn = weights > 0
        drawn[:1] |= ~drawn.any()  # a layer needs a source, if one with weight 0
        sources = columns[drawn].long()
        place = drawn.cumsum(0, dtype=indices.dtype) - 1
        if self.recipe.form == "mean":
            sources, at = _after(targets, sources)
            place[drawn] = at.to(place.dtype)
        at, weight = place.index_select(0, column), weights.index_select(0, column)
        rows = Rows(indptr, at, values * weight).keep(drawn.index_select(0, column))
        assert rows.weight is not None
        values = rows.weight
        if self.recipe.normalizes_rows:
            sums = torch.segment_reduce(values, "sum", offsets=rows.indptr.long(), initial=0)
            scale = torch.where(sums > 0, sums, 1).reciprocal()
            values = values * scale.repeat_interleave(rows.counts(), output_size=values.numel())
        matrix = CSR(rows.indptr, rows.indices, values, sources.numel())
        first = self.recipe.form == "mean"
        return sources, SampledLayer(matrix, self.recipe.form, targets_first=first)

    def _weights(
        self, columns: Tensor, column: Tensor, values: Tensor, count: int, generator: Generator
    ) -> Tensor:
        """``[c]``: times drawn / (s p) of each column; 0 where it was not drawn."""
        device = columns.device
        cumulative, probability = self._cumulative, self._probability
        if cumulative is None or probability is None:
            mass = torch.zeros(columns.numel(), dtype=torch.float64, device=device)
            mass.index_add_(0, column, values.double() ** 2)
            probability = mass / mass.sum()
            cumulative = probability.cumsum(0)
            columns = torch.arange(columns.numel(), device=device)
        if count >= probability.numel():
            return torch.ones(columns.numel(), dtype=torch.float64, device=device)
        points = torch.rand(count, dtype=torch.float64, generator=generator).to(device)
        chosen = torch.searchsorted(cumulative, points * cumulative[-1], right=True)
        chosen = chosen.clamp_(max=probability.numel() - 1).sort().values
        first = torch.searchsorted(chosen, columns)
        times = torch.searchsorted(chosen, columns, right=True) - first
        return times / (count * probability[columns])

    def describe(self) -> dict[str, Any]:
        """Settings of the recipe."""
        return {"name": type(self.recipe).__name__, **asdict(self.recipe)}

    def check(self, model: nn.Module) -> None:
        """Refuses a model that is not made of as many layers with the sampled matrix.

        Raises:
            ConfigError: see above.
        """
        recipe, name = type(self.recipe).__name__, type(model).__name__
        forms = [layer.form for layer in model.modules() if hasattr(layer, "form")]
        if not getattr(model, "accepts_adjacency", False) or set(forms) != {self.recipe.form}:
            raise ConfigError(
                f"{recipe} samples the matrix {self.recipe.form!r} for each layer of a model, and "
                f"{name} does not multiply with it in all of its layers",
                got=f"layers with {', '.join(map(repr, forms))}" if forms else "none that does",
                expected="gist.nn.GCN for form='gcn', gist.nn.GraphSAGE for form='mean'",
                remedy="use one of these, set form=, or use clusters",
            )
        if len(forms) != len(self.recipe.nodes_per_layer):
            raise ConfigError(
                f"{recipe} samples another number of layers than {name} has",
                got=f"nodes_per_layer={self.recipe.nodes_per_layer}",
                expected=f"{len(forms)} numbers, one for each layer",
            )


def _after(first: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """``first``, then those of ``others`` that it lacks; and where each of ``others`` is."""
    order = first.argsort()
    rank = torch.searchsorted(first, others, sorter=order).clamp_(max=first.numel() - 1)
    found = order[rank]
    known = first[found] == others
    at = torch.where(known, found, first.numel() - 1 + (~known).cumsum(0))
    return torch.cat([first, others[~known]]), at
