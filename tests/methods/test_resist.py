"""ResIST: which blocks are dealt, how deep subnets are, and what is evaluated."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gist import ResISTTrainer, Whole
from gist.errors import ConfigError, PartitionError
from gist.nn import PreActResNet
from gist.partition.samplers import Overlapping
from tests.methods.runs import DATA, make


def trainer(**settings):
    torch.manual_seed(0)
    model = PreActResNet((2, 4, 2), (4, 4, 8), block="basic", in_channels=1, num_classes=3)
    given = {"rounds": 2, "local_steps": 2, "batch_size": 16, "progress": False, **settings}
    return ResISTTrainer(model, DATA["pictures"], **given)


def test_blocks_of_the_longest_stage_are_dealt_but_its_first():
    assert trainer(num_subnets=3).spec.sizes == {"stages.1": 3}
    both = trainer(num_subnets=1, stages=("stages.0", "stages.1"))
    assert both.spec.sizes == {"stages.0": 1, "stages.1": 3}


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        ({"num_subnets": 3}, 1 / 3),
        ({"num_subnets": 3, "min_blocks": 2}, 2 / 3),
        ({"num_subnets": 6}, 1 / 3),  # every subnet holds one at least
        ({"num_subnets": 3, "warmup_rounds": 1}, 1 / 3),
        ({"num_subnets": 3, "sampler": Whole()}, 1.0),
        ({"num_subnets": 1}, 1.0),
    ],
)
def test_branches_are_scaled_by_the_share_of_subnets_that_hold_them(settings, share):
    run = trainer(**settings)
    assert run.block_shares() == {"stages.1": pytest.approx(share)}


def test_the_share_is_that_of_the_round_the_model_is_from():
    run = trainer(num_subnets=3, warmup_rounds=1, rounds=3, keep_best=False)
    seen = []
    for plan in run.rounds:
        run._run_round(plan)
        seen.append(run.block_shares()["stages.1"])
    assert seen == [1.0, pytest.approx(1 / 3), pytest.approx(1 / 3)]


def test_what_is_evaluated_can_be_deployed():
    run = trainer(num_subnets=3)
    run.fit()
    data = DATA["pictures"]
    x = data.x[data.test]
    scores = run.predict(x)
    assert torch.equal(run.predict(), scores)
    inputs = data.prepared(x, training=False, generator=torch.Generator())
    folded = run.folded_model()
    assert not folded.training
    torch.testing.assert_close(folded(inputs), scores, rtol=1e-5, atol=1e-6)
    raw = run.model.eval()(inputs)
    assert not torch.allclose(raw, scores, rtol=1e-3)
    accuracy = float((scores.argmax(1) == data.y[data.test]).double().mean())
    assert run.evaluate("test") == {"accuracy": pytest.approx(accuracy)}


def test_a_model_that_is_loaded_is_evaluated_as_it_was(tmp_path):
    run = trainer(num_subnets=3, warmup_rounds=1, rounds=2, out=tmp_path / "run")
    run.callbacks = ()
    for plan in run.rounds[:1]:
        run._run_round(plan)
    run.save(tmp_path / "run")
    x = DATA["pictures"].x[:9]
    other = trainer(num_subnets=3)
    other.load(tmp_path / "run")
    assert other.block_shares() == run.block_shares() == {"stages.1": 1.0}
    assert torch.equal(other.predict(x), run.predict(x))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"stages": ("stages.0",)}, r"'stages.0'.*got: 1 that could.*choose stages=\['stages.1'\]"),
        ({"min_blocks": 3}, "'stages.1'.*got: 3 that could be, min_blocks=3.*: lower min_blocks"),
    ],
)
def test_blocks_that_every_subnet_would_hold_cannot_be_dealt(settings, match):
    with pytest.raises(
        PartitionError, match=f"every subnet would hold all blocks of stage {match}"
    ):
        trainer(num_subnets=2, **settings)
    trainer(num_subnets=1, **settings)


def test_other_stages_are_not_named_where_there_are_none():
    model = PreActResNet((2, 2), (4, 4), block="basic", in_channels=1, num_classes=3)
    with pytest.raises(PartitionError, match=r"remedy: use a deeper model, or LoFT$"):
        ResISTTrainer(model, DATA["pictures"], num_subnets=2)


def test_some_round_must_deal_blocks():
    with pytest.raises(ConfigError, match=r"got: warmup_rounds=2, 2 rounds; expected: .*most 1"):
        trainer(num_subnets=3, warmup_rounds=2)
    phases = [(0.5, 3), (0.5, 1)]
    with pytest.raises(ConfigError, match=r"got: warmup_rounds=2, 4 rounds; expected: .*most 1"):
        trainer(num_subnets=phases, warmup_rounds=2, rounds=4)
    trainer(num_subnets=1, warmup_rounds=2)
    trainer(num_subnets=3, warmup_rounds=2, fast_dev_run=True)


def test_depth_correction_can_be_switched_off():
    run = trainer(num_subnets=3, depth_correction=False)
    assert run.block_shares() == {}
    data = DATA["pictures"]
    x = data.x[data.test]
    inputs = data.prepared(x, training=False, generator=torch.Generator())
    assert torch.equal(run.predict(x), run.model.eval()(inputs))


def test_min_blocks_are_held_and_warm_up_rounds_are_whole():
    run = trainer(num_subnets=3, min_blocks=2, warmup_rounds=1, rounds=3)
    assert run.config.sampler == Overlapping(min_units=2, warmup_rounds=1)
    widths = [[run.assign(plan).widths(i)["stages.1"] for i in range(3)] for plan in run.rounds]
    assert widths == [[3, 3, 3], [2, 2, 2], [2, 2, 2]]


def test_only_one_program_is_kept():
    """Which blocks are absent differs: programs of earlier rounds would only take memory."""
    run = make("resist")
    run.fit()
    assert len(run.executor._programs) == 1


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"stages": "stages.1"}, "sequence of names"),
        ({"min_blocks": 0}, "min_blocks must be"),
        ({"warmup_rounds": -1}, "warmup_rounds"),
        ({"sampler": Whole(), "min_blocks": 2}, "make the sampler of ResIST"),
        ({"blocks": 2}, "unknown setting 'blocks'"),
        ({"shards": True, "num_subnets": [(0.5, 2), (0.5, 1)]}, "has a shard"),
        ({"shards": True, "executor": "stacked"}, "has a shard"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(settings, match):
    with pytest.raises(ConfigError, match=match):
        trainer(**settings)


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(36, 3)), "no residual blocks"),
        (PreActResNet((1, 1), (4, 8), block="basic", in_channels=1), "no residual blocks"),
    ],
)
def test_models_without_such_blocks_are_refused(model, match):
    with pytest.raises(PartitionError, match=match):
        ResISTTrainer(model, DATA["pictures"], num_subnets=2)
