"""Every method keeps what subnet training promises: one table of settings, one set of tests."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gist import estimate_costs
from gist.costs.exchange import Traffic
from gist.partition.spec import model_tensors
from gist.partition.transfer import extract, merge
from gist.runs import read_history
from tests.methods import runs
from tests.methods.runs import CASES, DATA, digest, make
from tests.workers.spawn import run_workers

each = pytest.mark.parametrize("name", CASES)
WORKERS = [1, 2, 4]


def same(one, other) -> list[str]:
    """Names of tensors that differ in any bit."""
    theirs = model_tensors(other)
    return [n for n, t in model_tensors(one).items() if not torch.equal(t, theirs[n])]


@each
def test_it_trains(name, tmp_path):
    trainer = make(name, rounds=CASES[name].rounds, out=tmp_path / "run", keep_best=False)
    before = digest(trainer.model)
    result = trainer.fit()
    losses = [record.train_loss for record in result.history]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert digest(trainer.model) != before
    assert result.history[-1].bytes_sent == 0
    assert trainer.evaluate("test")[trainer.metric] == result.last_test_metric
    logged = read_history(tmp_path / "run" / "history.jsonl")
    assert [record.train_loss for record in logged] == losses


@each
def test_it_resumes_bit_for_bit(name, tmp_path):
    whole = make(name)
    whole.fit()
    stopped = make(
        name,
        out=tmp_path / "run",
        checkpoint_every=1,
        callbacks=lambda trainer, record: record.round == 1,
    )
    assert len(stopped.fit().history) == 2
    resumed = make(name, out=tmp_path / "run")
    result = resumed.fit(resume=tmp_path / "run")
    assert same(whole.model, resumed.model) == []
    got = [record.val_loss for record in result.history]
    assert got == [record.val_loss for record in whole.history]


@each
def test_it_merges_by_the_rule(name):
    """A round is: cut every subnet out, train it, put it back; means where several hold."""
    trainer = make(name, keep_best=False, recalibrate_bn=False)
    tensors = {n: t.detach().clone() for n, t in model_tensors(trainer.model).items()}
    parts = []
    program_parts = trainer.executor._train

    def train(program, plan, subnets):
        out = program_parts(program, plan, subnets)
        parts.extend({n: t.clone() for n, t in part.items()} for part in program.parts())
        return out

    trainer.executor._train = train
    trainer._run_round(trainer.rounds[0])
    deal = trainer.assign(trainer.rounds[0])
    assert len(parts) == deal.num_subnets
    for i, part in enumerate(parts):
        cut = extract(tensors, trainer.spec, deal, i)
        assert part.keys() == cut.keys()
        assert {n: t.shape for n, t in part.items()} == {n: t.shape for n, t in cut.items()}
    merge(tensors, trainer.spec, deal, parts)
    merged = model_tensors(trainer.model)
    assert [n for n, t in tensors.items() if not torch.equal(t, merged[n])] == []


@each
def test_it_plans(name):
    trainer, case = make(name), CASES[name]
    more = {}
    if case.data != "graph":
        more["wiring"], _, samples = type(trainer).choose(case.settings)
        more |= vars(samples)
    costs = estimate_costs(case.model(), DATA[case.data], workers=2, config=trainer.config, **more)
    whole = sum(p.numel() for p in trainer.model.parameters())
    assert costs.num_parameters == whole
    assert 0 < costs.parameters_per_subnet <= whole
    assert costs.flops["run"] > 0
    traffic = Traffic(
        trainer.spec,
        {n: t.element_size() for n, t in model_tensors(trainer.model).items()},
        workers=2,
        **carried(trainer),
    )
    promised = [traffic.round(trainer.assign(plan)) for plan in trainer.rounds[:2]][-1]
    assert costs.exchange["gist"].total == sum(sent for sent, _ in promised)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.stacks])
def test_stacked_is_serial(name):
    case = CASES[name]
    data = DATA[case.data]
    scale = 255 if data.x.dtype == torch.uint8 else 1
    data = replace(data, x=data.x.double() / scale, **({"transform": None} if scale > 1 else {}))

    def trained(executor):
        torch.manual_seed(0)
        model = case.model().double()
        for module in model.modules():
            if hasattr(module, "p"):
                module.p = 0.0
        settings = {**case.settings, "rounds": 3, "local_steps": 3, "lr": 0.02}
        trainer = case.trainer(
            model, data, executor=executor, shared_batches=True, progress=False, **settings
        )
        trainer.fit()
        return trainer

    serial, stacked = trained("serial"), trained("stacked")
    assert stacked.executor.name == "stacked"
    theirs = model_tensors(stacked.model)
    for tensor_name, tensor in model_tensors(serial.model).items():
        scale = tensor.detach().abs().max().clamp(min=1e-3)
        difference = (tensor - theirs[tensor_name]).detach().abs().max() / scale
        assert float(difference) < 1e-6, tensor_name


def carried(trainer) -> dict:
    """Arguments of Traffic for optimiser state that is carried."""
    if trainer.config.optimizer_state != "carry":
        return {}
    moments = 1 if trainer.config.optimizer == "sgd" else 2
    sizes = {n: moments * p.element_size() + 1 for n, p in trainer.model.named_parameters()}
    return {"state_bytes": sizes, "counts_steps": moments == 2}


@pytest.fixture(scope="module")
def alone():
    return json.loads(json.dumps({name: runs.outcome(name) for name in CASES}))


@pytest.mark.xdist_group("workers")
@pytest.mark.parametrize("workers", WORKERS)
def test_any_number_of_workers_gives_the_same_bits(alone, workers, tmp_path):
    path = tmp_path / "out.json"
    run_workers(str(Path(runs.__file__)), str(path), workers=workers)
    got = json.loads(path.read_text())
    for key in ("weights", "rounds", "best"):
        assert [name for name in CASES if got[name][key] != alone[name][key]] == []
    assert len({found["weights"] for found in got.values()}) == len(CASES)
    for name in CASES:
        trainer = make(name)
        traffic = Traffic(
            trainer.spec,
            {n: t.element_size() for n, t in model_tensors(trainer.model).items()},
            workers=workers,
            **carried(trainer),
        )
        for plan in trainer.rounds:
            expected = traffic.round(trainer.assign(plan))
            found = [tuple(got[name]["bytes"][rank][plan.index]) for rank in range(workers)]
            assert found == expected, (name, plan.index)


@each
def test_a_round_changes_what_was_trained(name):
    """The table would say nothing if a method stood still."""
    trainer = make(name, rounds=2, keep_best=False)
    for plan in trainer.rounds:
        before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        trainer._run_round(plan)
        held = [extract(before, trainer.spec, trainer.assign(plan), i) for i in range(2)]
        assert all(held)
        same = [n for n, p in trainer.model.named_parameters() if torch.equal(p, before[n])]
        assert same == []
