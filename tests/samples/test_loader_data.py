"""A loader for each split."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from gist.errors import ConfigError, DataError
from gist.samples.loader_data import LoaderData


def loader(count: int = 12, classes: int = 3, **settings) -> DataLoader:
    x = torch.arange(2.0 * count).view(count, 2)
    return DataLoader(TensorDataset(x, torch.arange(count) % classes), batch_size=5, **settings)


class Rows(IterableDataset):
    def __iter__(self):
        yield from ((torch.ones(2) * i, i % 3) for i in range(12))


def made(**changes) -> LoaderData:
    given = {"train": loader(), "val": loader(7), "test": loader(4), "num_classes": 3}
    return LoaderData(**{**given, **changes})


def test_it_knows_what_its_loaders_give():
    data = made(name="mine", train=loader(shuffle=True))
    assert (data.task, data.metric, data.name) == ("multiclass", "accuracy", "mine")
    assert data.example().shape == (1, 2)
    columns = DataLoader(TensorDataset(torch.zeros(4, 2), torch.ones(4, 3).int()), batch_size=2)
    many = made(train=columns, val=columns, test=columns, metric="precision@3")
    assert many.task == "multilabel"
    (_, y), *_ = many.scored("val", batch_size=2)
    assert y.dtype == torch.float32


def test_a_column_of_whole_numbers_is_class_numbers():
    x, y = loader().dataset.tensors
    column = DataLoader(TensorDataset(x, y[:, None]), batch_size=5)
    data = made(train=column, val=column, test=column)
    assert (data.task, data.fingerprint) == (
        "multiclass",
        made(val=loader(), test=loader()).fingerprint,
    )
    column = DataLoader(TensorDataset(x, y[:, None] / 2), batch_size=5)
    with pytest.raises(ConfigError, match=r"'accuracy' of torch.float32.*\('n', 1\).*long\(\)"):
        made(train=column, val=column, test=column)


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_all_samples_of_a_split_are_scored(split, shuffle):
    dropping = loader(12, shuffle=shuffle, drop_last=True)
    pairs = list(made(**{split: dropping}).scored(split, batch_size=8))
    assert [len(y) for _, y in pairs] == [8, 4]
    x, y = dropping.dataset.tensors
    assert torch.equal(torch.cat([x for x, _ in pairs]), x)
    assert torch.equal(torch.cat([y for _, y in pairs]), y)


@pytest.mark.parametrize("most", [1, 5, 7, 12, 99])
@pytest.mark.parametrize("rows", [False, True])
def test_a_part_of_a_split_is_always_the_same(most, rows):
    train = DataLoader(Rows(), batch_size=5) if rows else loader(shuffle=True)
    data = made(train=train)
    seen = [
        torch.cat([x for x, _ in data.scored("train", batch_size=4, most=most)]) for _ in range(2)
    ]
    assert torch.equal(*seen)
    assert len(seen[0].unique(dim=0)) == min(most, 12)


def test_scoring_touches_no_global_state():
    data = made(train=DataLoader(Rows(), batch_size=5))
    before = torch.get_rng_state()
    for split in ("train", "val"):
        list(data.scored(split, batch_size=5))
    assert torch.equal(before, torch.get_rng_state())


def test_the_fingerprint_is_given_or_that_of_first_batches_and_lengths():
    assert made(fingerprint="mine").fingerprint == "mine"
    prints = {
        made().fingerprint,
        made(train=loader(13)).fingerprint,
        made(train=loader(30)).fingerprint,
        made(num_classes=4).fingerprint,
        made(test=loader(4, classes=2)).fingerprint,
    }
    assert len(prints) == 5
    assert made(train=loader(shuffle=True)).fingerprint == made().fingerprint
    assert made(name="other").fingerprint == made().fingerprint


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"val": []}, DataError, "the loader is empty"),
        ({"val": 3}, ConfigError, "iterated over again and again"),
        ({"num_classes": 2}, DataError, "train loader do not fit num_classes; got: class.* 0 to 2"),
        ({"test": loader(9, 5)}, DataError, "test loader do not fit num_classes; got.* 0 to 4"),
        ({"metric": "roc_auc"}, ConfigError, "does not fit the task multiclass"),
        (
            {"val": [(torch.zeros(2, 3), torch.zeros(2).long())]},
            DataError,
            r"val loader gives other samples.*float32 \(3,\).*expected: x torch.float32 \(2,\)",
        ),
        (
            {"val": [(torch.zeros(2, 2), torch.zeros(2, 3))]},
            DataError,
            r"val loader gives other samples.*y torch.float32 \(3,\)",
        ),
    ],
)
def test_loaders_that_do_not_fit_are_refused(changes, error, message):
    with pytest.raises(error, match=message):
        made(**changes)


@pytest.mark.parametrize("sampler", [None, range(12)])
def test_labels_are_checked_where_they_are_scored(sampler):
    x, y = loader().dataset.tensors
    late = TensorDataset(x, torch.where(torch.arange(12) == 11, 3, y))
    data = made(val=DataLoader(late, batch_size=5, sampler=sampler))
    with pytest.raises(DataError, match=r"batch 2 of the val loader do not fit.* to 3"):
        list(data.scored("val", batch_size=5))


@pytest.mark.parametrize("sampler", [None, range(12)])
def test_samples_are_checked_where_they_are_scored(sampler):
    x, y = loader().dataset.tensors
    late = TensorDataset(torch.where(torch.arange(12)[:, None] == 11, torch.nan, x), y)
    data = made(val=DataLoader(late, batch_size=5, sampler=sampler))
    message = "samples of batch 2 of the val loader hold NaN.*got: 1 sample, first sample 1"
    with pytest.raises(DataError, match=message):
        list(data.scored("val", batch_size=5))
    with pytest.raises(DataError, match="samples of the first batch of the val loader hold NaN"):
        made(val=[(torch.full((2, 2), torch.inf), torch.zeros(2).long())])
