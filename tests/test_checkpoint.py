import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gist import GISTTrainer, load_dataset
from gist.checkpoint import load_checkpoint, save_checkpoint
from gist.costs.room import Room
from gist.errors import CheckpointError, ConfigError
from gist.execution.tensorfile import write_tensors
from gist.nn import GCN, GraphSAGE
from gist.partition.spec import model_tensors

DATA = load_dataset("csbm", num_nodes=120, num_features=6, num_classes=3, seed=1)


class Stop:
    """Stops a run after some rounds, as an interruption would."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds

    def __call__(self, trainer: GISTTrainer, record: object) -> bool:
        return len(trainer.history) >= self.rounds


def trainer(out: Path | None = None, seed: int = 0, **settings: object) -> GISTTrainer:
    torch.manual_seed(3)
    norm = settings.pop("norm", "layer")
    model = GCN(DATA.num_features, 12, DATA.num_classes, 3, norm=norm)
    base = {"num_subnets": 3, "local_steps": 3, "epochs": 54, "seed": seed}
    return GISTTrainer(model, DATA, **{**base, "out": out and str(out), **settings})


@pytest.mark.parametrize("executor", ["serial", "stacked"])
@pytest.mark.parametrize("state", ["reset", "carry"])
@pytest.mark.parametrize("norm", ["layer", "batch", None])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, state, norm, executor):
    settings = {"optimizer_state": state, "norm": norm, "executor": executor}
    through = trainer(**settings)
    expected = through.fit()

    trainer(tmp_path, **settings, checkpoint_every=1, callbacks=[Stop(2)]).fit()
    resumed = trainer(tmp_path, **settings, checkpoint_every=1)
    for tensor in model_tensors(resumed.model).values():
        tensor.data.zero_()  # nothing of the fresh initialisation may survive
    got = resumed.fit(resume=tmp_path)

    assert len(got.history) == len(expected.history) == 6
    for ours, theirs in zip(got.history, expected.history, strict=True):
        assert ours.train_loss == theirs.train_loss
        assert ours.val_loss == theirs.val_loss
        assert ours.test_metric == theirs.test_metric
    assert got.best.round == expected.best.round
    other = model_tensors(through.model)
    for name, tensor in model_tensors(resumed.model).items():
        assert torch.equal(tensor, other[name]), name


def test_resume_with_a_schedule_of_subnets(tmp_path):
    settings = {"num_subnets": [(0.5, 3), (0.5, 1)], "executor": "stacked"}
    expected = trainer(**settings).fit()
    trainer(tmp_path, **settings, checkpoint_every=1, callbacks=[Stop(4)]).fit()
    got = trainer(tmp_path, **settings, checkpoint_every=1).fit(resume=tmp_path)
    assert [r.num_subnets for r in got.history] == [r.num_subnets for r in expected.history]
    assert [r.train_loss for r in got.history] == [r.train_loss for r in expected.history]


def test_a_run_that_was_finished_can_be_resumed_and_stays_the_same(tmp_path):
    expected = trainer(tmp_path, checkpoint_every=1).fit()
    got = trainer(tmp_path, checkpoint_every=1).fit(resume=tmp_path)
    assert got.test_metric == expected.test_metric
    assert got.history == expected.history


def test_two_newest_checkpoints_are_kept_and_nothing_else(tmp_path):
    trainer(tmp_path, checkpoint_every=1).fit()
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["round-000005", "round-000006"]


def save(folder: Path, round: int, value: float, **settings: int) -> Path:
    write = partial(write_tensors, tensors={"w": torch.full((3,), value)})
    state = {"value": value}
    return save_checkpoint(folder, round, files={"model": write}, state=state, **settings)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path):
    save(tmp_path, 1, 1.0)
    newest = save(tmp_path, 2, 2.0)
    for file in sorted(newest.iterdir()):
        whole = file.read_bytes()
        for cut in {0, 1, len(whole) // 2, len(whole) - 1}:
            file.write_bytes(whole[:cut])
            assert load_checkpoint(tmp_path).state == {"value": 1.0}, (file.name, cut)
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 4
        file.write_bytes(bytes(flipped))
        if file.name != "manifest.json":
            assert load_checkpoint(tmp_path).state == {"value": 1.0}, file.name
        file.write_bytes(whole)
    assert load_checkpoint(tmp_path).state == {"value": 2.0}


def test_an_unfinished_write_is_not_a_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1, 1.0)

    def fail(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("gist.checkpoint.write_atomically", fail)
    with pytest.raises(OSError, match="disk full"):
        save(tmp_path, 2, 2.0)
    assert [path.name for path in tmp_path.iterdir()] == ["round-000001"]


def test_no_checkpoint_at_all_is_said(tmp_path):
    with pytest.raises(CheckpointError, match=r"no usable checkpoint.*checkpoint_every"):
        load_checkpoint(tmp_path)


def test_damage_is_named_where_nothing_is_left(tmp_path):
    folder = save(tmp_path, 1, 1.0)
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        load_checkpoint(tmp_path)


def test_another_format_is_refused(tmp_path):
    folder = save(tmp_path, 1, 1.0)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(CheckpointError, match=r"another format; got: 99"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed=1"),
        ({"local_steps": 2}, "local_steps=2"),
        ({"num_subnets": 2}, "num_subnets=2"),
        ({"norm": None}, None),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, change, named):
    trainer(tmp_path, checkpoint_every=1, callbacks=[Stop(1)]).fit()
    if named is None:
        model = GraphSAGE(DATA.num_features, 12, DATA.num_classes, 3)
        other = GISTTrainer(model, DATA, num_subnets=3, local_steps=3, epochs=54)
        named = "model='GraphSAGE'"
    else:
        other = trainer(tmp_path, **change)
    with pytest.raises(CheckpointError, match=named):
        other.fit(resume=tmp_path)


def test_a_checkpoint_on_other_data_is_refused(tmp_path):
    trainer(tmp_path, checkpoint_every=1, callbacks=[Stop(1)]).fit()
    data = load_dataset("csbm", num_nodes=120, num_features=6, num_classes=3, seed=2)
    model = GCN(data.num_features, 12, data.num_classes, 3)
    other = GISTTrainer(model, data, num_subnets=3, local_steps=3, epochs=54)
    with pytest.raises(CheckpointError, match="data="):
        other.fit(resume=tmp_path)


def test_an_earlier_runs_checkpoints_are_not_overwritten(tmp_path):
    trainer(tmp_path, checkpoint_every=1, callbacks=[Stop(3)]).fit()
    before = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    with pytest.raises(ConfigError, match=r"checkpoints of an earlier run.*resume"):
        trainer(tmp_path, checkpoint_every=1, seed=1).fit()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == before


def test_going_back_to_an_older_checkpoint_keeps_what_is_written_then(tmp_path):
    save(tmp_path, 8, 8.0)
    save(tmp_path, 9, 9.0)
    written = save(tmp_path, 2, 2.0)
    assert load_checkpoint(written).state == {"value": 2.0}
    assert len(list(tmp_path.iterdir())) == 2


def test_a_run_that_stopped_early_stays_stopped_when_resumed(tmp_path):
    settings = {"local_steps": 1, "epochs": 600, "early_stopping": 3, "checkpoint_every": 1}
    expected = trainer(tmp_path, **settings).fit()
    assert len(expected.history) < 200
    got = trainer(tmp_path, **settings).fit(resume=tmp_path)
    assert got.history == expected.history


@pytest.mark.parametrize("other", [{"norm": "batch"}, {"bias": False}, {"dropout": 0.1}])
def test_a_checkpoint_of_another_architecture_is_refused(tmp_path, other):
    trainer(tmp_path, checkpoint_every=1, callbacks=[Stop(1)]).fit()
    model = GCN(DATA.num_features, 12, DATA.num_classes, 3, **other)
    again = GISTTrainer(model, DATA, num_subnets=3, local_steps=3, epochs=54)
    with pytest.raises(CheckpointError, match=r"architecture\.|tensors\."):
        again.fit(resume=tmp_path)


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path):
    sgd, adam = partial(torch.optim.SGD, lr=0.1), partial(torch.optim.Adam, lr=0.1)
    trainer(tmp_path, checkpoint_every=1, callbacks=[Stop(1)], optimizer=sgd).fit()
    with pytest.raises(CheckpointError, match=r"optimizer='torch\.optim.*Adam"):
        trainer(tmp_path, optimizer=adam).fit(resume=tmp_path)


@pytest.mark.parametrize("keep_best", [True, False])
@pytest.mark.parametrize(
    ("first", "then"), [("disk", "disk"), ("disk", "memory"), ("memory", "disk")]
)
def test_a_run_is_resumed_bit_for_bit_wherever_its_parameters_live(
    tmp_path, first, then, keep_best
):
    same = {"keep_best": keep_best, "executor": "serial", "evaluation": "full"}
    settings = {**same, "checkpoint_every": 1}
    through = trainer(**same)
    expected = through.fit()
    trainer(tmp_path, store=first, callbacks=[Stop(3)], **settings).fit()
    resumed = trainer(tmp_path, store=then, **settings)
    for tensor in model_tensors(resumed.model).values():
        tensor.data.zero_()
    got = resumed.fit(resume=tmp_path)
    assert [r.train_loss for r in got.history] == [r.train_loss for r in expected.history]
    assert [r.val_loss for r in got.history] == [r.val_loss for r in expected.history]
    written = load_file(tmp_path / "model.safetensors")
    for name, tensor in model_tensors(through.model).items():
        assert torch.equal(written[name], tensor), name
    assert load_checkpoint(tmp_path).state["best_round"] == got.best.round


def test_checkpoints_on_disk_do_not_change_while_the_run_goes_on(tmp_path):
    """The best model is one file, in the store and in checkpoints, where files can be linked."""
    run = trainer(
        tmp_path, store="disk", checkpoint_every=1, callbacks=[Stop(2)], executor="serial"
    )
    run.fit()
    kept = load_checkpoint(tmp_path)
    assert kept.files("best")
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.add_(1)
    resumed = trainer(tmp_path, store="disk", checkpoint_every=100, executor="serial")
    resumed.fit(resume=tmp_path)
    assert load_checkpoint(kept.folder).state == kept.state, "checksums included"


def test_a_checkpoint_that_the_disk_has_no_room_for_is_refused(tmp_path, monkeypatch):
    save(tmp_path, 1, 1.0)
    save(tmp_path, 2, 2.0)
    free = iter([10, 20])  # the second look is after the older one has gone
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=next(free)))
    with pytest.raises(
        CheckpointError, match=r"no room for a checkpoint; got: 20 .*expected: 1,000"
    ):
        save(tmp_path, 3, 3.0, nbytes=1000)
    assert [path.name for path in tmp_path.iterdir()] == ["round-000002"]


def test_the_older_checkpoint_makes_room_where_there_is_none(tmp_path, monkeypatch):
    save(tmp_path, 1, 1.0)
    save(tmp_path, 2, 2.0)
    free = iter([10, 2000])
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=next(free)))
    save(tmp_path, 3, 3.0, nbytes=1000)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["round-000002", "round-000003"]


def test_what_a_killed_write_left_is_cleared_away(tmp_path):
    (tmp_path / ".writing-old").mkdir(parents=True)
    (tmp_path / ".writing-old" / "model.safetensors").write_bytes(b"half")
    save(tmp_path, 1, 1.0)
    assert [path.name for path in tmp_path.iterdir()] == ["round-000001"]


@pytest.mark.parametrize(("first", "now"), [(2, None), (1, None), (2, 3)])
def test_a_run_stacks_as_many_subnets_as_before_when_it_is_resumed(
    tmp_path, monkeypatch, first, now
):
    def with_room_for(most, **settings):
        room = Room(needed=1, limit=2**40, most=most)
        monkeypatch.setattr("gist.trainer.find_room", lambda *_, **__: room)
        return trainer(tmp_path, checkpoint_every=1, executor="stacked", **settings)

    whole = trainer(executor="stacked")
    whole.executor = whole._make_executor(most=first)
    expected = whole.fit()
    with_room_for(first, callbacks=[Stop(2)]).fit()
    resumed = with_room_for(now)
    got = resumed.fit(resume=tmp_path)
    assert resumed.most_stacked == first
    for ours, theirs in zip(got.history, expected.history, strict=True):
        assert (ours.train_loss, ours.val_loss) == (theirs.train_loss, theirs.val_loss)
    other = model_tensors(whole.model)
    for name, tensor in model_tensors(resumed.model).items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize(("first", "now"), [(None, 2), (3, 2), (2, 1)])
def test_a_run_is_not_resumed_where_fewer_subnets_fit_side_by_side(
    tmp_path, monkeypatch, first, now
):
    for most in (first, now):
        room = Room(needed=1, limit=2**40, most=most)
        monkeypatch.setattr("gist.trainer.find_room", lambda *_, room=room, **__: room)
        run = trainer(tmp_path, checkpoint_every=1, callbacks=[Stop(1)])
        if most == first:
            run.fit()
    with pytest.raises(CheckpointError, match=rf"room for {now}; expected: (all of them|{first})"):
        run.fit(resume=tmp_path)
