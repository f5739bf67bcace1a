"""Stacked subnets compute what the same subnets compute one after the other, to rounding.

Every run here is three rounds with three different deals in float64, without dropout: once serial,
the reference, and once stacked. What differs then is rounding alone.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg
from torch import Generator, Tensor, nn
from torch_geometric.loader import RandomNodeLoader

import gist.nn
from gist import Bernoulli, Categorical, DisjointUniform, GISTTrainer, GraphData, Overlapping
from gist.config import TrainConfig
from gist.errors import DivergedError
from gist.execution.program import Program
from gist.execution.rounds import RoundExecutor
from gist.execution.serial import SerialExecutor
from gist.execution.stacked import StackedExecutor
from gist.graph.batch import BatchRecipe
from gist.graph.clusters import Cluster
from gist.graph.layer_sampling import LADIES
from gist.graph.loaders import PyGLoader
from gist.graph.objective import GraphObjective
from gist.partition.assignment import Assignment
from gist.partition.grouped.grouping import Grouping
from gist.partition.rules.registry import _RULES, Rule, register_rule
from gist.partition.samplers import Sampler
from gist.partition.spec import model_tensors
from gist.partition.wiring import Wiring, partition_spec
from gist.plan import plan_rounds

FEATURES, CLASSES = 6, 3


def graph(*, weighted: bool = False, dtype: torch.dtype = torch.float64) -> GraphData:
    """A small symmetric graph with duplicate edges, self loops and nodes without any edge."""
    generator = torch.Generator().manual_seed(4)
    nodes = 40
    edges = torch.randint(nodes - 3, (2, 70), generator=generator)
    weight = torch.rand(70, generator=generator, dtype=torch.float64).repeat(2).to(dtype)
    order = torch.randperm(nodes, generator=generator)
    x = torch.randn(nodes, FEATURES, generator=generator, dtype=torch.float64)
    return GraphData.from_edges(
        torch.cat([edges, edges.flip(0)], dim=1),
        x.to(dtype),
        torch.arange(nodes) % CLASSES,
        edge_weight=weight if weighted else None,
        train=order[:20],
        val=order[20:30],
        test=order[30:],
    )


CPU = torch.device("cpu")
PLAIN, WEIGHTED = (GraphObjective(graph(weighted=weighted), CPU) for weighted in (False, True))
SETTINGS: dict[str, Any] = {
    "num_subnets": 3, "local_steps": 3, "rounds": 3, "lr": 0.01, "schedule": "constant",
    "shared_batches": True, "seed": 3,
}  # fmt: skip
EXECUTORS = {"serial": SerialExecutor, "stacked": StackedExecutor}


def fresh(build: Callable[[], nn.Module]) -> nn.Module:
    """A float64 model of which no tensor starts at zero."""
    torch.manual_seed(0)
    model = build().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@dataclass
class Run:
    """What an executor made of a model."""

    model: nn.Module
    executor: RoundExecutor
    losses: list[float]
    programs: set[Program]


def run(
    executor: str,
    build: Callable[[], nn.Module],
    objective: Any,
    *,
    wiring: Wiring | None = None,
    between: Callable[[nn.Module, int], None] = lambda model, round: None,
    most: int | None = None,
    **settings: Any,
) -> Run:
    """All rounds of a run, by one executor; ``between`` is called after each."""
    config = TrainConfig(**{**SETTINGS, **settings, "executor": executor})
    model = fresh(build)
    spec = partition_spec(model, wiring)
    runs = EXECUTORS[executor](model, spec, objective, config)
    if isinstance(runs, StackedExecutor):
        runs.most = most
    losses, programs = [], set()
    for plan in plan_rounds(config, objective.steps_per_epoch):
        deal = config.sampler(spec.sizes, plan.num_subnets, seed=config.seed, round=plan.index)
        losses.append(runs.run_round(plan, deal).train_loss)
        programs |= {*runs._programs.values()}
        between(model, plan.index)
    return Run(model, runs, losses, programs)


def assert_same(serial: Run, stacked: Run, within: float = 1e-8) -> None:
    theirs = model_tensors(stacked.model)
    for name, tensor in model_tensors(serial.model).items():
        tensor, other = tensor.detach(), theirs[name].detach()
        if not tensor.is_floating_point():
            assert torch.equal(tensor, other), name
            continue
        scale = float(tensor.abs().max().clamp(min=1e-30))
        assert float((tensor - other).abs().max()) <= within * scale, name
    assert stacked.losses == pytest.approx(serial.losses, rel=within)


def assert_stacked_equals_serial(
    build: Callable[[], nn.Module], objective: Any = None, **settings: Any
) -> Run:
    """Runs both, and returns the stacked one."""
    objective = objective or PLAIN
    serial, stacked = (run(name, build, objective, **settings) for name in EXECUTORS)
    assert_same(serial, stacked)
    assert len(set(stacked.losses)) == len(stacked.losses), "something was trained"
    assert any(program.grouped for program in stacked.programs), "something was stacked"
    assert not any(program.grouped for program in serial.programs)
    return stacked


def zoo(kind: type[nn.Module], width: int = 12, **kwargs: Any) -> Callable[[], nn.Module]:
    """A model of PyTorch Geometric with three layers."""
    return lambda: kind(FEATURES, width, 3, CLASSES, **kwargs)


def ours(kind: type[nn.Module], width: int = 12, **kwargs: Any) -> Callable[[], nn.Module]:
    """A reference model with three layers."""
    return lambda: kind(FEATURES, width, CLASSES, 3, dropout=0.0, **kwargs)


NODE_NORM = {"norm": "layer_norm", "norm_kwargs": {"mode": "node"}}
SGD = {"optimizer": "sgd"}
# Sums over neighbours, layer upon layer, explode at larger rates.
CAREFUL = {"optimizer": "sgd", "lr": 1e-4}

# A bias in front of a BatchNorm has no effect, so that its gradient is rounding alone; Adam divides
# it by its own size and turns it into steps of full length. SGD leaves it as small as it is.
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "gcn": (ours(gist.nn.GCN), {}),
    "gcn, no norm": (ours(gist.nn.GCN, norm=None), {}),
    "gcn, affine layer norm": (lambda: ours(gist.nn.GCN, norm=nn.LayerNorm(12))(), {}),
    "gcn, batch norm": (ours(gist.nn.GCN, norm="batch"), SGD),
    "gcn, batch norm, no bias": (ours(gist.nn.GCN, norm="batch", bias=False), {}),
    "gcn, max": (ours(gist.nn.GCN, aggr="max"), {}),
    "gcn, improved": (ours(gist.nn.GCN, improved=True), {}),
    "gcn, jumping": (ours(gist.nn.GCN, jk="cat"), {}),
    "sage": (ours(gist.nn.GraphSAGE), {}),
    "sage, one weight": (ours(gist.nn.GraphSAGE, concat=True), {}),
    "sage, one weight, no norm": (ours(gist.nn.GraphSAGE, concat=True, norm=None), {}),
    "sage, max": (ours(gist.nn.GraphSAGE, aggr="max"), {}),
    "gat": (ours(gist.nn.GAT, 24, heads=4), {}),
    "gat, whole heads": (ours(gist.nn.GAT, 24, heads=6, units="heads"), {}),
    "gat, whole heads, residual": (
        ours(gist.nn.GAT, 24, heads=6, units="heads", residual=True, norm=None), {},
    ),
    "gat v2": (ours(gist.nn.GAT, 24, heads=4, v2=True), {}),
    "gat v2, whole heads, one weight": (
        ours(gist.nn.GAT, 24, heads=6, units="heads", v2=True, share_weights=True), {},
    ),
    "pyg gcn": (zoo(pyg.GCN), {}),
    "pyg gcn, cached": (zoo(pyg.GCN, cached=True), {}),
    "pyg gcn, jumping cat": (zoo(pyg.GCN, jk="cat", **NODE_NORM), {}),
    "pyg gcn, jumping max": (zoo(pyg.GCN, jk="max", act="prelu"), {}),
    "pyg gcn, batch norm": (zoo(pyg.GCN, norm="batch_norm"), SGD),
    "pyg sage": (zoo(pyg.GraphSAGE), {}),
    "pyg sage, projected": (zoo(pyg.GraphSAGE, project=True, jk="last"), {}),
    "pyg sage, normalised": (zoo(pyg.GraphSAGE, normalize=True, act="elu"), {}),
    "pyg sage, max": (zoo(pyg.GraphSAGE, aggr="max", **NODE_NORM), {}),
    "pyg sage, sum": (zoo(pyg.GraphSAGE, aggr="sum", root_weight=False), {}),
    "pyg gin": (zoo(pyg.GIN), CAREFUL),
    "pyg gin, learnt eps": (zoo(pyg.GIN, train_eps=True, eps=0.2, **NODE_NORM), SGD),
    "pyg gin, mean": (zoo(pyg.GIN, aggr="mean", norm="batch_norm", jk="cat"), SGD),
    "pyg gin, max, act first": (zoo(pyg.GIN, aggr="max", act_first=True, act="prelu"), CAREFUL),
    "pyg gat": (zoo(pyg.GAT, heads=2), {}),
    "pyg gat, residual": (zoo(pyg.GAT, heads=2, residual=True, **NODE_NORM), {}),
    "pyg gat, averaged": (zoo(pyg.GAT, heads=2, concat=False, jk="max"), {}),
    "pyg gat v2, wide prelu": (
        lambda: zoo(
            pyg.GAT, heads=2, v2=True, residual=True, act="prelu", act_first=True, jk="max",
            act_kwargs={"num_parameters": 12}, norm="batch_norm",
        )(), SGD,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_every_model(name):
    build, settings = MODELS[name]
    data = WEIGHTED if "gcn" in name and "max" not in name else PLAIN
    assert_stacked_equals_serial(build, data, **settings)


class Watched:
    """An optimiser of the user's making, in groups that are told apart by dims, as many do."""

    def __init__(self, kind: type[torch.optim.Optimizer], **kwargs: Any) -> None:
        self.kind, self.kwargs = kind, kwargs

    def __call__(self, parameters: Any) -> torch.optim.Optimizer:
        parameters = list(parameters)
        flat = [p for p in parameters if p.dim() < 2]
        deep = [p for p in parameters if p.dim() >= 2]
        groups = [{"params": flat, "weight_decay": 0.0}, {"params": deep, "weight_decay": 0.3}]
        return self.kind(groups, lr=0.005, **self.kwargs)


RUNS: dict[str, dict[str, Any]] = {
    "adam": {"weight_decay": 1e-2},
    "adamw": {"optimizer": "adamw", "weight_decay": 0.3},
    "sgd": {"optimizer": "sgd", "weight_decay": 1e-2},
    "adam, carried": {"optimizer_state": "carry"},
    "sgd, carried": {"optimizer": "sgd", "optimizer_state": "carry"},
    "adamw, carried, clipped": {
        "optimizer": "adamw", "optimizer_state": "carry", "clip_norm": 0.05,
    },
    "clipped": {"optimizer": "sgd", "clip_norm": 0.05},
    "clipped a little": {"optimizer": "sgd", "clip_norm": 0.6},
    "groups": {"optimizer": Watched(torch.optim.AdamW)},
    "groups, carried": {"optimizer": Watched(torch.optim.SGD, momentum=0.8),
                        "optimizer_state": "carry"},
    "adagrad": {"optimizer": Watched(torch.optim.Adagrad, initial_accumulator_value=0.1)},
    "adagrad, carried": {"optimizer": Watched(torch.optim.Adagrad), "optimizer_state": "carry"},
    "rmsprop": {"optimizer": Watched(torch.optim.RMSprop, momentum=0.3)},
    "nadam": {"optimizer": Watched(torch.optim.NAdam)},
    "rprop": {"optimizer": lambda ps: torch.optim.Rprop(ps, lr=1e-3)},
    "corrected": {"width_correction": True},
    "not corrected": {"width_correction": False},
    "step schedule": {"schedule": "step"},
    "5 subnets of 2 or 3": {"num_subnets": 5},
    "5 subnets, carried": {"num_subnets": 5, "optimizer_state": "carry"},
    "7 subnets of 1 or 2": {"num_subnets": 7, "clip_norm": 0.1},
    "12 subnets of 1": {"num_subnets": 12},
    "annealed": {"num_subnets": [(0.34, 4), (0.33, 2), (0.33, 1)]},
    "overlapping": {"sampler": Overlapping(min_units=6)},
    "all units in every subnet": {"sampler": Overlapping(min_units=12), "num_subnets": 2},
    "overlapping, carried": {"sampler": Overlapping(min_units=5), "optimizer_state": "carry"},
}  # fmt: skip
TYPICAL = {
    "gcn": ours(gist.nn.GCN),
    "sage, no norm": ours(gist.nn.GraphSAGE, norm=None),
}


@pytest.mark.parametrize("name", RUNS)
def test_every_setting(name):
    assert_stacked_equals_serial(TYPICAL["sage, no norm"], **RUNS[name])


@pytest.mark.parametrize("name", ["corrected", "not corrected", "5 subnets, carried", "annealed"])
def test_settings_with_layer_norms(name):
    assert_stacked_equals_serial(TYPICAL["gcn"], **RUNS[name])


@pytest.mark.parametrize("state", ["reset", "carry"])
@pytest.mark.parametrize("sampler", [Bernoulli(keep=0.5), Categorical()])
def test_subnets_of_random_sizes(sampler, state):
    """Few units, so that some subnets that follow each other happen to be of one shape."""

    def build() -> nn.Module:
        return gist.nn.GCN(FEATURES, 16, CLASSES, 2, dropout=0.0, norm=None)

    stacked = assert_stacked_equals_serial(
        build, sampler=sampler, num_subnets=8, optimizer_state=state
    )
    assert not all(program.grouped for program in stacked.programs), "and others are not"


UNEVEN = ["gcn, batch norm, no bias", "sage, one weight", "gat", "gat, whole heads", "gat v2",
          "pyg sage, projected", "pyg gin, learnt eps", "pyg gat v2, wide prelu"]  # fmt: skip


@pytest.mark.parametrize("name", UNEVEN)
def test_models_whose_width_m_does_not_divide(name):
    build, settings = MODELS[name]
    m = 4 if "heads" in name else 5
    stacked = assert_stacked_equals_serial(build, **settings, num_subnets=m)
    assert len(stacked.programs) > 1, "subnets of several shapes"


def test_no_subnet_clips_for_another():
    """The norm is a subnet's own: here one subnet alone has a large gradient."""

    def build() -> nn.Module:
        model = ours(gist.nn.GCN, norm=None)()
        with torch.no_grad():
            model.convs[2].lin.weight[:, 0] *= 1e3
        return model

    assert_stacked_equals_serial(build, optimizer="sgd", clip_norm=0.05, lr=0.1)


@pytest.mark.parametrize("state", ["reset", "carry"])
def test_frozen_parameters(state):
    def build() -> nn.Module:
        model = ours(gist.nn.GCN, norm="batch", bias=False)()
        model.convs[1].lin.weight.requires_grad_(False)
        model.norms[0].weight.requires_grad_(False)
        return model

    stacked = assert_stacked_equals_serial(build, optimizer_state=state)
    start = fresh(build)
    assert torch.equal(stacked.model.convs[1].lin.weight, start.convs[1].lin.weight)


@pytest.mark.parametrize("state", ["reset", "carry"])
def test_parameters_frozen_and_freed_between_rounds(state):
    seen: list[Tensor] = []

    def toggle(model: nn.Module, round: int) -> None:
        weight = model.convs[1].lin.weight.requires_grad_(round % 2 == 1)
        seen.append(weight.detach().clone())

    assert_stacked_equals_serial(TYPICAL["gcn"], between=toggle, rounds=4, optimizer_state=state)
    kept = seen[4:]  # of the stacked run
    assert torch.equal(kept[0], kept[1]), "frozen in round 1"
    assert not torch.equal(kept[1], kept[2]), "free in round 2"
    assert torch.equal(kept[2], kept[3])


SAMPLED = LADIES(nodes_per_layer=(12, 12, 12), batch_size=8)
BATCHES: dict[str, tuple[Callable[[], nn.Module], BatchRecipe]] = {
    "clusters": (MODELS["sage"][0], Cluster(num_parts=6, parts_per_batch=2, cache=False)),
    "clusters, one weight": (
        MODELS["sage, one weight"][0], Cluster(num_parts=6, parts_per_batch=3, cache=False),
    ),
    "random parts, weighted": (
        MODELS["gcn"][0],
        Cluster(num_parts=5, method="random", normalization="full", cache=False),
    ),
    "clusters, pyg": (MODELS["pyg gin, learnt eps"][0], Cluster(num_parts=4, cache=False)),
    "clusters, attention": (MODELS["gat"][0], Cluster(num_parts=4, cache=False)),
    "sampled layers": (MODELS["gcn"][0], SAMPLED),
    "sampled layers, mean": (MODELS["sage, one weight"][0], replace(SAMPLED, form="mean")),
    "a loader": (
        MODELS["pyg sage, max"][0],
        PyGLoader(partial(RandomNodeLoader, num_parts=3, shuffle=True)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("inductive", [False, True])
@pytest.mark.parametrize("name", BATCHES)
def test_batches_of_any_kind(name, inductive):
    """All subnets of a round see the same, ever new ones: no product of one serves another."""
    build, recipe = BATCHES[name]
    data = graph(weighted="weighted" in name)
    objective = GraphObjective(data, CPU, recipe, inductive=inductive)
    settings = {"num_subnets": 5, "optimizer": "sgd", "optimizer_state": "carry"}
    assert_stacked_equals_serial(build, objective, **settings)


class Residual(nn.Module):
    """A user's own model of (x, edge_index): residual, a layer used twice, tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(FEATURES, 12)
        self.conv, self.norm = pyg.GCNConv(12, 12), nn.LayerNorm(12)
        self.near = pyg.SAGEConv(12, 12, aggr="max")
        self.again = pyg.SAGEConv(12, 12, aggr="max")
        self.again.lin_l.weight = self.near.lin_l.weight
        self.mix = gist.nn.SAGEConcatConv(12, 12)
        self.head = self.other = nn.Linear(12, CLASSES)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        h = self.act(self.embed(x))
        for _ in range(2):
            h = h + self.act(self.norm(self.conv(h, edge_index)))
        h = h + self.near(h, edge_index).tanh() - self.again(h, edge_index).tanh()
        h = F.dropout(h, 0.0, self.training) + self.mix(x=h, edge_index=edge_index)
        return self.head(h) + self.other(h.relu())


RESIDUAL = {
    "h": {
        "out": ["embed", "conv", "near", "again", "mix"],
        "through": ["norm"],
        "in": ["conv", "near", "again", "mix", "head"],
    }
}


class Chain(nn.Module):
    """Another: a chain of layers of several kinds, with functions between them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = pyg.GATConv(FEATURES, 6, heads=3), pyg.BatchNorm(18)
        self.two, self.slope = pyg.GATv2Conv(18, 12, heads=2, concat=False), nn.PReLU(12)
        self.three = pyg.GINConv(nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12)))
        self.four = pyg.GCNConv(12, CLASSES, cached=True)

    def forward(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None = None) -> Tensor:
        x = F.elu(self.norm(self.one(x, edge_index)))
        x = self.slope(self.two(x, edge_index))
        return self.four(self.three(x, edge_index).sigmoid(), edge_index, edge_weight)


@pytest.mark.parametrize("m", [3, 5])
@pytest.mark.parametrize(
    ("build", "wiring", "data"),
    [
        (Residual, RESIDUAL, PLAIN),
        (Chain, ["one", "norm", "two", "slope", "three", "four"], PLAIN),
        (Chain, ["one", "norm", "two", "slope", "three", "four"], WEIGHTED),
        (Chain, [("one", "heads"), "norm", "two", "slope", "three", "four"], PLAIN),
    ],
    ids=["groups", "chain", "weighted chain", "chain of heads"],
)
def test_models_of_the_users_own(build, wiring, data, m):
    heads = not isinstance(wiring, dict) and isinstance(wiring[0], tuple)
    m = 3 if heads else m
    stacked = assert_stacked_equals_serial(
        build, data, wiring=wiring, num_subnets=m, optimizer="sgd"
    )
    model = stacked.model
    if build is Residual:
        assert model.near.lin_l.weight is model.again.lin_l.weight
        assert model.head is model.other


class Gain(nn.Module):
    """A layer of the user's own: a gain for each feature, one for all, and a running mean."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.each, self.all = nn.Parameter(torch.rand(width)), nn.Parameter(torch.tensor(1.0))
        self.register_buffer("mean", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:  # puts a new buffer in place of the old one, as many layers do
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return (x - self.mean) * self.each * self.all


class GroupedGain(nn.Module):
    def __init__(self, gain: Gain, grouping: Grouping) -> None:
        super().__init__()
        for name in ("each", "all", "mean"):
            grouping.tensor_of(gain, name, self)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return (x - self.mean) * self.each * self.all[:, None]


class GainRule(Rule):
    def connect(self, layer: Any) -> Any:
        layer.follow("each", (0, layer.input))
        layer.follow("mean", (0, layer.input))
        layer.follow("all")
        return layer.input

    def grouped(self, module: Gain, grouping: Grouping) -> nn.Module | None:
        return GroupedGain(module, grouping)


class Vectors:
    """An objective that knows no graph: rows of features, in batches."""

    steps_per_epoch = 4

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(32, FEATURES, generator=generator, dtype=torch.float64)
        self.y = torch.randint(CLASSES, (32,), generator=generator)

    def batches(self, *, seed: int, round: int, subnet: int, steps: int) -> Any:
        generator = torch.Generator().manual_seed(hash((seed, round, subnet)) % 2**31)
        for _ in range(steps):
            yield torch.randint(32, (8,), generator=generator)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        scores = model(self.x[batch])
        if scores.dim() == 2:
            return F.cross_entropy(scores, self.y[batch])
        targets = self.y[batch, None].expand(-1, scores.size(1))
        return F.cross_entropy(scores.transpose(1, 2), targets, reduction="none").mean(0)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        right = float((model(self.x).argmax(1) == self.y).double().mean())
        return {"val_metric": right, "test_metric": right, "val_loss": 1 - right}

    def sample_inputs(self, model: nn.Module) -> Any:
        return (torch.randn(8, FEATURES, dtype=torch.float64),), {}  # not the same ones twice

    def check(self, model: nn.Module) -> None: ...

    def fingerprint(self) -> str:
        return "vectors"


@pytest.mark.parametrize("settings", [{}, {"num_subnets": 5}, {"optimizer_state": "carry"},
                                      {"optimizer": "sgd", "clip_norm": 0.1}], ids=str)  # fmt: skip
@pytest.mark.parametrize(
    ("build", "wiring"),
    [
        (lambda: nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.Tanh(),
                               nn.Linear(12, 3)), ["0", "2", "4"]),
        (lambda: nn.Sequential(nn.Linear(6, 12, bias=False), nn.BatchNorm1d(12, momentum=None),
                               nn.PReLU(), nn.Linear(12, 3)), ["0", "1", "2", "3"]),
        (lambda: nn.Sequential(nn.Linear(6, 12), Gain(12), nn.Linear(12, 3)), ["0", "1", "2"]),
    ],
    ids=["plain", "batch norm", "rule of the user's"],
)  # fmt: skip
def test_models_and_objectives_without_a_graph(build, wiring, settings):
    register_rule(Gain)(GainRule)
    try:
        stacked = assert_stacked_equals_serial(build, Vectors(), wiring=wiring, **settings)
    finally:
        del _RULES[Gain]
    for module in stacked.model.modules():
        if isinstance(module, Gain):
            assert module.mean.all(), "buffers that are put in place anew come back as well"


@pytest.mark.parametrize(("precision", "close"), [("full", 1e-4), ("bfloat16", 0.1)])
def test_other_precisions_come_out_alike(precision, close):
    data = graph(dtype=torch.float32)
    trained = []
    for executor in EXECUTORS:
        model = fresh(TYPICAL["gcn"]).float()
        trainer = GISTTrainer(model, data, executor=executor, precision=precision, **SETTINGS)
        trainer.fit()
        trained.append(trainer.predict())
        assert all(p.dtype == torch.float32 for p in model.parameters())
    assert float((trained[0] - trained[1]).abs().max()) < close * float(trained[0].abs().max())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # of torch's compiler
def test_compiled_programs():
    def build() -> nn.Module:
        return gist.nn.GCN(FEATURES, 4, CLASSES, 2, dropout=0.0)

    settings = {"num_subnets": 2, "rounds": 2, "local_steps": 1}
    reference = run("serial", build, PLAIN, **settings)
    for executor in EXECUTORS:
        assert_same(reference, run(executor, build, PLAIN, **settings, compile=True))


def test_subnets_of_one_shape_that_follow_each_other_are_stacked():
    executor = run("stacked", TYPICAL["gcn"], PLAIN, rounds=1).executor
    sizes = executor.spec.sizes

    def deal(*widths: int) -> Assignment:
        units = tuple(torch.arange(width) for width in widths)
        return Assignment(round=0, sizes=sizes, held=dict.fromkeys(sizes, units))

    assert executor.chunks(deal(3, 3, 2, 2, 2)) == [range(2), range(2, 5)]
    assert executor.chunks(deal(4, 3, 4)) == [range(1), range(1, 2), range(2, 3)]
    assert executor.chunks(deal(5)) == [range(1)]
    executor.most = 2
    assert executor.chunks(deal(3, 3, 3, 3, 3)) == [range(2), range(2, 4), range(4, 5)]


def test_as_many_at_once_as_fit_changes_nothing():
    serial = run("serial", TYPICAL["gcn"], PLAIN, num_subnets=4)
    for most in (1, 2, 3):
        assert_same(serial, run("stacked", TYPICAL["gcn"], PLAIN, num_subnets=4, most=most))


@dataclass(frozen=True)
class Staircase(Sampler):
    """Every subnet holds two units more than the one before it: no two have one shape."""

    def deal(self, size: int, num_subnets: int, generator: Generator) -> list[Tensor]:
        order = torch.randperm(size, generator=generator)
        steps = [i * (i + 1) for i in range(1, num_subnets)]
        return list(order.tensor_split(steps))


@pytest.mark.parametrize("state", ["reset", "carry"])
def test_a_subnet_that_has_no_equal_runs_as_on_its_own_bit_for_bit(state):
    """With dropout as well: its random stream is the same, whoever runs it."""

    def build() -> nn.Module:
        return gist.nn.GCN(FEATURES, 12, CLASSES, 3, dropout=0.5, norm="batch")

    serial, stacked = (
        run(name, build, PLAIN, sampler=Staircase(), optimizer_state=state) for name in EXECUTORS
    )
    assert_same(serial, stacked, within=0.0)


def test_divergence_names_the_round_and_the_subnet_and_leaves_the_model_usable():
    held: list[Tensor] = []

    def poison(model: nn.Module, round: int) -> None:
        spec = partition_spec(model)
        deal = DisjointUniform()(spec.sizes, 3, seed=SETTINGS["seed"], round=1)
        held.append(deal.held["hidden.0"][2][:1])
        with torch.no_grad():
            model.convs[0].lin_l.weight[held[0]] = float("nan")
        models.append(model)

    models: list[nn.Module] = []
    with pytest.raises(
        DivergedError, match=r"round 1, subnet 2: .*no longer finite.*nan.*lower lr"
    ):
        run("stacked", TYPICAL["sage, no norm"], PLAIN, between=poison)
    broken = models[0].convs[0].lin_l.weight.isnan().any(dim=1).nonzero()[:, 0]
    assert torch.equal(broken, held[0]), "what one subnet got wrong is not merged into others"
    rest = [p for n, p in models[0].named_parameters() if n != "convs.0.lin_l.weight"]
    assert all(bool(torch.isfinite(p).all()) for p in rest)
    assert all(p.grad is None for p in models[0].parameters())


def test_memory_does_not_grow_with_the_rounds():
    counts: list[int] = []

    def count(model: nn.Module, round: int) -> None:
        if round in (2, 9):
            gc.collect()
            counts.append(sum(issubclass(type(o), Tensor) for o in gc.get_objects()))

    run("stacked", TYPICAL["gcn"], PLAIN, rounds=10, between=count, num_subnets=5)
    assert counts[0] == counts[1]
