"""A rehearsed run takes what a real one takes: bytes against real tensors, operations by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch_geometric.nn import GCN as PygGCN

from gist import Bernoulli, GISTTrainer, GraphData, GraphShape, TrainConfig, load_dataset
from gist.costs.graph_run import rehearse_evaluation
from gist.costs.rehearsal import Rounds, rehearse_rounds
from gist.costs.stage import Stage
from gist.execution.program import Program
from gist.execution.rounds import RoundExecutor
from gist.graph.live_bytes import LiveBytes
from gist.graph.outline import OutlineObjective
from gist.nn import GAT, GCN, GraphSAGE
from gist.partition.transfer import Selection
from gist.partition.wiring import partition_spec
from gist.plan import RoundPlan, plan_rounds

CPU = torch.device("cpu")
NODES, DEGREE, FEATURES, CLASSES = 200, 8, 12, 5
DATA = load_dataset(
    "csbm",
    num_nodes=NODES,
    num_features=FEATURES,
    num_classes=CLASSES,
    average_degree=DEGREE,
    degree_exponent=None,
)
MODELS = {
    "gcn": lambda: GCN(FEATURES, 48, CLASSES, 3),
    "sage": lambda: GraphSAGE(FEATURES, 48, CLASSES, 3),
    "sage-concat": lambda: GraphSAGE(FEATURES, 48, CLASSES, 3, concat=True, norm="batch"),
    "gat": lambda: GAT(FEATURES, 48, CLASSES, 2, heads=4),
    "pyg": lambda: PygGCN(FEATURES, 48, 2, CLASSES),
}


def rehearsed(
    build: Any, data: GraphData | GraphShape = DATA, *, most: int | None = None, **settings: Any
) -> tuple[Rounds, tuple[int, int]]:
    """The rounds of a run, and its evaluation; ``most`` subnets at once, else one by one."""
    stage = Stage(CPU)
    config = TrainConfig(**{"num_subnets": 4, "rounds": 3, "local_steps": 2, **settings})
    shape = data if isinstance(data, GraphShape) else GraphShape.of(data)
    with stage.computing():
        objective = OutlineObjective.of_shape(shape, CPU)
        model = build()
    evaluation = rehearse_evaluation(stage, model, objective)
    plans = {plan.num_subnets: plan for plan in reversed(plan_rounds(config, 1))}
    rounds = sorted(plans.values(), key=lambda plan: plan.index)
    spec = partition_spec(model)
    # A first run makes what the graph keeps from then on.
    few = min(2 if most else 1, rounds[0].num_subnets)
    first = replace(config, num_subnets=few), [replace(rounds[0], num_subnets=few)]
    rehearse_rounds(stage, model, spec, objective, *first, most=most)
    found = rehearse_rounds(stage, model, spec, objective, config, rounds, most=most)
    return found, evaluation


def executor_of(trainer: GISTTrainer) -> RoundExecutor:
    assert isinstance(trainer.executor, RoundExecutor)
    return trainer.executor


def index_sets(trainer: GISTTrainer, plan: RoundPlan) -> list[Any]:
    """Which units each subnet holds, and the positions of these in every tensor."""
    assignment, layouts = trainer.assign(plan), trainer.spec.layouts.values()
    selections = [Selection(trainer.spec, assignment, i) for i in range(plan.num_subnets)]
    return [assignment, [[each.index(layout) for layout in layouts] for each in selections]]


@pytest.mark.parametrize("executor", ["serial", "stacked"])
@pytest.mark.parametrize("name", MODELS)
def test_a_real_round_has_as_many_bytes_alive(name, executor):
    trainer = GISTTrainer(
        MODELS[name](), DATA, executor=executor, num_subnets=4, rounds=3, local_steps=2
    )
    trainer.evaluate()  # makes what the graph keeps, but for
    assert all(matrix.columns for matrix in DATA.adjacency._matrices.values())
    runs, plan = executor_of(trainer), trainer.rounds[0]
    with LiveBytes() as live:
        runs.run_round(plan, trainer.assign(plan))
    with LiveBytes() as indices:  # a rehearsal has those of one program's subnets
        kept = index_sets(trainer, plan)
    rounds, _ = rehearsed(MODELS[name], most=4 if executor == "stacked" else None)

    def tensors(programs: list[Program]) -> int:
        return sum(t.nbytes for program in programs for t in program.tensors.values())

    programs = list(runs._programs.values())
    state = [e for p in programs for s in p.optimizer.state.values() for e in s.values()]
    assert rounds.subnets == tensors(programs)
    assert rounds.optimizer == sum(tensor.nbytes for tensor in state)
    peak = max(rounds.training, rounds.arranging)
    assert 0.999 * live.peak - indices.bytes <= peak <= 1.01 * live.peak, "targets of a loss"
    assert kept


def test_an_evaluation_has_as_many_bytes_alive():
    trainer = GISTTrainer(MODELS["sage"](), DATA, num_subnets=2, rounds=1, evaluation="full")
    trainer.evaluate()
    objective = trainer.objective
    with LiveBytes() as live, torch.no_grad():
        objective.scores(trainer.model.eval(), DATA.x, DATA.adjacency)
    _, (peak, _) = rehearsed(MODELS["sage"])
    assert live.peak <= peak <= 1.05 * live.peak


def hand_count(kind: str, n: int, e: int, f: int, d: int, c: int, layers: int, m: int) -> int:
    """Operations of one training step of m subnets, from the formulas of the layers.

    A linear map costs ``2 n k o`` forward, as much for the gradient of its weight, and as much for
    that of its input, which the first layer does not need. A product with the graph costs 2 for
    each stored entry and column, forward and back. Input features are multiplied once and kept.
    """
    k = d // m
    weights, stored = (1, e + n) if kind == "gcn" else (2, e)
    first = weights * 2 * (2 * n * f * k)
    hidden = weights * 3 * (2 * n * k * k) + 2 * (2 * stored * k)
    last = weights * 3 * (2 * n * k * c) + 2 * (2 * stored * min(k, c))
    return m * (first + (layers - 2) * hidden + last)


@pytest.mark.parametrize("kind", ["gcn", "sage"])
@pytest.mark.parametrize(("m", "most"), [(1, None), (4, None), (4, 4), (4, 2)])
def test_operations_are_those_of_the_formulas(kind, m, most):
    n, e, f, d, c, layers = 500, 3000, 20, 64, 7, 4
    build = {"gcn": GCN, "sage": GraphSAGE}[kind]
    shape = GraphShape(num_nodes=n, num_edges=e, num_features=f, num_classes=c)
    rounds, (_, evaluation) = rehearsed(
        lambda: build(f, d, c, layers), shape, most=most, num_subnets=m
    )
    assert rounds.step_flops == {m: hand_count(kind, n, e, f, d, c, layers, m)}
    whole = hand_count(kind, n, e, f, d, c, layers, 1)
    backward = whole - evaluation
    weights = 1 if kind == "gcn" else 2
    assert backward == 2 * evaluation - weights * 2 * n * f * d - (layers - 1) * 2 * (
        e + (n if kind == "gcn" else 0)
    ) * d + 2 * (e + (n if kind == "gcn" else 0)) * (d - c)


def test_hidden_to_hidden_work_falls_by_m():
    def work(m: int, layers: int) -> int:
        shape = GraphShape(num_nodes=300, num_edges=0, num_features=8, num_classes=4)
        build = lambda: GraphSAGE(8, 96, 4, layers)  # noqa: E731
        return rehearsed(build, shape, most=m, num_subnets=m)[0].step_flops[m]

    assert (work(4, 4) - work(4, 3)) * 4 == work(1, 4) - work(1, 3)


def test_programs_of_earlier_phases_are_kept():
    one, _ = rehearsed(MODELS["gcn"], num_subnets=1)
    four, _ = rehearsed(MODELS["gcn"], num_subnets=4, most=4)
    both, _ = rehearsed(MODELS["gcn"], num_subnets=[(0.7, 4), (0.3, 1)], most=4)
    assert both.subnets == one.subnets + four.subnets
    assert both.optimizer == one.optimizer + four.optimizer
    assert both.gradients == one.gradients
    assert both.step_flops == four.step_flops | one.step_flops


def test_uneven_subnets_take_one_program_for_each_shape():
    rounds, _ = rehearsed(MODELS["gcn"], num_subnets=5, most=5)  # 48 units: 10, 10, 10, 9, 9
    alone, _ = rehearsed(MODELS["gcn"], num_subnets=5)
    assert rounds.subnets == 3 * 4 * (12 * 10 + 10 * 10 + 10 * 5 + 25) + 2 * 4 * (
        12 * 9 + 9 * 9 + 9 * 5 + 23
    )
    assert alone.subnets == rounds.subnets - 2 * 4 * (12 * 10 + 10 * 10 + 10 * 5 + 25) - 4 * (
        12 * 9 + 9 * 9 + 9 * 5 + 23
    )
    assert alone.turned == alone.subnets, "each trains several subnets in turn"
    assert rounds.turned == 0


def test_carried_state_is_counted():
    kept, _ = rehearsed(MODELS["gcn"], optimizer_state="carry")
    parameters = sum(p.numel() for p in MODELS["gcn"]().parameters())
    assert kept.carried == pytest.approx(parameters * (2 * 4 + 1), rel=0.02)  # moments, seen
    assert rehearsed(MODELS["gcn"])[0].carried == 0


def test_overlapping_subnets_are_merged_by_means():
    plain, _ = rehearsed(MODELS["gcn"], most=4)
    shared, _ = rehearsed(MODELS["gcn"], sampler=Bernoulli(keep=0.5))
    whole = sum(p.nbytes for p in MODELS["gcn"]().parameters())
    assert shared.arranging - shared.subnets > whole, "running means and counts of all entries"
    assert plain.arranging < plain.subnets + plain.optimizer + plain.carried + whole


def test_settings_of_the_steps_are_followed():
    plain, clipped, half = (
        rehearsed(MODELS["sage"], most=4, **settings)[0].training
        for settings in ({}, {"clip_norm": 1.0}, {"clip_norm": 1.0, "precision": "bfloat16"})
    )
    assert half < plain <= clipped


@pytest.mark.parametrize(("optimizer", "states"), [("sgd", 1), ("adam", 2)])
def test_optimisers_differ_in_their_state(optimizer, states):
    rounds, _ = rehearsed(MODELS["gcn"], optimizer=optimizer)
    assert rounds.optimizer == pytest.approx(states * rounds.subnets, rel=0.02)


def test_a_model_is_left_as_it_is():
    model = MODELS["gcn"]()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    outline = Stage(CPU).outline(model)
    assert all(torch.equal(tensor, before[n]) for n, tensor in model.state_dict().items())
    shapes = {name: tensor.shape for name, tensor in outline.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in before.items()}


def test_ties_and_frozen_parameters_survive_in_an_outline():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    outline = Stage(CPU).outline(model)
    assert outline[0].weight is outline[1].weight
    assert not outline[0].bias.requires_grad
    assert isinstance(outline[1].bias, nn.Parameter)
