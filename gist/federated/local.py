"""What clients do differently in their local steps, and how a model does on each client's data.

Shape legend: ``K`` clients, ``N`` nodes, ``n`` rows of an output, ``m`` stacked subnets, ``C``
classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gist.csr import take_rows
from gist.errors import ConfigError
from gist.execution.objective import Objective
from gist.federated.splits import in_turn
from gist.graph.link_objective import LinkObjective
from gist.graph.objective import GraphObjective
from gist.metrics import RunningMetric, compute_metric, is_defined
from gist.modes import keeps_modes
from gist.partition.streams import stream
from gist.samples.data import SampleData
from gist.samples.objective import SampleObjective


@contextmanager
def masked_outputs(module: nn.Module, classes: Tensor) -> Iterator[None]:
    """Sets the outputs of all other classes to 0 (HeteroFL's masked loss: Diao et al., 2021).

    They are constants then: in the cross entropy each counts as ``exp(0)``, and the weights behind
    them get gradients of 0.

    Args:
        module: What is called; of a compiled module the compiled one, which does not see hooks of
            the other. It puts out ``[n, C]``, stacked ``[n, m, C]``, or of these the columns alone
            that an argument ``outputs`` names.
        classes: int64, those that the client has.
    """

    def mask(module: nn.Module, args: Any, keywords: Mapping[str, Any], out: Tensor) -> Tensor:
        columns = keywords.get("outputs")
        if columns is None:
            columns = torch.arange(out.size(-1), device=out.device)
        return out.masked_fill(~torch.isin(columns, present), 0.0)

    present = classes.to(next(module.parameters()).device)
    handle = module.register_forward_hook(mask, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def proximal(module: nn.Module, mu: float) -> Iterator[None]:
    """Adds the gradient of ``µ/2 ||w - w_0||²`` to that of every loss (FedProx: Li et al., 2020).

    ``w_0`` are the parameters on entry (equation 2: the global ones that a client starts from), of
    which a copy is kept. Each backward pass adds ``µ (w - w_0)`` to the gradients that it gives, so
    that clipping and optimisers see the sum. A parameter that a loss does not depend on gets no
    gradient, as without.

    Args:
        module: What is trained.
        mu: µ, at least 0.

    Raises:
        ConfigError: a µ that cannot be used.
    """
    if not 0 <= mu < float("inf"):
        raise ConfigError("mu must be a number of at least 0", got=repr(mu))

    def draw_back(parameter: Tensor) -> Any:
        start = parameter.detach().clone()
        return parameter.register_hook(  # type: ignore[no-untyped-call]
            lambda grad: grad.add(parameter.detach() - start, alpha=mu)
        )

    handles = [draw_back(p) for p in module.parameters() if p.requires_grad]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, kw_only=True, eq=False)
class ClientMetrics:
    """How a model does on each client's data.

    Attributes:
        each: ``[K]`` float64: the metric on each client's samples; NaN where these do not define
            it, or there are none.
        measured_on: Which samples: ``"training samples"``, or ``"validation and test nodes"``.
    """

    each: Tensor
    measured_on: str

    @property
    def mean(self) -> float:
        """Over the clients that have a metric, each counting as one; NaN where none has."""
        return float(self.each.nanmean())

    @property
    def worst(self) -> float:
        """The lowest of any client; NaN where none has a metric."""
        known = self.each[~self.each.isnan()]
        return float(known.min()) if len(known) else float("nan")


@torch.no_grad()
def client_metrics(
    objective: Objective, model: nn.Module, parts: Sequence[Tensor]
) -> ClientMetrics:
    """The metric of a model on each client's data, in evaluation mode, in one pass over them all.

    Of independent samples it is taken over the client's own *training* samples, without
    augmentation: few datasets say which client a held-out sample would belong to. Of a graph it is
    taken over the validation and test nodes among the client's own; their scores are those of the
    whole graph, with the edges between clients.

    Args:
        objective: The data side.
        model: Its modes are left as they are.
        parts: Of each client, positions among the training samples; of a graph, numbers of nodes.

    Raises:
        ConfigError: data whose samples have no numbers, as those of a loader, or links.
        DataError: outputs that are NaN or infinite.
    """
    if isinstance(objective, GraphObjective) and not isinstance(objective, LinkObjective):
        return ClientMetrics(
            each=_of_nodes(objective, model, parts), measured_on="validation and test nodes"
        )
    if isinstance(objective, SampleObjective) and isinstance(objective.data, SampleData):
        with keeps_modes(model):
            each = _of_samples(objective, objective.data, model.eval(), parts)
        return ClientMetrics(each=each, measured_on="training samples")
    raise ConfigError(
        "metrics of each client need samples or nodes that can be told apart",
        got=type(getattr(objective, "data", objective)).__name__,
        expected="a SampleData or a GraphData",
    )


def _of_nodes(objective: GraphObjective, model: nn.Module, parts: Sequence[Tensor]) -> Tensor:
    data, scores = objective.data, objective.predict(model)
    held_out = data.val_mask | data.test_mask
    each = torch.full((len(parts),), float("nan"), dtype=torch.float64)
    for client, part in enumerate(parts):
        nodes = part.to(held_out.device)
        nodes = nodes[held_out[nodes]]
        if len(nodes) and is_defined(data.metric, data.y[nodes]):
            each[client] = compute_metric(data.metric, scores, data.y, nodes)
    return each


def _of_samples(
    objective: SampleObjective, data: SampleData, model: nn.Module, parts: Sequence[Tensor]
) -> Tensor:
    running = [RunningMetric(data.metric) for _ in parts]
    pieces = (torch.split(t, objective.config.eval_batch_size) for t in in_turn(parts))
    for some, owners in zip(*pieces, strict=True):
        numbers = data.train[some.to(data.train.device)]
        x = data.inputs(numbers, training=False, generator=stream("scored"))
        scores, y = model(x), data.labels(numbers)
        clients, counts = torch.unique_consecutive(owners, return_counts=True)
        rows = torch.split(torch.arange(len(some), device=scores.device), counts.tolist())
        for client, own in zip(clients.tolist(), rows, strict=True):
            running[client].add(scores[own], take_rows(y, own))
    return torch.tensor(
        [
            metric.result() if len(part) and metric.is_defined else float("nan")
            for metric, part in zip(running, parts, strict=True)
        ],
        dtype=torch.float64,
    )
