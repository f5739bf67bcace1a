"""Local objectives against their formulas, and metrics of clients against one client at a time."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import gist.nn
from gist import GraphData, load_dataset
from gist.config import SampleConfig, TrainConfig
from gist.errors import ConfigError
from gist.execution.local import train_locally
from gist.execution.objective import Objective
from gist.execution.program import Program
from gist.federated.local import ClientMetrics, client_metrics, masked_outputs, proximal
from gist.federated.splits import IID, Dirichlet, owners_of
from gist.graph.client_batches import ClientGraphs
from gist.graph.objective import GraphObjective
from gist.metrics import compute_metric
from gist.partition.streams import seeded, stream
from gist.samples.data import SampleData
from gist.samples.loader_data import LoaderData
from gist.samples.objective import SampleObjective

CPU = torch.device("cpu")
CLASSES = 5


def samples(count: int = 90) -> SampleData:
    x = torch.randn(count, 6, generator=stream("x"), dtype=torch.float64)
    y = torch.randint(CLASSES, (count,), generator=stream("y"))
    return SampleData.of((x, y), num_classes=CLASSES)


def sample_objective(parts=None, data: SampleData | None = None, **sizes) -> SampleObjective:
    config = SampleConfig(**{"batch_size": 8, **sizes})
    data = samples() if data is None else data
    return SampleObjective(data, CPU, config, num_subnets=1, local_steps=6, parts=parts)


def graph(nodes: int = 80) -> GraphData:
    data = load_dataset("csbm", num_nodes=nodes, num_features=6, num_classes=CLASSES)
    return GraphData.from_edges(
        data.edge_index,
        data.x.double(),
        data.y,
        train=data.train_mask,
        val=data.val_mask,
        test=data.test_mask,
        num_classes=CLASSES,
    )


def graph_objective() -> GraphObjective:
    return GraphObjective(graph(), CPU, ClientGraphs(clients=torch.arange(80) % 3))


def mlp(norm: str | None = None) -> nn.Module:
    with seeded("mlp"):
        return gist.nn.MLP(6, 7, CLASSES, num_layers=2, norm=norm, dropout=0.0).double()


def gcn() -> nn.Module:
    with seeded("gcn"):
        return gist.nn.GCN(6, 7, CLASSES, num_layers=2, norm=None, dropout=0.0).double()


KINDS = {"samples": (sample_objective, mlp), "graph": (graph_objective, gcn)}


@contextmanager
def leaves_nothing(module: nn.Module) -> Iterator[None]:
    """Fails where hooks stay on a module or its parameters."""

    def hooks() -> list[int]:
        kinds = [name for name in vars(module) if "hooks" in name]
        on_modules = [len(getattr(m, name)) for m in module.modules() for name in kinds]
        return on_modules + [len(p._backward_hooks or ()) for p in module.parameters()]

    before = hooks()
    yield
    assert hooks() == before


# --- masked outputs ---


def masked_cross_entropy(logits: Tensor, y: Tensor, classes: list[int]) -> Tensor:
    """``log(Σ_{c in classes} exp(z_c) + (C - |classes|)) - z_y``, meaned; ``y`` in classes."""
    own = logits[:, classes].exp().sum(dim=1)
    picked = logits.gather(1, y[:, None])[:, 0]
    return (torch.log(own + logits.size(1) - len(classes)) - picked).mean()


@pytest.mark.parametrize("kind", KINDS)
@given(classes=st.sets(st.integers(0, CLASSES - 1), min_size=1))
def test_the_masked_loss_is_its_formula(kind, classes):
    make, build = KINDS[kind]
    objective, model, classes = make(), build(), sorted(classes)
    (batch,) = objective.batches(seed=0, round=0, subnet=0, steps=1)
    chosen = torch.tensor(classes)
    if kind == "samples":
        y = chosen[batch.y % len(chosen)]
        batch = type(batch)(x=batch.x, y=y)
        logits = model(batch.x)
    else:
        y = chosen[batch.y % len(chosen)]
        batch = type(batch)(x=batch.x, graph=batch.graph, y=y, targets=batch.targets)
        logits = batch.outputs(model(batch.x, batch.graph))
    parameters = list(model.parameters())
    expected = masked_cross_entropy(logits, y, classes)
    wanted = torch.autograd.grad(expected, parameters)
    with leaves_nothing(model), masked_outputs(model, chosen):
        loss = objective.loss(model, batch)
        got = torch.autograd.grad(loss, parameters)
    assert torch.allclose(loss, expected, rtol=1e-12, atol=1e-12)
    for one, two in zip(got, wanted, strict=True):
        assert torch.allclose(one, two, rtol=1e-9, atol=1e-12)
    absent = [c for c in range(CLASSES) if c not in classes]
    assert not got[-1][absent].any()  # the last bias


def test_stacked_subnets_and_chosen_columns_are_masked_alike():
    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scores = nn.Parameter(torch.ones(4, 3, CLASSES))

        def forward(self, outputs: Tensor | None = None) -> Tensor:
            return self.scores if outputs is None else self.scores[..., outputs]

    model = Scores()
    with masked_outputs(model, torch.tensor([3, 1])):
        assert model().sum(dim=(0, 1)).tolist() == [0, 12, 0, 12, 0]
        assert model(outputs=torch.tensor([3, 0, 1]))[0, 0].tolist() == [1, 0, 1]
    assert bool((model() == 1).all())


def test_all_classes_change_nothing():
    model, x = mlp(), torch.randn(3, 6, dtype=torch.float64)
    plain = model(x)
    with masked_outputs(model, torch.arange(CLASSES)):
        assert torch.equal(model(x), plain)


def test_a_compiled_model_is_masked_where_it_is_called():
    model, x = mlp(), torch.randn(3, 6, dtype=torch.float64)
    compiled = torch.compile(model, backend="eager")
    plain = compiled(x)
    with masked_outputs(compiled, torch.tensor([2])):
        assert compiled(x)[:, [0, 1, 3, 4]].count_nonzero() == 0
    assert torch.equal(compiled(x), plain)


# --- the proximal term ---


def explicitly(
    objective: Objective, model: nn.Module, config: TrainConfig, mu: float, steps: int
) -> list[float]:
    """The same steps with the term in the loss, differentiated by autograd."""
    program = Program(model, size=1, grouped=False, config=config)
    start = [p.detach().clone() for p in model.parameters()]
    losses = []
    for batch in objective.batches(seed=0, round=0, subnet=0, steps=steps):
        program.optimizer.zero_grad()
        loss = objective.loss(model, batch)
        losses.append(float(loss.detach()))
        pairs = zip(model.parameters(), start, strict=True)
        term = sum((p - w).square().sum() for p, w in pairs if p.requires_grad)
        (loss + 0.5 * mu * term).backward()
        if config.clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        program.optimizer.step()
    return losses


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("clip_norm", [None, 0.3])
def test_steps_are_those_on_the_explicit_loss(kind, optimizer, clip_norm):
    make, build = KINDS[kind]
    config = TrainConfig(
        optimizer=optimizer, lr=0.05, weight_decay=1e-3, clip_norm=clip_norm, num_subnets=1
    )
    objective, model, mu, steps = make(), build(), 0.7, 6
    reference = copy.deepcopy(model)
    expected = explicitly(objective, reference, config, mu, steps)
    plain = copy.deepcopy(model)
    explicitly(objective, plain, config, 0.0, steps)

    program = Program(model, size=1, grouped=False, config=config)
    batches = objective.batches(seed=0, round=0, subnet=0, steps=steps)
    with leaves_nothing(model), proximal(model, mu):
        losses = train_locally(program, objective, batches, [1.0] * steps, config)
    assert torch.allclose(losses[:, 0], torch.tensor(expected, dtype=torch.float64), rtol=1e-10)
    for one, two, other in zip(
        model.parameters(), reference.parameters(), plain.parameters(), strict=True
    ):
        assert torch.allclose(one, two, rtol=1e-9, atol=1e-12)
        assert not torch.allclose(one, other, rtol=1e-4, atol=1e-6)


def test_stacked_subnets_are_drawn_back_each_to_its_own_start():
    torch.manual_seed(0)
    model = nn.ParameterDict({"w": nn.Parameter(torch.randn(3, 4, 5, dtype=torch.float64))})
    start = model["w"].detach().clone()
    with proximal(model, 2.0):
        with torch.no_grad():
            model["w"].add_(torch.arange(3)[:, None, None])
        model["w"].square().sum().backward()
    assert torch.allclose(model["w"].grad, 2 * model["w"] + 2.0 * (model["w"] - start))


def test_frozen_parameters_stay_without_a_gradient():
    model = mlp()
    frozen = next(model.parameters()).requires_grad_(False)
    with leaves_nothing(model), proximal(model, 1.0):
        model(torch.ones(2, 6, dtype=torch.float64)).sum().backward()
    assert frozen.grad is None


@pytest.mark.parametrize("mu", [-1.0, math.nan, math.inf])
def test_a_mu_that_cannot_be_used_is_refused(mu):
    with pytest.raises(ConfigError, match="mu must be"), proximal(mlp(), mu):
        pass


def test_nothing_stays_after_an_exception():
    model = mlp()
    with (
        leaves_nothing(model),
        pytest.raises(RuntimeError, match="in a step"),
        masked_outputs(model, torch.tensor([1])),
        proximal(model, 1.0),
    ):
        raise RuntimeError("in a step")


# --- metrics of clients ---


@pytest.mark.parametrize("metric", ["accuracy", "micro_f1", "roc_auc", "precision@3"])
@settings(max_examples=4)
@given(seed=st.integers(0, 99), size=st.integers(1, 40), clients=st.integers(1, 5))
def test_every_client_has_the_metric_on_its_training_samples(metric, seed, size, clients):
    data = samples(60)
    if metric != "accuracy":
        y = (torch.rand(60, CLASSES, generator=stream("labels")) < 0.5).double()
        data = SampleData.of((data.x, y), metric=metric)
    parts = IID().split(data.labels(data.train), clients, seed=seed)
    parts = (*parts, parts[0][:0])  # a client without samples
    objective = sample_objective(data=data, eval_batch_size=size)
    model = mlp(norm="batch").train()
    seen: list[int] = []
    handle = model.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    found = client_metrics(objective, model, parts)
    handle.remove()
    assert sum(seen) == len(data.train)
    assert len(seen) == -(-len(data.train) // size)
    assert model.training
    assert found.measured_on == "training samples"

    scores = model.eval()(data.x).detach()
    known = []
    for part, got in zip(parts, found.each.tolist(), strict=True):
        nodes = data.train[part]
        labels = data.y[nodes]
        both = bool(((labels > 0).any(0) & (labels <= 0).any(0)).any()) if len(part) else False
        if not len(part) or (metric == "roc_auc" and not both):
            assert math.isnan(got)
            continue
        known.append(compute_metric(data.metric, scores, data.y, nodes))
        assert got == pytest.approx(known[-1], abs=1e-12)
    if known:
        assert found.mean == pytest.approx(sum(known) / len(known))
        assert found.worst == pytest.approx(min(known))


def test_clients_of_sparse_labels_and_bags():
    x = (torch.rand(40, 6, generator=stream("bags")) < 0.5).float().to_sparse_csr()
    y = (torch.rand(40, CLASSES, generator=stream("labels")) < 0.5).float()
    data = SampleData.of((x, y.to_sparse_csr()))
    with seeded("bags"):
        model = gist.nn.MLP(6, 7, CLASSES, num_layers=2, norm=None, input="bag")
    parts = IID().split(data.labels(data.train), 4, seed=0)
    found = client_metrics(sample_objective(data=data, eval_batch_size=7), model, parts)
    scores = model(x).detach()
    for part, got in zip(parts, found.each.tolist(), strict=True):
        nodes = data.train[part]
        assert got == pytest.approx(compute_metric("precision@1", scores, y, nodes))


def test_clients_of_a_graph_are_measured_on_their_held_out_nodes():
    objective, model = graph_objective(), gcn()
    data = objective.data
    parts = Dirichlet(alpha=0.3).split(data.y, 6, seed=1)
    trained = data.train_mask.nonzero()[:, 0]
    parts = (*parts, trained[:2])  # a client without held-out nodes
    assert owners_of(parts[:-1], data.num_nodes).numel() == 80
    found = client_metrics(objective, model, parts)
    assert found.measured_on == "validation and test nodes"
    scores = objective.predict(model)
    expected = [
        float((scores[own].argmax(1) == data.y[own]).double().mean())
        for part in parts[:-1]
        for own in [part[~data.train_mask[part] & (data.val_mask | data.test_mask)[part]]]
    ]
    assert found.each[:-1].tolist() == pytest.approx(expected)
    assert math.isnan(found.each[-1])
    assert found.worst == pytest.approx(min(expected))


def test_no_client_with_a_metric_has_no_mean():
    found = ClientMetrics(each=torch.full((2,), math.nan), measured_on="training samples")
    assert math.isnan(found.mean)
    assert math.isnan(found.worst)


def test_samples_without_numbers_are_refused():
    x, y = torch.randn(20, 6), torch.arange(20) % CLASSES
    loader = DataLoader(TensorDataset(x, y), batch_size=5)
    data = LoaderData(train=loader, val=loader, test=loader, num_classes=CLASSES)
    objective = SampleObjective(data, CPU, SampleConfig(), num_subnets=1, local_steps=2)
    with pytest.raises(ConfigError, match="told apart"):
        client_metrics(objective, mlp(), [torch.arange(3)])
