"""What a plan says: sizes by hand, settings that change it in the way that they must."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import cache
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.filesize import decimal
from torch import nn
from torch_geometric.nn import GCNConv

from gist import (
    LADIES,
    Bernoulli,
    Cluster,
    ConfigError,
    Costs,
    GraphData,
    GraphShape,
    PartitionError,
    TrainConfig,
    estimate_costs,
    load_dataset,
)
from gist.costs.costs import render
from gist.execution.memory import PeakMemory, memory_in_use
from gist.nn import GCN, GraphSAGE

N, E, F, C, D, LAYERS = 20_000, 160_000, 32, 7, 512, 3
SHAPE = GraphShape(num_nodes=N, num_edges=E, num_features=F, num_classes=C, train_nodes=8000)
ROUNDS = {"rounds": 2, "local_steps": 3}
HUGE = 10**15


def outline(width: int = D, layers: int = LAYERS, **options: Any) -> nn.Module:
    """A model without memory: two weights of each layer, and their bias."""
    with torch.device("meta"):
        return GraphSAGE(F, width, C, layers, **options)


def plan(
    data: GraphData | GraphShape = SHAPE, model: nn.Module | None = None, **settings: Any
) -> Costs:
    """A plan with room for everything, one subnet at a time, unless the settings say otherwise."""
    settings = {"executor": "serial", "memory_limit": HUGE, **ROUNDS, **settings}
    return estimate_costs(outline() if model is None else model, data, **settings)


@cache
def known(**settings: Any) -> Costs:
    """A plan that several tests read."""
    return plan(**settings)


def entries(width: int, layers: int = LAYERS) -> int:
    """Parameters of a model of that width, from the formulas of its layers."""
    return 2 * (F * width + (layers - 2) * width * width + width * C) + (layers - 1) * width + C


def without_process(costs: Costs) -> dict[str, Any]:
    """All that does not depend on what this process happens to take at the moment."""
    values = asdict(costs)
    for name in ("memory", "full_model_bytes"):
        del values[name]
    return {**values, "memory": items_of(costs)}


def items_of(costs: Costs) -> dict[str, dict[str, int]]:
    return {
        phase: {item: size for item, size in items.items() if item != "process"}
        for phase, items in costs.memory.items()
    }


def test_sizes_are_those_of_the_graph_the_model_and_its_subnets():
    costs = known(num_subnets=8)
    assert costs.data == {
        "nodes": N, "edges": E, "features": F, "classes": C, "batch_nodes": N, "batch_edges": E,
    }  # fmt: skip
    assert costs.num_parameters == entries(D)
    # The bias of the output belongs to every subnet, that of a hidden unit to its holder.
    assert costs.parameters_per_subnet == entries(D // 8)
    assert known(num_subnets=1).parameters_per_subnet == entries(D)
    assert plan(num_subnets=12).parameters_per_subnet == entries(43), "512 = 8 x 43 + 4 x 42"


def test_items_of_known_size_have_it():
    memory = known(num_subnets=8).memory["training"]
    assert memory["model"] == memory["best_model"] == 4 * entries(D)
    assert memory["subnets"] == memory["gradients"] == 4 * entries(D // 8)
    assert 2 * memory["subnets"] <= memory["optimizer_state"] < 2.01 * memory["subnets"], "Adam"
    graph = 4 * N * F + 8 * N + 4 * (E + N + 1)
    assert graph <= memory["data"] < 4 * graph


@pytest.mark.parametrize("kind", [GCN, GraphSAGE])
def test_sizes_alone_plan_what_the_graph_and_the_model_themselves_do(kind):
    data = load_dataset("csbm", num_nodes=500, num_features=F, num_classes=C, degree_exponent=None)
    with torch.device("meta"):
        nothing = kind(F, 64, C, 3)
    one = plan(GraphShape.of(data), nothing, num_subnets=4)
    other = plan(data, kind(F, 64, C, 3), num_subnets=4)
    assert without_process(one) == without_process(other)


def test_a_plan_leaves_the_model_as_it_is():
    model = GraphSAGE(F, 64, C, 3)
    model.eval()
    before = {name: (t.clone(), t.data_ptr()) for name, t in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    state = torch.get_rng_state()
    plan(model=model, num_subnets=4, executor="auto")
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: module.training for name, module in model.named_modules()} == modes
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name][0])
        assert tensor.data_ptr() == before[name][1]
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("executor", ["serial", "stacked", "auto"])
def test_a_plan_is_the_same_each_time(executor):
    settings = {"num_subnets": [(0.5, 3), (0.5, 2)], "executor": executor}
    assert without_process(plan(**settings)) == without_process(plan(**settings))


# Batches.


def test_a_batch_of_clusters_is_one_of_average_size():
    costs = plan(num_subnets=4, clusters=50, clusters_per_batch=3)
    assert costs.data["nodes"] == N
    assert costs.data["batch_nodes"] == math.ceil(N * 3 / 50)
    assert costs.data["batch_edges"] == math.ceil(E * 3 / 50)
    assert any("clusters are taken to be of equal size" in note for note in costs.notes)
    assert not any("clusters" in note for note in known(num_subnets=4).notes)


def test_activations_of_a_step_follow_its_nodes():
    whole, part = (
        plan(num_subnets=4, **settings).memory["training"]["activations"]
        for settings in ({}, {"clusters": 40, "clusters_per_batch": 4})
    )
    assert part == pytest.approx(whole / 10, rel=0.15)


def test_clusters_and_their_recipe_are_the_same():
    one = plan(num_subnets=4, clusters=20, clusters_per_batch=2)
    other = plan(num_subnets=4, batches=Cluster(num_parts=20, parts_per_batch=2))
    assert without_process(one) == without_process(other)


def test_an_epoch_of_clusters_has_the_work_of_one_of_the_whole_graph():
    settings = {"num_subnets": 4, "rounds": None, "epochs": 80, "local_steps": 5}
    whole, cut = plan(**settings), plan(**settings, clusters=50, clusters_per_batch=5)
    # Products with the input features are made for every batch anew, for the whole graph once.
    assert cut.flops["full_run"] == pytest.approx(whole.flops["full_run"], rel=0.03)
    assert cut.flops["round"] == pytest.approx(whole.flops["round"] / 10, rel=0.2)


def test_an_inductive_run_keeps_the_training_subgraph_too_and_steps_on_it():
    plain, inductive = known(num_subnets=4), plan(num_subnets=4, inductive=True)
    assert inductive.data["nodes"] == N
    assert inductive.data["batch_nodes"] == 8000
    assert inductive.data["batch_edges"] == math.ceil(E * 8000 / N)
    more = inductive.memory["training"]["data"] - plain.memory["training"]["data"]
    assert more > 8000 * F * 4
    cut = plan(num_subnets=4, inductive=True, clusters=10)
    assert cut.data["batch_nodes"] == 800
    assert cut.memory["training"]["activations"] < inductive.memory["training"]["activations"]


def test_batches_that_only_the_graph_can_tell_are_said_to_be_planned_as_the_whole():
    costs = plan(num_subnets=4, batches=LADIES(nodes_per_layer=(64, 64)))
    assert costs.data["batch_nodes"] == N
    assert any("LADIES" in note for note in costs.notes)


def test_the_evaluation_that_is_asked_for_is_planned():
    full, layerwise, clusters = (
        plan(num_subnets=2, clusters=20, evaluation=how)
        for how in ("full", "layerwise", "clusters")
    )
    assert [c.evaluation for c in (full, layerwise, clusters)] == ["full", "layerwise", "clusters"]
    one_pass, batch = (c.memory["evaluation"]["activations"] for c in (full, clusters))
    assert batch < one_pass / 10


def test_an_evaluation_goes_layer_by_layer_where_one_pass_does_not_fit():
    free = plan(num_subnets=4)
    assert free.evaluation == "full"
    tight = plan(num_subnets=4, memory_limit=free.peak_memory_bytes - 20_000_000)
    assert free.peak_phase == "evaluation"
    assert tight.evaluation == "layerwise"
    assert tight.memory["evaluation"]["activations"] < free.memory["evaluation"]["activations"]


# Where things live.


def test_a_model_on_disk_takes_no_memory_but_for_the_pages_that_an_evaluation_reads(tmp_path):
    inside = known(num_subnets=4)
    disk = plan(num_subnets=4, store="disk", out=tmp_path / "run")
    for phase in ("verification", "first_step", "training", "merging"):
        assert "model" in inside.memory[phase]
        assert "model" not in disk.memory[phase]
    assert not any("best_model" in items for items in disk.memory.values())
    assert disk.memory["evaluation"]["model"] <= 4 * entries(D)
    assert disk.evaluation == "layerwise"
    assert disk.disk["model"] == disk.disk["best"] >= 4 * entries(D)
    assert set(inside.disk) == {"model"}
    # The subnets' second set of tensors is filled from the file while the first one trains.
    assert disk.memory["training"]["subnets"] == 2 * inside.memory["training"]["subnets"]
    assert not (tmp_path / "run").exists()
    last = plan(num_subnets=4, store="disk", out=tmp_path, keep_best=False)
    assert set(last.disk) == {"model"}


def test_a_model_on_disk_larger_than_memory_leaves_room_to_evaluate_it(tmp_path, monkeypatch):
    monkeypatch.setattr("gist.costs.run.free_memory", lambda device: 8 * 2**30)
    costs = plan(
        model=outline(65_536, 3),  # 34 GB
        num_subnets=8,
        store="disk",
        keep_best=False,
        out=tmp_path / "run",
        memory_limit=None,
    )
    assert costs.fits
    assert costs.evaluation == "layerwise"
    assert costs.memory["evaluation"]["activations"] > 2**30, "not the least that is possible"


def test_without_the_best_model_a_run_takes_one_model_less():
    best, last = items_of(known(num_subnets=4)), items_of(plan(num_subnets=4, keep_best=False))
    for phase in best:
        held = best[phase].pop("best_model", 0)
        assert held in (0, 4 * entries(D))
        assert best[phase] == last[phase]
    assert "best_model" not in last["training"]


def test_checkpoints_are_two_of_everything_that_a_run_goes_on_from(tmp_path):
    settings = {"num_subnets": 2, "out": tmp_path}
    plain = plan(**settings)
    assert "checkpoints" not in plain.disk
    size = plain.disk["model"]
    kept = plan(**settings, checkpoint_every=1)
    assert kept.disk["checkpoints"] == 2 * 2 * size
    assert items_of(kept) == items_of(plain)
    last = plan(**settings, checkpoint_every=1, keep_best=False)
    assert last.disk["checkpoints"] == 2 * size
    carried = plan(**settings, checkpoint_every=1, optimizer_state="carry")
    state = carried.memory["training"]["carried_state"]
    assert carried.disk["checkpoints"] == 2 * (2 * size + state)


def test_a_carried_state_is_two_moments_of_every_entry():
    costs = plan(num_subnets=2, optimizer_state="carry")
    carried = costs.memory["training"]["carried_state"]
    assert 8 * entries(D) <= carried <= 1.02 * 9 * entries(D), "and whether it was seen"
    assert costs.memory["evaluation"]["carried_state"] == carried
    assert not any("carried_state" in items for items in known(num_subnets=2).memory.values())


# Subnets, and where they run.


def test_subnets_shrink_with_the_square_of_their_number():
    held = {m: known(num_subnets=m).memory["training"] for m in (1, 2, 4, 8)}
    for m, items in held.items():
        assert items["subnets"] == 4 * entries(D // m)
        assert items["activations"] < 1.1 * held[1]["activations"] / m**0.5
    hidden = {m: 4 * 2 * (LAYERS - 2) * (D // m) ** 2 for m in held}
    assert hidden[1] == 64 * hidden[8]


def hidden_step(nodes: int, width: int, layers: int) -> int:
    """Operations of a step on a graph without edges, from the formulas of a layer.

    A map of ``k`` to ``o`` columns by two weights costs ``4 n k o`` forward, as much for the
    gradients of the weights, and as much for that of its input, which the first one does not need.
    """
    first, last = 4 * nodes * F * width, 4 * nodes * width * C
    return 2 * first + 3 * (layers - 2) * 4 * nodes * width * width + 3 * last


@pytest.mark.parametrize("m", [1, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_operations_of_deep_wide_models_fall_by_m_squared(m):
    lonely = replace(SHAPE, num_edges=0)
    model = outline(width=1024, layers=8)
    costs = plan(lonely, model, num_subnets=m, rounds=2, local_steps=3)
    whole, subnet = (hidden_step(N, width, 8) for width in (1024, 1024 // m))
    assert costs.flops["round"] == 3 * m * subnet
    assert costs.flops["run"] == 2 * costs.flops["round"]
    assert costs.flops["full_round"] == 3 * m * whole
    assert costs.flops["full_run"] == 2 * costs.flops["full_round"], "one step is one epoch"
    assert costs.flops_ratio == pytest.approx(whole / subnet)
    assert 0.85 * m**2 < costs.flops_ratio <= m**2


@pytest.mark.parametrize("executor", ["serial", "stacked"])
def test_the_budget_is_split_so_that_a_run_costs_its_share(executor):
    settings = {"rounds": None, "epochs": 48, "local_steps": 2, "executor": executor}
    one, four = plan(num_subnets=1, **settings), plan(num_subnets=4, **settings)
    assert one.flops["run"] == one.flops["full_run"] == four.flops["full_run"]
    assert one.flops_ratio == 1
    assert 4 < four.flops_ratio < 16
    assert one.flops["evaluation"] == four.flops["evaluation"]


def test_a_schedule_has_the_programs_of_all_phases_and_the_work_of_each():
    budget = {"rounds": None, "epochs": 96, "local_steps": 2}
    eight, one = plan(num_subnets=8, **budget), plan(num_subnets=1, **budget)
    both = plan(num_subnets=[(0.5, 8), (0.5, 1)], **budget)
    assert both.num_subnets == ((0.5, 8), (0.5, 1))
    memory = both.memory["training"]
    assert memory["subnets"] == 4 * (entries(D // 8) + entries(D))
    assert memory["gradients"] == one.memory["training"]["gradients"]
    assert memory["activations"] == one.memory["training"]["activations"]
    assert both.flops["run"] == (eight.flops["run"] + one.flops["run"]) // 2
    assert both.flops["full_run"] == one.flops["full_run"]
    assert both.flops["round"] == eight.flops["round"], "the first"
    assert both.parameters_per_subnet == eight.parameters_per_subnet
    assert 1 < both.flops_ratio < 2


def test_the_full_model_is_what_one_subnet_plans():
    costs, full = plan(num_subnets=4), plan(num_subnets=1)
    assert costs.full_model_bytes == pytest.approx(full.peak_memory_bytes, abs=2**24)
    assert costs.peak_memory_bytes < costs.full_model_bytes


def test_one_after_the_other_side_by_side_or_whichever_is_faster():
    serial, stacked, auto = (
        plan(num_subnets=4, executor=executor, evaluation="layerwise")
        for executor in ("serial", "stacked", "auto")
    )
    assert [c.executor for c in (serial, stacked, auto)] == ["serial", "stacked", "auto"]
    assert [c.stacked_at_once for c in (serial, stacked, auto)] == [1, 4, 4]
    one, every = serial.memory["training"], stacked.memory["training"]
    assert every["subnets"] == 4 * one["subnets"]
    assert 2 * one["activations"] < every["activations"] <= 4.25 * one["activations"]
    assert serial.flops == stacked.flops, "the same work"
    assert serial.exchange == stacked.exchange == auto.exchange
    # Where both are tried, what trained one subnet is still there while all of them step.
    trial = items_of(auto)["trial"]
    assert trial.pop("serial_trial") == one["subnets"] + one["optimizer_state"]
    assert trial == items_of(stacked)["training"]
    assert "trial" not in serial.memory | stacked.memory


def test_by_rule_nothing_is_tried():
    costs = plan(num_subnets=4, executor="auto", deterministic=True)
    assert costs.stacked_at_once == 4
    assert "trial" not in costs.memory


class Unknown(torch.optim.SGD):
    """It may treat the entries of a tensor together."""


@pytest.mark.parametrize(
    "settings",
    [{"num_subnets": 1}, {"num_subnets": 2, "shared_batches": False}, {"num_subnets": 2}],
    ids=["one subnet", "batches of their own", "an optimiser that cannot be stacked"],
)
def test_what_cannot_be_stacked_is_planned_one_after_the_other(settings):
    if settings == {"num_subnets": 2}:
        settings = {**settings, "optimizer": lambda p: Unknown(p, lr=0.1)}
    costs = plan(executor="auto", **settings)
    assert (costs.executor, costs.stacked_at_once) == ("serial", 1)


def test_as_many_are_stacked_as_the_limit_has_room_for():
    settings = {"num_subnets": 4, "executor": "stacked", "evaluation": "layerwise"}
    most = plan(**settings)
    least = plan(**settings | {"executor": "serial"})
    span = most.memory["training"]["activations"] - least.memory["training"]["activations"]
    limits = [most.peak_memory_bytes - span * share // 16 for share in (-1, 6, 13)]
    found = [plan(**settings, memory_limit=limit) for limit in limits]
    assert all(costs.fits and not costs.remedies for costs in found)
    at_once = [costs.stacked_at_once for costs in found]
    assert at_once == sorted(at_once, reverse=True)
    assert at_once[0] == 4
    assert len(set(at_once)) == 3
    assert all(costs.flops == most.flops for costs in found)


def test_workers_share_the_subnets_and_exchange_their_parts():
    alone, shared = (plan(num_subnets=8, executor="stacked", workers=workers) for workers in (1, 4))
    assert (alone.workers, shared.workers) == (1, 4)
    assert (alone.stacked_at_once, shared.stacked_at_once) == (8, 2)
    assert all(exchange.total == 0 for exchange in alone.exchange.values())
    gist, local, parallel = (
        shared.exchange[name].total for name in ("gist", "local_sgd", "data_parallel")
    )
    # Averages move all P of the model to 3 of 4 places, there and back, twice for 8 subnets.
    assert local == 2 * 3 * 4 * entries(D) * 2
    assert parallel == 3 * local, "once in each of the round's local steps"
    assert 0 < gist < local / 8
    assert any("one worker" in note for note in shared.notes)
    inside, share = alone.memory["training"], shared.memory["training"]
    assert 0.24 * inside["model"] < share["model"] < 0.3 * inside["model"]
    assert "exchange" in shared.memory["merging"]
    assert "exchange" not in alone.memory["merging"]
    assert not any("worker" in note for note in alone.notes)
    assert shared.memory["training"]["subnets"] < alone.memory["training"]["subnets"]


def test_samplers_are_asked_for_their_own_subnets():
    half = plan(num_subnets=4, sampler=Bernoulli(keep=0.5))
    assert entries(D // 4) < half.parameters_per_subnet < entries(D)


def test_settings_of_a_step_change_what_it_keeps():
    half = plan(num_subnets=4, precision="bfloat16").memory["training"]["activations"]
    assert half < known(num_subnets=4).memory["training"]["activations"]


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({"width": 256}, {"width": 512}),
        ({"layers": 3}, {"layers": 5}),
        ({"dropout": 0.0}, {"dropout": 0.5}),
    ],
    ids=["width", "depth", "dropout"],
)
def test_larger_models_take_more(less, more):
    small, large = (plan(model=outline(**options), num_subnets=2) for options in (less, more))
    assert large.memory["training"]["activations"] > small.memory["training"]["activations"]
    assert large.flops["run"] >= small.flops["run"]


# What is said about it.


@pytest.mark.parametrize("executor", ["serial", "auto"])
def test_what_is_derived_follows_from_the_items(executor):
    costs = plan(num_subnets=4, executor=executor, optimizer_state="carry")
    sums = {phase: sum(items.values()) for phase, items in costs.memory.items()}
    assert costs.peak_memory_bytes == max(sums.values()) == sums[costs.peak_phase]
    assert costs.flops_ratio == costs.flops["full_run"] / costs.flops["run"]
    assert all(size > 0 for items in costs.memory.values() for size in items.values())


def test_it_fits_where_the_peak_is_within_the_limit_and_else_there_are_remedies():
    roomy = known(num_subnets=1)
    assert roomy.fits
    assert roomy.memory_limit == HUGE
    assert roomy.remedies == ()
    short = plan(num_subnets=1, memory_limit="100MB")
    assert not short.fits
    assert short.memory_limit == 100_000_000 < short.peak_memory_bytes
    assert short.remedies[-2:] == ("a narrower model", "a higher memory_limit")
    assert len(set(short.remedies)) == len(short.remedies)
    assert short.flops == roomy.flops


def test_by_default_the_limit_is_what_is_in_use_and_free():
    costs = plan(model=outline(2**20, 3), num_subnets=4, memory_limit=None)
    assert memory_in_use(torch.device("cpu")) / 2 < costs.memory_limit < 2**45
    assert not costs.fits
    assert "a higher memory_limit" not in costs.remedies


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        assert all(isinstance(key, str) for key in value)
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from leaves(each)
    else:
        yield value


@pytest.mark.parametrize("subnets", [4, [(0.5, 4), (0.5, 1)]])
def test_json_has_every_attribute_and_numbers_as_numbers(subnets):
    costs = plan(num_subnets=subnets, executor="auto", workers=2, memory_limit="200MB")
    written = json.loads(json.dumps(costs.to_json(), allow_nan=False))
    assert written.keys() == set(Costs.__dataclass_fields__) | {
        "peak_phase", "peak_memory_bytes", "fits", "flops_ratio",
    }  # fmt: skip
    texts = {"executor", "evaluation", "peak_phase", "remedies", "notes", "exchange"}
    for name in written.keys() - texts:
        assert all(isinstance(leaf, int | float) for leaf in leaves(written[name])), name
    for exchange in written["exchange"].values():
        assert exchange.keys() == {"total", "busiest", "formula"}
        assert all(isinstance(exchange[name], int) for name in ("total", "busiest"))
    assert written["num_subnets"] == (4 if subnets == 4 else [[0.5, 4], [0.5, 1]])
    assert written["memory"] == costs.memory
    assert written["fits"] is False


def shown(costs: Costs) -> str:
    console = Console(width=300, color_system=None)
    with console.capture() as capture:
        console.print(render(costs))
    return capture.get()


def test_tables_show_the_numbers():
    costs = plan(num_subnets=8, executor="stacked", workers=4, clusters=20, clusters_per_batch=2)
    text = shown(costs)
    for count in (N, E, F, C, *costs.data.values(), costs.num_parameters):
        assert f"{count:,}" in text
    assert f"{costs.parameters_per_subnet:,} of them in a subnet (m = 8)" in text
    assert "stacked execution, 2 side by side" in text
    assert f"{costs.evaluation} evaluation" in text
    rows = {line.split("  ")[0]: line for line in text.splitlines()}
    for phase, items in costs.memory.items():
        assert phase.replace("_", " ") in text
        for item, size in items.items():
            line = next(row for name, row in rows.items() if row.startswith(item.replace("_", " ")))
            assert decimal(size) in line, (phase, item)
    assert f"{decimal(costs.peak_memory_bytes)} at the peak" in text
    assert f"fits into {decimal(HUGE)}" in text
    assert decimal(costs.full_model_bytes) in text
    assert f"{costs.flops['full_run'] / costs.flops['run']:.1f}" in text
    for exchange in costs.exchange.values():
        assert decimal(exchange.total) in text
        assert decimal(exchange.busiest) in text
        assert exchange.formula in text
    assert f"model {decimal(costs.disk['model'])}" in text
    assert all(note in text for note in costs.notes)
    assert "to change" not in text


def test_tables_say_what_does_not_fit_and_what_to_change():
    costs = plan(num_subnets=[(0.5, 8), (0.5, 1)], memory_limit="200MB")
    text = shown(costs)
    assert "8 for 0.5, 1 for 0.5" in text
    assert "does not fit into 200.0 MB" in text
    assert f"to change: {'; '.join(costs.remedies)}" in text
    assert "serial execution;" in text


# What a plan itself takes.


@pytest.mark.parametrize("settings", [{}, {"store": "disk", "out": "nowhere"}], ids=["", "disk"])
def test_a_plan_of_a_model_of_34_gb_takes_seconds_and_next_to_no_memory(settings, tmp_path):
    cpu = torch.device("cpu")
    shape = GraphShape(
        num_nodes=2_449_029, num_edges=123_718_280, num_features=F, num_classes=C
    )  # as ogbn-products, whose features and edges take a gigabyte
    plan(num_subnets=2)  # imports what is imported late
    memory, before, start = PeakMemory(cpu), memory_in_use(cpu), time.process_time()
    costs = plan(
        shape, outline(65_536, 3), num_subnets=8, clusters=15_000, clusters_per_batch=10, **settings
    )
    assert time.process_time() - start < 20
    assert memory.bytes() - before < 200e6
    assert costs.disk["model"] > 34e9
    assert costs.memory["training"].get("model", 0) == (0 if settings else 4 * entries(65_536, 3))
    assert costs.peak_memory_bytes > 1e9
    assert 30 < costs.flops_ratio < 64


# What is refused.


class Picky(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = GCNConv(F, 16), GCNConv(16, C)

    def forward(self, x: torch.Tensor, edge_index: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.conv1(x, edge_index))
        return self.conv2(hidden, edge_index) * (1.0 if bool((x > 0).any()) else 0.5)


def test_a_model_that_looks_at_its_data_is_refused_by_name():
    with pytest.raises(ConfigError, match="what Picky takes cannot be told without data"):
        plan(model=Picky(), num_subnets=2, wiring=["conv1", "conv2"])


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"num_subnets": D + 1}, PartitionError, f"{D + 1}, group"),
        ({"workers": 0}, ConfigError, "workers must be at least 1"),
        ({"num_subnet": 4}, ConfigError, "num_subnets"),
        ({"clusters_per_batch": 4}, ConfigError, "clusters_per_batch needs clusters"),
        ({"store": "disk"}, ConfigError, "needs a directory"),
        ({"config": TrainConfig()}, ConfigError, "give either config or settings"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        plan(**settings)


def test_settings_may_come_as_a_config():
    config = TrainConfig(num_subnets=4, executor="serial", memory_limit=HUGE, **ROUNDS)
    given = estimate_costs(outline(), SHAPE, config=config, clusters=20)
    assert without_process(given) == without_process(plan(num_subnets=4, clusters=20))
