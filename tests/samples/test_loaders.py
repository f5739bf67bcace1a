"""Torch loaders as batches: those that are dealt anew, and those that are taken as they come."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from gist.errors import ConfigError, DataError
from gist.samples.batches import SampleSource, TensorSource
from gist.samples.data import SampleData
from gist.samples.loader_source import DealtSource, loader_source
from gist.samples.loaders import as_pair, check_labels, deals_anew, passed
from gist.samples.series import SeriesSource

CPU = torch.device("cpu")
ONE = {"seed": 0, "round": 0, "subnet": 0}


def tensors(count: int = 23) -> TensorDataset:
    return TensorDataset(torch.arange(count).float()[:, None], torch.arange(count) % 3)


class Noisy(Dataset):
    """Draws from all three global random states for every sample."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        drawn = float(np.random.rand()), random.random()  # noqa: NPY002
        return torch.cat([torch.tensor([i, *drawn]), torch.rand(1)]), i % 2


class Stream(IterableDataset):
    """Numbers with noise, without a length."""

    def __init__(self, count: int = 10) -> None:
        self.count = count

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        for i in range(self.count):
            yield torch.cat([torch.tensor([float(i)]), torch.rand(1)]), i % 2


class Counted(Stream):
    def __len__(self) -> int:
        return self.count


def numbers(batch) -> list[int]:
    return batch.x[:, 0].long().tolist()


def made(loader, **settings) -> SampleSource:
    return loader_source(
        loader, CPU, **{"local_steps": 3, "num_subnets": 2, "num_classes": 3, **settings}
    )


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
def test_a_loader_deals_as_tensors_do(shuffle, shards, drop_last):
    loader = DataLoader(tensors(), batch_size=4, shuffle=shuffle, drop_last=drop_last)
    source = made(loader, shards=shards)
    x, y = loader.dataset.tensors
    x, y = torch.cat([x, x[:2]]), torch.cat([y, y[:2]])  # the other splits
    data = SampleData.of((x, y), train=range(23), val=[23], test=[24])
    like = TensorSource(data, 4, shards=2 if shards else None, local_steps=3)
    assert isinstance(source, DealtSource)
    assert source.steps_per_epoch == like.steps_per_epoch == 5
    for round in (0, 5, 1):
        for subnet in (1, 0):
            where = {"seed": 7, "round": round, "subnet": subnet, "steps": 3}
            for got, wanted in zip(source.batches(**where), like.batches(**where), strict=True):
                assert torch.equal(got.x, wanted.x)
                assert torch.equal(got.y, wanted.y)


def test_what_is_drawn_depends_on_the_step_alone():
    def states() -> list[object]:
        own = np.random.get_state()[1].tolist()  # noqa: NPY002
        return [torch.get_rng_state().tolist(), random.getstate(), own]

    def run(workers: int, **where) -> list[Tensor]:
        loader = DataLoader(Noisy(), batch_size=4, num_workers=workers)
        seen = []
        for batch in made(loader).batches(**{**ONE, **where}, steps=3):
            seen.append(batch.x)
            torch.rand(3)  # what a model may draw in between
        return seen

    before = states()
    source = made(DataLoader(Noisy(), batch_size=4))
    first = [batch.x for batch in source.batches(**ONE, steps=3)]
    assert states() == before
    for workers in (0, 2):
        assert all(torch.equal(a, b) for a, b in zip(first, run(workers), strict=True))
    assert len(torch.cat(first)[:, 1:].unique()) == 3 * 12  # every draw is another
    assert not torch.equal(first[0], run(0, round=1)[0])
    assert not torch.equal(first[0], run(0, subnet=1)[0])


def test_batches_are_collated_and_fetched_as_the_loader_does():
    class Together(Dataset):
        def __len__(self) -> int:
            return 8

        def __getitems__(self, index: list[int]) -> list[int]:
            return [i + 100 for i in index]

    def collate(items: list[int]) -> tuple[Tensor, Tensor]:
        x = torch.tensor(items).float()[:, None]
        return x, (x[:, 0] % 2).to(torch.int32)

    (batch,) = made(DataLoader(Together(), batch_size=8, collate_fn=collate)).batches(
        **ONE, steps=1
    )
    assert sorted(numbers(batch)) == list(range(100, 108))
    assert batch.y.dtype == torch.int64


def weighted() -> DataLoader:
    sampler = WeightedRandomSampler([1.0] * 11 + [50.0] * 12, 20)
    return DataLoader(tensors(), batch_size=4, sampler=sampler)


@pytest.mark.parametrize(
    "make",
    [
        weighted,
        lambda: DataLoader(Counted(10), batch_size=2),
        lambda: DataLoader(Counted(10), batch_size=2, generator=torch.Generator()),
        lambda: list(DataLoader(tensors(), batch_size=5)),
    ],
    ids=["sampler", "iterable", "generator", "list"],
)
def test_a_series_is_the_same_whatever_was_asked_before(make):
    def run(source: SampleSource, keys) -> dict:
        return {
            key: [b.x for b in source.batches(seed=key[0], round=key[1], subnet=key[2], steps=3)]
            for key in keys
        }

    keys = [(seed, round, subnet) for seed in (0, 1) for round in (0, 1, 5) for subnet in (0, 1)]
    source = made(make())
    assert isinstance(source, SeriesSource)
    assert source.steps_per_epoch == 5
    forward, backward = run(source, keys), run(made(make()), keys[::-1])
    for key in keys:
        same = [torch.equal(a, b) for a, b in zip(forward[key], backward[key], strict=True)]
        assert all(same), key


def test_a_series_repeats_the_loader_endlessly_and_deals_it_to_the_subnets():
    loader = list(DataLoader(tensors(20), batch_size=4))
    source = made(loader)
    seen = [
        numbers(batch)[0] // 4
        for round in range(4)
        for subnet in range(2)
        for batch in source.batches(seed=0, round=round, subnet=subnet, steps=3)
    ]
    assert seen == [position % 5 for position in range(24)]


def test_passes_of_a_random_loader_differ():
    source = made(weighted(), local_steps=5, num_subnets=1)
    one, two = (
        [numbers(b) for b in source.batches(seed=0, round=r, subnet=0, steps=5)] for r in (0, 1)
    )
    assert one != two


def test_only_a_plain_map_style_loader_is_dealt_anew():
    data = tensors()

    class Own(DataLoader):
        def __iter__(self):
            return super().__iter__()

    plain = [
        DataLoader(data),
        DataLoader(data, shuffle=True),
        DataLoader(data, sampler=RandomSampler(data)),
    ]
    others = [
        Own(data),
        DataLoader(data, batch_size=None),
        DataLoader(data, batch_sampler=[[0, 1]]),
        DataLoader(data, sampler=[2, 3]),
        DataLoader(data, sampler=RandomSampler(data, replacement=True)),
        DataLoader(data, sampler=RandomSampler(data, num_samples=5)),
        DataLoader(Stream()),
        [(torch.zeros(2, 1), torch.zeros(2).long())],
    ]
    assert all(map(deals_anew, plain))
    assert not any(map(deals_anew, others))
    given = DataLoader(data, batch_sampler=BatchSampler(SequentialSampler(data), 4, False))
    assert not deals_anew(given)


def test_a_loader_without_length_is_told_its_own():
    with pytest.raises(ConfigError, match=r"not known.*DataLoader of Stream without len.*give st"):
        made(DataLoader(Stream(), batch_size=2))
    source = made(DataLoader(Stream(), batch_size=2), steps_per_epoch=4)
    assert source.steps_per_epoch == 4
    firsts = [numbers(b)[0] for b in source.batches(**ONE, steps=6)]
    assert firsts == [0, 2, 4, 6, 0, 2]
    short = made(DataLoader(Stream(), batch_size=2), steps_per_epoch=6, local_steps=6)
    with pytest.raises(DataError, match="ended before its pass was over; got: 5 batches; expec"):
        list(short.batches(**ONE, steps=6))


REFUSED = {
    "empty": ([], {}, DataError, "the loader is empty; got: list"),
    "empty dataset": (
        DataLoader(TensorDataset(torch.zeros(0, 1))),
        {},
        DataError,
        "the loader is empty; got: DataLoader of TensorDataset",
    ),
    "once": (iter([1]), {}, ConfigError, "iterated over again and again; got: list_iterator"),
    "no loader": (3, {}, ConfigError, "iterated over again and again; got: int"),
    "no pairs": (
        DataLoader(TensorDataset(torch.zeros(4, 1))),
        {},
        DataError,
        r"must give pairs of inputs and labels; got: list of torch.float32 \(1, 1\)",
    ),
    "ranks": (
        DataLoader(tensors(), sampler=DistributedSampler(tensors(), 2, 0)),
        {},
        ConfigError,
        "every subnet has batches of its own; got: DistributedSampler",
    ),
    "shards": (
        DataLoader(Counted()),
        {"shards": True},
        ConfigError,
        "only a map-style loader.*got: DataLoader of Counted.*shards=False",
    ),
    "few": (
        DataLoader(tensors(3)),
        {"shards": True, "num_subnets": 4},
        ConfigError,
        "more shards than training samples; got: 4 shards of 3 samples",
    ),
    "told": (
        DataLoader(tensors()),
        {"steps_per_epoch": 3},
        ConfigError,
        "knows how many batches make one pass; got: steps_per_epoch=3",
    ),
}


@pytest.mark.parametrize(
    ("loader", "settings", "error", "message"), REFUSED.values(), ids=REFUSED.keys()
)
def test_loaders_that_cannot_be_used_are_refused(loader, settings, error, message):
    with pytest.raises(error, match=message):
        made(loader, **settings)


@pytest.mark.parametrize(
    "item",
    [
        torch.zeros(2, 1),
        {"x": torch.zeros(2, 1)},
        (torch.zeros(2, 1), [0, 1]),
        (torch.zeros(2, 1), torch.zeros(3).long()),
        (torch.zeros(2, 1), torch.zeros(2)),
        (torch.zeros(2, 1), torch.zeros(2).long(), 0),
        (torch.tensor(1.0), torch.zeros(2).long()),
        (torch.zeros(0, 1), torch.zeros(0).long()),
    ],
)
def test_items_that_are_no_pairs_are_refused(item):
    with pytest.raises(DataError, match="must give pairs of inputs and labels"):
        as_pair(item)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (torch.tensor([0, 3, 1]), "batch 7 do not fit num_classes; got: class numbers 0 to 3"),
        (torch.tensor([-1, 2]), "batch 7 do not fit.*class numbers -1 to 2; exp.*=3: 0 to 2"),
        (torch.zeros(2, 2), "batch 7 do not fit num_classes; got: 2 columns"),
        (torch.tensor([[0, 1, 0.5]]), "batch 7 are out of range; got: 0.5; expected: 0 or 1"),
        (torch.tensor([[0, 1, torch.nan]]), "batch 7 are out of range; got: nan"),
        (torch.tensor([[0, 2.0, 1]]).to_sparse_csr(), "batch 7 are out.* 2; expected: 1 in every"),
    ],
)
def test_labels_that_do_not_fit_are_refused(y, message):
    with pytest.raises(DataError, match=f"labels of {message}"):
        check_labels(y, 3, "batch 7")


def test_labels_that_fit_are_taken():
    for y in (torch.tensor([0, 2]), torch.eye(3), torch.eye(3).to_sparse_csr()):
        check_labels(y, 3, "a batch")


@pytest.mark.parametrize("sampler", [None, range(23)])
def test_a_late_label_is_refused_where_its_batch_is_made(sampler):
    x, y = tensors().tensors
    y = torch.where(torch.arange(23) == 22, 5, y)
    loader = DataLoader(TensorDataset(x, y), batch_size=4, sampler=sampler)
    message = r"labels of batch \d of .* do not fit num_classes; got: class numbers \d to 5"
    with pytest.raises(DataError, match=message):
        list(made(loader).batches(**ONE, steps=12))


@pytest.mark.parametrize("sampler", [None, range(23)])
def test_a_late_nan_is_refused_where_its_batch_is_made(sampler):
    x, y = tensors().tensors
    x = torch.where(torch.arange(23)[:, None] == 17, torch.nan, x)
    loader = DataLoader(TensorDataset(x, y), batch_size=4, sampler=sampler)
    message = r"samples of batch \d of .* hold NaN or infinite values; got: 1 sample, first sample"
    with pytest.raises(DataError, match=message):
        list(made(loader).batches(**ONE, steps=12))


def test_a_pass_draws_from_generators_of_its_own():
    generator = torch.Generator().manual_seed(5)
    sampler = RandomSampler(tensors(), replacement=True, num_samples=99, generator=generator)
    loader = DataLoader(tensors(), sampler=sampler, generator=generator)
    before = generator.get_state()
    alone = [x for x, _ in passed(loader, "a")]
    together = list(zip(passed(loader, "a"), passed(loader, "b"), strict=True))
    assert all(torch.equal(x, pair[0]) for x, (pair, _) in zip(alone, together, strict=True))
    assert any(not torch.equal(a[0], b[0]) for a, b in together)
    assert torch.equal(generator.get_state(), before)
