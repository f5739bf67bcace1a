"""Plans of runs on samples: sizes and operations by hand, and bytes against real rounds."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import scipy.sparse as sp
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from gist import (
    ConfigError,
    Costs,
    LoaderData,
    Overlapping,
    SampleData,
    TrainConfig,
    Whole,
    estimate_costs,
    partition_spec,
)
from gist.config import SampleConfig
from gist.costs import rehearsal, tally
from gist.costs.costs import render
from gist.costs.rehearsal import Rounds, rehearse_rounds
from gist.costs.stage import Stage
from gist.csr import is_csr, parts
from gist.graph.live_bytes import LiveBytes
from gist.methods import SampleTrainer
from gist.nn import MLP, PreActResNet
from gist.partition.grouped.grouping import never_grouped
from gist.partition.residual_wiring import wire_blocks, wire_filters
from gist.partition.wiring import Wiring
from gist.plan import plan_rounds
from gist.samples.objective import SampleObjective
from gist.samples.outline import OutlineSamples, SampleShape

CPU = torch.device("cpu")
HUGE = 10**15
N, C = 300, 7
VECTORS = SampleShape(num_samples=N, sample_shape=(20,), num_classes=C, train_samples=200)
IMAGES = SampleShape(
    num_samples=N, sample_shape=(3, 8, 8), num_classes=C, train_samples=200, stored_bytes=3 * 64
)
BAGS = SampleShape(
    num_samples=N,
    sample_shape=(50,),
    num_classes=C,
    train_samples=200,
    task="multilabel",
    metric="precision@1",
    bag_entries=5,
    label_entries=2,
)


def resnet() -> PreActResNet:
    """With three blocks that may be absent."""
    return PreActResNet((4,), (8,), block="basic", num_classes=C)


def plan(model: Callable[[], nn.Module], data: Any, **settings: Any) -> Costs:
    with torch.device("meta"):
        outline = model()
    defaults = {"executor": "serial", "memory_limit": HUGE, "rounds": 2, "local_steps": 3}
    return estimate_costs(outline, data, **{**defaults, "batch_size": 32, **settings})


def arrays(shape: SampleShape) -> tuple[Any, Any]:
    """Samples and labels of a shape."""
    generator = torch.Generator().manual_seed(0)
    if shape.is_sparse:
        width = shape.sample_shape[0]
        x = torch.stack([torch.randperm(width, generator=generator) < 5 for _ in range(N)])
        y = torch.stack([torch.randperm(C, generator=generator) < 2 for _ in range(N)])
        return sp.csr_matrix(x.float().numpy()), sp.csr_matrix(y.float().numpy())
    x = torch.rand(N, *shape.sample_shape, generator=generator)
    if shape.stored_bytes is not None:
        x = (255 * x).to(torch.uint8)
    return x, torch.randint(C, (N,), generator=generator)


def data_of(shape: SampleShape) -> SampleData:
    numbers = torch.arange(N)
    split = {"train": numbers[:200], "val": numbers[200:240], "test": numbers[240:]}
    return SampleData.of(arrays(shape), **split, num_classes=C, metric=shape.metric)


# Sizes.


@pytest.mark.parametrize("shape", [VECTORS, IMAGES, BAGS], ids=["vectors", "images", "bags"])
def test_sizes_alone_are_those_of_the_samples_themselves(shape):
    found = SampleShape.of(data_of(shape))
    assert found.num_bytes == shape.num_bytes
    for name in ("num_samples", "sample_shape", "num_classes", "train_samples", "task", "dtype"):
        assert getattr(found, name) == getattr(shape, name), name
    assert (found.bag_entries, found.label_entries) == (shape.bag_entries, shape.label_entries)


def test_items_of_known_size_have_it():
    costs = plan(partial(MLP, 20, 16, C, norm=None), VECTORS, num_subnets=4)
    assert costs.data == {"samples": N, "batch_samples": 32, "outputs": C, "features": 20}
    whole, own = 16 * 20 + 16 + C * 16 + C, 4 * 20 + 4 + C * 4 + C
    assert (costs.num_parameters, costs.parameters_per_subnet) == (whole, own)
    memory = costs.memory["training"]
    assert memory["model"] == memory["best_model"] == 4 * whole
    assert memory["subnets"] == memory["gradients"] == 4 * own
    stored = N * (20 * 4 + 8 + 8)
    assert stored + 4 * 32 * 20 * 4 < memory["data"] < stored + 6 * 32 * 20 * 4 + 20 * 200
    assert costs.evaluation == "batched"


def test_an_image_of_bytes_takes_its_bytes():
    flat = partial(MLP, 192, 16, C)
    costs, floats = (plan(flat, shape) for shape in (IMAGES, replace(IMAGES, stored_bytes=None)))
    assert {"channels": 3, "height": 8, "width": 8}.items() <= costs.data.items()
    more = floats.memory["training"]["data"] - costs.memory["training"]["data"]
    assert more == N * 3 * 64 * 3


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_samples": 0},
        {"num_classes": True},
        {"sample_shape": (3, 0)},
        {"train_samples": 0},
        {"bag_entries": 0},
    ],
)
def test_sizes_that_cannot_be_are_refused(sizes):
    with pytest.raises(ConfigError, match="must be a whole number from 1 on"):
        SampleShape(**{"num_samples": 5, "sample_shape": (3,), "num_classes": 2, **sizes})


def test_settings_of_graphs_are_unknown_to_samples():
    with pytest.raises(ConfigError, match="clusters"):
        plan(partial(MLP, 20, 16, C), VECTORS, clusters=4)


# Operations.


def mlp_step(batch: int, widths: list[int]) -> int:
    """Operations of a step: each product forward, for its weight, and but for the first, input."""
    products = [2 * batch * a * b for a, b in pairwise(widths)]
    return 3 * sum(products) - products[0]


@pytest.mark.parametrize("m", [1, 2, 3])
@pytest.mark.parametrize("executor", ["serial", "stacked"])
def test_operations_of_an_mlp_are_those_of_its_products(m, executor):
    settings = {"num_subnets": m, "executor": executor, "shared_batches": True}
    costs = plan(partial(MLP, 20, [24, 12], C), VECTORS, **settings)
    each = [mlp_step(32, [20, 24 // m, 12 // m, C]) for _ in range(m)]
    assert costs.flops["round"] == 3 * sum(each)
    assert costs.flops["full_round"] == 3 * m * mlp_step(32, [20, 24, 12, C])
    scored = 2 * N * (20 * 24 + 24 * 12 + 12 * C)
    assert costs.flops["evaluation"] == scored


def test_bags_cost_what_they_have_entries():
    costs = plan(partial(MLP, 50, 16, C, input="bag"), BAGS, num_subnets=1)
    products = 2 * (2 * 32 * 5 * 16) + 3 * (2 * 32 * 16 * C)
    assert costs.flops["round"] == 3 * (products + 2 * 32 * 2), "and the labels' scores, summed"


def conv(image: int, size: int, into: int, out: int) -> int:
    """Operations of one pass of a convolution over a batch of 32."""
    return 2 * 32 * image * image * size * size * into * out


def test_operations_of_a_resnet_are_those_of_its_convolutions():
    stem, each, head = conv(8, 3, 3, 8), conv(8, 3, 8, 8), 2 * 32 * 8 * C
    whole = 2 * stem + 3 * (4 * 2 * each + head)
    costs = plan(resnet, IMAGES, num_subnets=1, wiring=wire_blocks)
    assert costs.flops["round"] == 3 * whole
    shallow = plan(resnet, IMAGES, num_subnets=2, wiring=wire_blocks)  # two blocks and one
    assert shallow.flops["round"] == 3 * (2 * whole - 3 * 3 * 2 * each)


def test_sampled_outputs_are_all_that_a_step_computes():
    shape = SampleShape(num_samples=N, sample_shape=(20,), num_classes=1000, train_samples=200)
    some, every = (
        plan(partial(MLP, 20, 16, 1000), shape, num_subnets=1, sampled_outputs=k)
        for k in (64, None)
    )
    columns = 32 + 64  # whose gradients are added to those of their rows
    assert some.flops["round"] == 3 * (mlp_step(32, [20, 16, columns]) + 2 * columns * 16)
    assert every.flops["round"] == 3 * mlp_step(32, [20, 16, 1000])
    assert some.memory["training"]["activations"] < every.memory["training"]["activations"] / 2


# Against real rounds.

RUNS: dict[str, tuple[Callable[[], nn.Module], SampleShape, Wiring | None, dict[str, Any]]] = {
    "mlp": (partial(MLP, 20, 24, C), VECTORS, None, {}),
    "mlp, stacked": (partial(MLP, 20, 24, C), VECTORS, None, {"executor": "stacked"}),
    "bags": (partial(MLP, 50, 24, C, input="bag"), BAGS, None, {"sampled_outputs": 2}),
    "blocks": (resnet, IMAGES, wire_blocks, {"sampler": Overlapping()}),
    "filters": (resnet, IMAGES, wire_filters, {"optimizer": "sgd"}),
    "replicas": (resnet, IMAGES, wire_blocks, {"sampler": Whole()}),
}


class OneBatch:
    """The same batch in every step, so that none is made while bytes are counted."""

    def __init__(self, objective: SampleObjective) -> None:
        self.objective = objective
        self.batch = next(iter(objective.batches(seed=0, round=0, subnet=0, steps=1)))

    def batches(self, *, seed: int, round: int, subnet: int, steps: int) -> Any:
        return [self.batch] * steps

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return self.objective.loss(model, batch)


@pytest.fixture
def no_layouts(monkeypatch):
    """What convolutions lay out anew is seen by no counter of real tensors."""
    monkeypatch.setattr(tally, "_LAID_OUT_ANEW", {})


def rehearsed(
    model: nn.Module, objective: SampleObjective, config: TrainConfig, wiring: Wiring | None
) -> Rounds:
    stage, spec = Stage(CPU), partition_spec(model, wiring)
    most = max(m for _, m in config.phases)
    make = OutlineSamples.like(objective, most)
    with stage.computing():
        outlined = make()
    return rehearse_rounds(
        stage,
        stage.outline(model),
        spec,
        outlined,
        config,
        plan_rounds(config, outlined.steps_per_epoch)[:1],
        most=most if config.executor == "stacked" else None,
    )


@pytest.mark.usefixtures("no_layouts")
@pytest.mark.parametrize("name", RUNS)
def test_a_real_round_has_as_many_bytes_alive(name):
    build, shape, wiring, given = RUNS[name]
    settings = {"num_subnets": 3, "rounds": 3, "local_steps": 2, "executor": "serial", **given}
    trainer = SampleTrainer(build(), data_of(shape), wiring=wiring, batch_size=32, **settings)
    rounds = rehearsed(trainer.model, trainer.objective, trainer.config, wiring)
    runs, first = trainer.executor, trainer.rounds[0]
    objective = runs.objective
    runs.objective = OneBatch(objective)
    assignment = trainer.assign(first)
    with LiveBytes() as live:
        runs.run_round(first, assignment)
    batch, programs = runs.objective.batch, list(runs._programs.values())
    rows = [part for t in (batch.x, batch.y) if is_csr(t) for part in parts(t)]  # taken for new
    assert rounds.subnets >= sum(t.nbytes for p in programs for t in p.tensors.values())
    indices = 8 * 3 * sum(trainer.spec.sizes.values()) + sum(part.nbytes for part in rows)
    peak = max(rounds.training, rounds.arranging)
    assert 0.995 * live.peak - indices <= peak <= 1.03 * live.peak, (live.peak, rounds)


@pytest.mark.usefixtures("no_layouts")
def test_an_evaluation_has_as_many_bytes_alive():
    settings = {"num_subnets": 2, "rounds": 1, "local_steps": 1, "executor": "serial"}
    settings |= {"batch_size": 32, "eval_batch_size": 80}
    data = data_of(IMAGES)
    trainer = SampleTrainer(resnet(), data, wiring=wire_blocks, **settings)
    with LiveBytes() as live, trainer.depth_corrected(trainer.model):
        trainer.objective.evaluate(trainer.model)
    costs = plan(resnet, IMAGES, wiring=wire_blocks, **settings)
    assert 0.97 * live.peak <= costs.memory["evaluation"]["activations"] <= 1.03 * live.peak


@pytest.mark.parametrize(
    ("m", "given"),
    [
        (3, {"wiring": wire_filters}),
        (3, {"wiring": wire_blocks, "sampler": Overlapping()}),
        (3, {"wiring": wire_blocks, "sampler": Overlapping(min_units=2)}),
        (4, {"wiring": wire_blocks, "sampler": Whole()}),
    ],
    ids=["uneven", "one block each", "blocks that are shared", "replicas"],
)
def test_some_subnets_of_a_round_stand_for_all(monkeypatch, m, given):
    def rounds() -> Rounds:
        data = data_of(IMAGES)
        objective = SampleObjective(data, CPU, SampleConfig(), num_subnets=m, local_steps=2)
        settings = {key: value for key, value in given.items() if key != "wiring"}
        config = TrainConfig(num_subnets=m, rounds=1, optimizer="sgd", **settings)
        return rehearsed(resnet(), objective, config, given["wiring"])

    some = rounds()
    monkeypatch.setattr(
        rehearsal._Rehearsing, "_representatives", lambda self, assignment: self.chunks(assignment)
    )
    every = rounds()
    assert some.step_flops == every.step_flops
    for name in ("training", "arranging", "subnets", "optimizer", "gradients"):
        assert getattr(every, name) * 0.99 <= getattr(some, name), name
        assert getattr(some, name) <= getattr(every, name) * 1.25, name


def test_carried_state_is_rehearsed_for_all_subnets():
    """When a round ends, the states of all of them are there, and then those of the whole."""
    kept = plan(partial(MLP, 20, 512, C), VECTORS, num_subnets=8, optimizer_state="carry")
    moments = 8 * 512 * (20 + C)
    assert kept.memory["training"]["carried_state"] >= moments
    assert kept.memory["merging"]["copies"] >= moments


# Loaders, limits, words.


def test_a_loader_takes_what_its_tensors_do():
    x, y = arrays(VECTORS)
    loader = DataLoader(TensorDataset(x[:200], y[:200]), batch_size=32)
    config = SampleConfig(batch_size=32)
    found = [
        OutlineSamples.like(
            SampleObjective(data, CPU, config, num_subnets=2, local_steps=3), num_subnets=2
        )()
        for data in (
            LoaderData(train=loader, val=loader, test=loader, num_classes=C),
            data_of(VECTORS),
        )
    ]
    assert found[0].batch.x.shape == found[1].batch.x.shape == (32, 20)
    assert found[0].batch.y.shape == found[1].batch.y.shape == (32,)
    assert found[0].steps_per_epoch == found[1].steps_per_epoch == 6
    assert found[0].shape.num_bytes == 0, "who knows where its samples are"


def test_a_shard_may_have_fewer_samples_than_a_batch():
    assert (
        plan(partial(MLP, 20, 16, C), VECTORS, num_subnets=8, shards=True).data["batch_samples"]
        == 200 // 8
    )


@pytest.fixture
def no_rehearsal(monkeypatch):
    def rehearse(self: Stage, device: torch.device) -> None:
        raise AssertionError("it was rehearsed")

    monkeypatch.setattr(Stage, "__init__", rehearse)


@pytest.mark.usefixtures("no_rehearsal")
@pytest.mark.parametrize(
    ("build", "shape", "wiring"),
    [(partial(MLP, 20, 64, C), VECTORS, None), (partial(MLP, 192, 64, C), IMAGES, None)],
    ids=["vectors", "images that are flattened"],
)
def test_small_runs_start_without_a_rehearsal(build, shape, wiring):
    trainer = SampleTrainer(
        build(), data_of(shape), wiring=wiring, rounds=1, local_steps=1, memory_limit="10GB"
    )
    assert trainer.room.needed <= trainer.room.limit / 2
    assert trainer.room.most is None


ROUGHLY = {
    "mlp": (partial(MLP, 20, 256, C, 4), VECTORS, None),
    "blocks": (resnet, IMAGES, wire_blocks),
}


@pytest.mark.parametrize("name", ROUGHLY)
def test_a_run_that_is_let_pass_without_a_rehearsal_has_room(name):
    build, shape, wiring = ROUGHLY[name]
    settings = {"num_subnets": 2, "rounds": 1, "local_steps": 1, "memory_limit": "10TB"}
    settings |= {"optimizer_state": "carry", "executor": "serial"}
    trainer = SampleTrainer(build(), data_of(shape), wiring=wiring, **settings)
    costs = plan(build, shape, wiring=wiring, batch_size=128, **settings)
    assert costs.peak_memory_bytes <= trainer.room.needed


def test_a_run_that_does_not_fit_is_refused_with_remedies():
    settings = {"rounds": 1, "local_steps": 1, "num_subnets": 1, "batch_size": 200}
    data, model = data_of(VECTORS), MLP(20, 2**16, C)
    free = estimate_costs(model, data, **settings)
    short = free.peak_memory_bytes - free.memory[free.peak_phase]["activations"] // 2
    with pytest.raises(ConfigError, match="does not fit into memory") as raised:
        SampleTrainer(model, data, memory_limit=short, **settings)
    assert "a smaller batch_size" in raised.value.remedy
    assert "activations" in raised.value.got
    costs = estimate_costs(model, data, memory_limit=short, **settings)
    assert not costs.fits
    assert costs.remedies[0] == "a smaller batch_size"


@pytest.mark.parametrize("shape", [VECTORS, IMAGES, BAGS], ids=["vectors", "images", "bags"])
def test_tables_and_json_have_the_sizes(shape):
    model: Any = partial(MLP, 50 if shape.is_sparse else 20, 16, C)
    if shape.is_sparse:
        model = partial(MLP, 50, 16, C, input="bag")
    costs = plan(resnet if shape is IMAGES else model, shape, num_subnets=2, workers=2,
                 wiring=wire_blocks if shape is IMAGES else None)  # fmt: skip
    console = Console(width=300, color_system=None)
    with console.capture() as capture:
        console.print(render(costs))
    text = capture.get()
    of = {
        id(VECTORS): "20 features",
        id(IMAGES): "3 x 8 x 8",
        id(BAGS): "50 features, 5 of them in each",
    }
    assert f"{N} samples of {of[id(shape)]}, {C} outputs; a step sees 32 samples" in text
    assert "batched evaluation" in text
    assert "subnet training" in text
    written = json.loads(json.dumps(costs.to_json(), allow_nan=False))
    assert written["data"] == costs.data
    assert all(isinstance(size, int) for size in written["data"].values())


@pytest.mark.parametrize(
    ("model", "wiring", "apart"),
    [
        (MLP(8, 16, 3, 3), None, False),
        (PreActResNet((2, 2), (4, 8), block="basic", num_classes=10), wire_filters, True),
        (PreActResNet((2, 2), (4, 8), block="basic", num_classes=10), wire_blocks, True),
        (nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)), None, False),
    ],
    ids=["mlp", "filters", "blocks", "chain"],
)
def test_which_subnets_are_never_stacked(model, wiring, apart):
    assert never_grouped(model, partition_spec(model, wiring)) is apart
