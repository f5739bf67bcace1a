"""A loader in its own order: nothing is drawn twice, and evaluation does not disturb it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, TensorDataset, WeightedRandomSampler

import gist.nn
from gist.baselines.data_parallel import SampleDataParallelTrainer
from gist.errors import ConfigError, DataError
from gist.methods import ISTTrainer
from gist.partition.spec import model_tensors
from gist.partition.streams import stream
from gist.samples.loader_data import LoaderData
from gist.samples.series import SeriesSource

CPU = torch.device("cpu")


class Numbered:
    """Batches whose first entry is their place in a pass; counts passes and batches."""

    def __init__(self, length: int, features: int = 1) -> None:
        self.length, self.features = length, features
        self.passes = self.batches = 0
        self.given: list[weakref.ref] = []

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes += 1
        for place in range(self.length):
            self.batches += 1
            x = torch.randn(4, self.features, generator=stream("numbered", place))
            x[:, 0] = place
            self.given.append(weakref.ref(x))
            yield x, (x.sum(1) > place).long()

    def alive(self) -> int:
        return sum(ref() is not None for ref in self.given)

    def reset(self) -> None:
        self.passes = self.batches = 0


def series(loader, m: int, steps: int) -> SeriesSource:
    return SeriesSource(loader, CPU, local_steps=steps, num_subnets=m, num_classes=2)


def one_by_one(source, round, m, steps):
    for subnet in range(m):
        for k, batch in enumerate(source.batches(seed=0, round=round, subnet=subnet, steps=steps)):
            yield (round * m + subnet) * steps + k, batch


def side_by_side(source, round, m, steps):
    """As data-parallel training takes them."""
    readers = [source.batches(seed=0, round=round, subnet=i, steps=steps) for i in range(m)]
    for k, step in enumerate(zip(*readers, strict=True)):
        for subnet, batch in enumerate(step):
            yield (round * m + subnet) * steps + k, batch


def shared(source, round, m, steps):
    """As subnets that share their batches take them."""
    for _ in range(m):
        for k, batch in enumerate(source.batches(seed=0, round=round, subnet=0, steps=steps)):
            yield round * m * steps + k, batch


@pytest.mark.parametrize("take", [one_by_one, side_by_side, shared])
@given(
    length=st.integers(1, 30),
    m=st.integers(1, 5),
    steps=st.integers(1, 6),
    ahead=st.integers(0, 12),
    rounds=st.lists(st.integers(0, 2), min_size=1, max_size=4),
)
def test_nothing_is_drawn_twice(take, length, m, steps, ahead, rounds):
    """In rounds that follow each other, with gaps, and looked into before they are trained on."""
    loader = Numbered(length)
    source = series(loader, m, steps)
    loader.reset()
    round, furthest = 0, 0
    for gap in rounds:
        round += gap
        if ahead:
            for k, batch in enumerate(source.batches(seed=0, round=round, subnet=0, steps=ahead)):
                assert int(batch.x[0, 0]) == (round * m * steps + k) % length
            furthest = max(furthest, round * m * steps + ahead)
        for position, batch in take(source, round, m, steps):
            assert int(batch.x[0, 0]) == position % length
            furthest = max(furthest, position + 1)
        round += 1
    assert loader.passes <= -(-furthest // length)
    assert loader.batches <= furthest


@pytest.mark.parametrize(
    ("take", "most"),
    [(one_by_one, 5), (side_by_side, 20), (shared, 5)],
    ids=["one by one", "side by side", "shared"],
)
def test_few_batches_are_kept(take, most):
    loader = Numbered(1000)
    source = series(loader, 4, 5)
    for round in range(3):
        for _, batch in take(source, round, 4, 5):
            del batch
            assert loader.alive() <= most + 1  # and the one that the loader holds
        assert loader.alive() <= 5 + 1  # those of the last subnet


def test_a_worker_keeps_only_what_it_is_to_take():
    loader = Numbered(1000)
    source = series(loader, 8, 5)
    readers = [source.batches(seed=0, round=0, subnet=i, steps=5) for i in (3, 7)]
    for pair in zip(*readers, strict=True):
        del pair
        assert loader.alive() <= 10


def test_batches_that_nobody_takes_are_let_go():
    loader = Numbered(1000)
    source = series(loader, 4, 5)
    readers = [source.batches(seed=0, round=0, subnet=i, steps=5) for i in range(4)]
    assert int(next(readers[3]).x[0, 0]) == 15
    assert loader.alive() > 15
    del readers
    next(source.batches(seed=0, round=1, subnet=0, steps=5))
    assert loader.alive() <= 2


def test_a_batch_that_is_changed_is_given_again_as_it_was():
    source = series(Numbered(10), 2, 3)
    for _ in range(2):
        for k, batch in enumerate(source.batches(seed=0, round=1, subnet=0, steps=3)):
            assert batch.x[:, 0].tolist() == [6 + k] * 4
            batch.x.zero_()
            batch.y.fill_(9)


def samples(count: int = 400) -> TensorDataset:
    x = torch.randn(count, 6, generator=stream("samples"))
    x[:, 5] = torch.arange(count) / 1000
    return TensorDataset(x, (x[:, 0] > 0).long())


def loaders(kind: str) -> LoaderData:
    """Loaders that draw from generators in the middle of a pass."""
    data, generator = samples(), torch.Generator().manual_seed(3)
    sampler = RandomSampler(data, replacement=True, num_samples=400, generator=generator)
    if kind == "weighted":
        sampler = WeightedRandomSampler(torch.ones(400), 400, generator=generator)
    own = None if kind == "sampler" else generator
    train = DataLoader(data, batch_size=16, sampler=sampler, generator=own)
    held = TensorDataset(*data[:64])
    others = [DataLoader(held, batch_size=32, sampler=range(64), generator=own) for _ in "ab"]
    return LoaderData(train=train, val=others[0], test=others[1], num_classes=2)


KINDS = ["shared", "sampler", "weighted"]


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_and_training_do_not_see_each_other(kind):
    def run(between: int) -> tuple[list[Tensor], list[Tensor]]:
        data, seen, scored = loaders(kind), [], []
        before = data.train.sampler.generator.get_state()
        source = series(data.train, 2, 6)
        for round in range(5):
            for subnet in range(2):
                for k, batch in enumerate(
                    source.batches(seed=0, round=round, subnet=subnet, steps=6)
                ):
                    seen.append(batch.x)
                    if between and k % between == 0:
                        for split in ("train", "val"):
                            pairs = data.scored(split, batch_size=9, most=20)
                            scored.append(torch.cat([x for x, _ in pairs]))
        assert torch.equal(data.train.sampler.generator.get_state(), before)
        return seen, scored

    alone, _ = run(0)
    for between in (1, 4):
        seen, scored = run(between)
        assert all(map(torch.equal, alone, seen))
        assert all(torch.equal(scored[i % 2], x) for i, x in enumerate(scored))


def trainer(data: LoaderData, method=ISTTrainer, **settings):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = gist.nn.MLP(6, 16, 2, norm=settings.pop("norm", "batch"))
    given = {"num_subnets": 2, "local_steps": 3, "rounds": 8, "epochs": None, "progress": False}
    more = {"executor": "serial", "shared_batches": False, "lr": 0.01, "train_eval_samples": 20}
    return method(model, data, **{**given, **more, **settings})


def seen_by(made) -> list[Tensor]:
    """Collects the batches that a run is given for training."""
    seen, program_loss = [], made.objective.loss

    def loss(model, batch):
        if torch.is_grad_enabled():
            seen.append(batch.x)
        return program_loss(model, batch)

    made.objective.loss = loss
    return seen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shared_batches", [False, True])
def test_batches_do_not_depend_on_how_often_a_run_is_evaluated(kind, shared_batches):
    runs = []
    for every in (1, 4):
        settings = {"norm": "layer", "keep_best": False, "shared_batches": shared_batches}
        made = trainer(loaders(kind), eval_every=every, **settings)
        seen = seen_by(made)
        made.fit()
        runs.append((seen, model_tensors(made.model)))
    (one, weights), (four, same) = runs
    assert len(one) == len(four) == 8 * 2 * 3
    assert all(map(torch.equal, one, four))
    assert all(torch.equal(tensor, same[name]) for name, tensor in weights.items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_on_a_series_resumes_bit_for_bit(kind, tmp_path):
    whole = trainer(loaders(kind))
    expected = whole.fit()
    settings = {"out": tmp_path, "checkpoint_every": 1}
    stop = trainer(loaders(kind), callbacks=lambda _, record: record.round == 4, **settings)
    stop.fit()
    resumed = trainer(loaders(kind), **settings)
    got = resumed.fit(resume=tmp_path)
    assert [r.val_loss for r in got.history] == [r.val_loss for r in expected.history]
    weights = model_tensors(whole.model)
    assert all(torch.equal(t, weights[name]) for name, t in model_tensors(resumed.model).items())


@pytest.mark.parametrize(
    ("method", "settings", "drawn"),
    [
        (ISTTrainer, {}, 8 * 6 + 64),
        (ISTTrainer, {"shared_batches": True}, 8 * 6 + 64),
        (ISTTrainer, {"norm": "layer"}, 8 * 6),
        (ISTTrainer, {"norm": "layer", "shared_batches": True}, 8 * 6 - 3),
        (ISTTrainer, {"local_steps": 20}, 8 * 40 + 64),
        (SampleDataParallelTrainer, {"norm": "layer"}, 8 * 6),
        (SampleDataParallelTrainer, {"local_steps": 20}, 8 * 40),
    ],
)
def test_a_run_draws_its_batches_once(method, settings, drawn):
    """Those of all rounds, and up to 64 after the last that BatchNorm statistics are made of."""
    loader, held = Numbered(2000, 6), [next(iter(Numbered(2, 6)))]
    data = LoaderData(train=loader, val=held, test=held, num_classes=2)
    wants_statistics = method is ISTTrainer and settings.get("norm", "batch") == "batch"
    made = trainer(data, method, **settings, recalibrate_bn=wants_statistics)
    made.evaluate("val")
    loader.reset()
    made.fit()
    assert loader.passes == 1 + 8
    evaluations = 8 * 5  # batches of 4 that hold 20 samples
    assert loader.batches == drawn + evaluations


def test_a_series_refuses_workers_that_live_on():
    workers = {"num_workers": 1, "persistent_workers": True}
    loader = DataLoader(samples(), sampler=range(9), **workers)
    with pytest.raises(ConfigError, match=r"persistent_workers=True, DataLoader of TensorDataset"):
        series(loader, 2, 3)
    assert loader._iterator is None


def test_labels_of_every_batch_are_checked():
    x = torch.zeros(4, 1)
    batches = [(x, torch.tensor([0, 1, 0, 1]))] * 5 + [(x, torch.tensor([0, 2, 0, 1]))]
    reader = series(batches, 2, 3).batches(seed=0, round=1, subnet=1, steps=3)
    assert len([next(reader), next(reader)]) == 2
    message = r"batch 5 of pass 1 of the train loader do not fit num_classes; got.* 0 to 2"
    with pytest.raises(DataError, match=message):
        next(reader)
