"""The executor that picks: what it measures, what it says, what it remembers, and no trace else."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import gist.nn
from gist import CheckpointError, GISTTrainer, load_dataset
from gist.checkpoint import load_checkpoint
from gist.config import TrainConfig
from gist.execution.auto import AutoExecutor
from gist.execution.rounds import RoundExecutor
from gist.execution.serial import SerialExecutor
from gist.execution.stacked import StackedExecutor
from gist.graph.objective import GraphObjective
from gist.partition.spec import model_tensors
from gist.partition.wiring import partition_spec
from gist.plan import plan_rounds

DATA = load_dataset(
    "csbm", num_nodes=60, num_features=6, num_classes=3, homophily=0.8, average_degree=6
)
OBJECTIVE = GraphObjective(DATA, torch.device("cpu"))
FASTER = {"serial": {"serial": 0.002, "stacked": 0.1}, "stacked": {"serial": 0.1, "stacked": 0.002}}
REAL = RoundExecutor.trial_seconds


def gcn(**kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return gist.nn.GCN(6, 12, 3, 3, **{"dropout": 0.4, "norm": "batch", **kwargs})


def auto(
    model: nn.Module, *, by_rule: bool = False, **settings: Any
) -> tuple[AutoExecutor, TrainConfig, list[str]]:
    """The executor as a trainer makes it, its settings, and the list of what it will say."""
    given = {"num_subnets": 3, "local_steps": 2, "rounds": 3, "seed": 4} | settings
    config, spec = TrainConfig(**given), partition_spec(model)
    serial = SerialExecutor(model, spec, OBJECTIVE, config)
    stacked = StackedExecutor(model, spec, OBJECTIVE, config)
    stacked.carried = serial.carried
    said: list[str] = []
    return AutoExecutor([serial, stacked], by_rule=by_rule, say=said.append), config, said


def train(executor: Any, config: TrainConfig, spec: Any, rounds: slice = slice(None)) -> None:
    for plan in plan_rounds(config, 1)[rounds]:
        deal = config.sampler(spec.sizes, plan.num_subnets, seed=config.seed, round=plan.index)
        executor.run_round(plan, deal)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[str, int]]]:
    """Makes trials say that one executor is faster; gives the list of trials that are made."""

    def rig(fast: str | dict[int, str], *, real: bool = False) -> list[tuple[str, int]]:
        calls: list[tuple[str, int]] = []

        def trial_seconds(self: RoundExecutor, plan: Any, assignment: Any) -> float:
            if real:
                assert REAL(self, plan, assignment) > 0
            calls.append((self.name, plan.num_subnets))
            winner = fast if isinstance(fast, str) else fast[plan.num_subnets]
            return FASTER[winner][self.name]

        monkeypatch.setattr(RoundExecutor, "trial_seconds", trial_seconds)
        return calls

    return rig


@pytest.mark.parametrize("fast", ["serial", "stacked"])
def test_the_faster_one_is_picked_and_what_was_measured_is_said(fast, measured):
    calls = measured(fast)
    model = gcn()
    executor, config, said = auto(model)
    assert executor.name == "auto"
    train(executor, config, partition_spec(model))
    assert calls == [("serial", 3), ("stacked", 3)]
    assert executor.name == fast
    times = "serial 2 ms, stacked 100 ms" if fast == "serial" else "serial 100 ms, stacked 2 ms"
    assert said == [f"m = 3: {fast} execution (a step of every subnet: {times})"]
    assert executor.choices == {
        "3": {"executor": fast, "seconds_per_step": FASTER[fast]},
    }
    assert json.loads(json.dumps(executor.choices)) == executor.choices


def test_each_number_of_subnets_is_measured_once_and_one_subnet_never(measured):
    calls = measured({6: "stacked", 3: "serial"})
    model = gcn()
    phases = [(0.25, 6), (0.25, 3), (0.25, 1), (0.25, 6)]
    executor, config, said = auto(model, num_subnets=phases, rounds=8)
    train(executor, config, partition_spec(model))
    assert calls == [("serial", 6), ("stacked", 6), ("serial", 3), ("stacked", 3)]
    assert [text.split(" execution")[0] for text in said] == ["m = 6: stacked", "m = 3: serial"]
    assert {m: c["executor"] for m, c in executor.choices.items()} == {
        "6": "stacked", "3": "serial", "1": "serial",
    }  # fmt: skip
    assert executor.name == "stacked", "that of the most subnets"


def test_by_rule_nothing_is_measured(measured):
    calls = measured("serial")
    model = gcn()
    executor, config, said = auto(model, by_rule=True)
    train(executor, config, partition_spec(model))
    assert calls == []
    assert executor.choices == {"3": {"executor": "stacked", "seconds_per_step": {}}}
    assert said == ["m = 3: stacked execution (by rule: deterministic=True)"]


def adagrad(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adagrad(parameters, lr=0.02, initial_accumulator_value=0.1)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optimizer_state": "carry"},
        {"optimizer": "sgd", "optimizer_state": "carry", "num_subnets": 5},
        {"optimizer": adagrad},
        {"optimizer": adagrad, "optimizer_state": "carry"},
        {"num_subnets": [(0.34, 4), (0.33, 2), (0.33, 1)]},
    ],
    ids=lambda value: re.sub(r" at 0x[0-9a-f]+", "", str(value)),
)
@pytest.mark.parametrize("fast", ["serial", "stacked"])
def test_measuring_leaves_no_trace(fast, settings, measured):
    """Statistics, moments, dropout and the caller's random state: as if nothing had been tried."""
    calls = measured(fast, real=True)
    model = gcn()
    alone = copy.deepcopy(model)
    executor, config, _ = auto(model, **settings)
    state = torch.get_rng_state()
    train(executor, config, executor._reference.spec)
    assert torch.equal(torch.get_rng_state(), state)
    assert calls

    kind = {"serial": SerialExecutor, "stacked": StackedExecutor}[fast]
    spec = partition_spec(alone)
    reference = kind(alone, spec, OBJECTIVE, config)
    train(reference, config, spec)
    for name, tensor in model_tensors(alone).items():
        assert torch.equal(tensor, model_tensors(model)[name]), name
    ours, theirs = executor.state_dict(), reference.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_trial_is_made_of_real_steps_and_changes_no_tensor_of_the_model():
    model = gcn()
    executor, config, _ = auto(model)
    before = {name: tensor.clone() for name, tensor in model_tensors(model).items()}
    (plan, *_), spec = plan_rounds(config, 1), partition_spec(model)
    deal = config.sampler(spec.sizes, 3, seed=config.seed, round=0)
    for candidate in executor._candidates.values():
        steps = []
        loss = candidate.objective.loss
        candidate.objective = copy.copy(candidate.objective)
        candidate.objective.loss = lambda *args, loss=loss, steps=steps: (
            steps.append(1), loss(*args),
        )[1]  # fmt: skip
        assert 0 < candidate.trial_seconds(plan, deal) < float("inf")
        assert steps
    assert all(torch.equal(tensor, before[name]) for name, tensor in model_tensors(model).items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["serial", "stacked"])
def test_what_the_first_step_prepares_is_no_part_of_a_step(name, monkeypatch):
    """As compiling, or the first product with the features: however long it takes."""
    clock = iter([0.0, 60.0, 100.0, 107.0, 200.0, 203.0])
    executor, config, _ = auto(gcn(), num_subnets=2)
    candidate = executor._candidates[name]
    (plan, *_) = plan_rounds(config, 1)
    deal = config.sampler(candidate.spec.sizes, 2, seed=config.seed, round=0)
    monkeypatch.setattr("gist.execution.rounds.time.perf_counter", lambda: next(clock))
    seconds = candidate.trial_seconds(plan, deal)
    assert seconds == (14.0 if name == "serial" else 7.0), "of both subnets"


@pytest.mark.parametrize("name", ["serial", "stacked"])
def test_a_batch_is_made_once_and_before_the_clock_runs(name, monkeypatch):
    """A round makes batches beside the training, so they are no part of what a step takes."""
    now, made = [0.0], []

    class Slow(GraphObjective):
        def batches(self, **given: Any) -> Any:
            for batch in super().batches(**given):
                now[0] += 50.0
                made.append(given)
                yield batch

        def loss(self, *args: Any) -> Any:
            now[0] += 3.0
            return super().loss(*args)

    monkeypatch.setattr("gist.execution.rounds.time.perf_counter", lambda: now[0])
    executor, config, _ = auto(gcn(), num_subnets=2)
    candidate = executor._candidates[name]
    candidate.objective = Slow(DATA, torch.device("cpu"))
    (plan, *_) = plan_rounds(config, 1)
    deal = config.sampler(candidate.spec.sizes, 2, seed=config.seed, round=0)
    seconds = candidate.trial_seconds(plan, deal)
    assert seconds == (6.0 if name == "serial" else 3.0), "of both subnets"
    assert len(made) == 1


@pytest.mark.parametrize("fast", ["serial", "stacked"])
def test_what_was_not_picked_keeps_no_memory(fast, measured):
    measured(fast, real=True)
    model = gcn()
    executor, config, _ = auto(model)
    train(executor, config, partition_spec(model))
    kept = {name for name, candidate in executor._candidates.items() if candidate._programs}
    assert kept == {fast}


def test_an_executor_that_cannot_run_here_is_refused():
    executor, *_ = auto(gcn())
    with pytest.raises(CheckpointError, match=r"cannot run here.*distributed.*serial or stacked"):
        executor.restore_choices({"3": {"executor": "distributed"}})


def trainer(model: nn.Module | None = None, **settings: Any) -> GISTTrainer:
    given = {"num_subnets": 3, "local_steps": 2, "rounds": 4, "optimizer_state": "carry"}
    return GISTTrainer(model or gcn(), DATA, executor="auto", **{**given, **settings})


@pytest.mark.parametrize("progress", [None, False])
def test_a_trainer_says_it_once_and_only_where_it_may(progress, measured, capsys):
    measured("stacked")
    trainer(progress=progress).fit()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("gist:")]
    said = "gist: m = 3: stacked execution (a step of every subnet: serial 100 ms, stacked 2 ms)"
    assert lines == ([] if progress is False else [said])


def test_what_was_picked_is_written_down(measured, tmp_path):
    measured("serial")
    run = trainer(out=tmp_path, checkpoint_every=2)
    assert run.executor_choices == {}
    run.fit()
    choices = {"3": {"executor": "serial", "seconds_per_step": FASTER["serial"]}}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["executor"] == "serial"
    assert config["executor_choices"] == choices
    assert config["settings"]["executor"] == "auto"
    assert load_checkpoint(tmp_path).state["executor_choices"] == choices


@pytest.mark.parametrize("fast", ["serial", "stacked"])
def test_a_resumed_run_takes_up_the_choice_and_goes_on_bit_for_bit(fast, measured, tmp_path):
    measured(fast, real=True)
    whole = trainer()
    whole.fit()
    stop = trainer(
        out=tmp_path, checkpoint_every=1, callbacks=(lambda trainer, record: record.round == 1,)
    )
    stop.fit()

    other = {"serial": "stacked", "stacked": "serial"}[fast]
    calls = measured(other)
    again = trainer(out=tmp_path, checkpoint_every=1)
    again.fit(resume=tmp_path)
    assert calls == [], "nothing is measured again, and so nothing else is picked"
    assert again.executor_choices["3"]["executor"] == fast
    losses = [record.train_loss for record in whole.history]
    assert [record.train_loss for record in again.history] == losses
    for name, tensor in model_tensors(whole.model).items():
        assert torch.equal(tensor, model_tensors(again.model)[name]), name


def test_a_run_that_is_resumed_before_a_phase_measures_that_phase(measured, tmp_path):
    measured("serial")
    phases = [(0.5, 3), (0.5, 2)]
    trainer(
        num_subnets=phases, out=tmp_path, checkpoint_every=2,
        callbacks=(lambda trainer, record: record.round == 1,),
    ).fit()  # fmt: skip
    calls = measured("stacked")
    again = trainer(num_subnets=phases, out=tmp_path, checkpoint_every=2)
    again.fit(resume=tmp_path)
    assert calls == [("serial", 2), ("stacked", 2)]
    assert {m: c["executor"] for m, c in again.executor_choices.items()} == {
        "3": "serial", "2": "stacked",
    }  # fmt: skip


def test_deterministic_runs_depend_on_their_settings_alone(measured):
    calls = measured("serial")
    runs = [trainer(deterministic=True) for _ in range(2)]
    for run in runs:
        run.fit()
    assert calls == []
    assert all(run.executor.name == "stacked" for run in runs)
    one, other = (model_tensors(run.model) for run in runs)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
