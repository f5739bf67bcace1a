"""Samples from what users have, checked on entry."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch import Tensor

from gist.csr import csr_tensor
from gist.errors import ConfigError, DataError
from gist.partition.streams import stream
from gist.samples.data import SampleData
from gist.samples.transforms import ImageTransform, Scale


def made(**changes) -> SampleData:
    given = {
        "x": torch.randn(20, 3, generator=stream("x")),
        "y": torch.arange(20) % 4,
        "train": torch.arange(12),
        "val": torch.arange(12, 16),
        "test": torch.arange(16, 20),
        "num_classes": 4,
    }
    return SampleData(**{**given, **changes})


def sparse_labels(rows: int = 20, columns: int = 7) -> Tensor:
    wanted = torch.rand(rows, columns, generator=stream("labels")) < 0.3
    return wanted.float().to_sparse_csr()


def images(count: int = 20) -> Tensor:
    return torch.randint(256, (count, 3, 4, 5), generator=stream("images")).to(torch.uint8)


def bags() -> Tensor:
    return torch.randn(20, 9, generator=stream("bags")).relu().to_sparse_csr()


@pytest.mark.parametrize(
    ("changes", "shape"),
    [
        ({}, (3,)),
        ({"x": torch.randn(20, 2, 3, 4)}, (2, 3, 4)),
        ({"x": images(), "transform": ImageTransform(pad=2, flip=True)}, (3, 4, 5)),
        ({"x": bags()}, (9,)),
        ({"x": torch.randn(20, 6), "transform": lambda b, **_: b.view(-1, 2, 3)}, (2, 3)),
    ],
)
def test_samples_have_the_shape_that_the_model_sees(changes, shape):
    data = made(**changes)
    assert data.sample_shape == shape
    assert data.num_samples == 20
    index = torch.tensor([5, 0, 5])
    inputs = data.inputs(index, training=False, generator=stream("a"))
    assert inputs.shape == (3, *shape)
    assert inputs.is_floating_point()
    assert data.labels(index).tolist() == [1, 0, 1]


def test_images_stay_bytes():
    data = SampleData.of((images(), np.arange(20) % 3))
    assert data.x.dtype == torch.uint8
    assert data.transform == ImageTransform()
    inputs = data.inputs(data.train, training=True, generator=stream("a"))
    assert torch.allclose(inputs, data.x[data.train] / 255)


@pytest.mark.parametrize("shape", [(60,), (4, 15), (3, 4, 5), (3, 2, 2, 5)])
def test_bytes_of_any_shape_are_scaled(shape):
    data = SampleData.of((images().reshape(20, *shape), np.arange(20) % 3))
    assert data.sample_shape == shape
    inputs = data.inputs(data.train, training=True, generator=stream("a"))
    torch.testing.assert_close(inputs, data.x[data.train] / 255)


def test_the_rows_of_bags_are_those_of_the_dense_matrix():
    data = made(x=bags())
    index = torch.randperm(20)[:7]
    cut = data.inputs(index, training=True, generator=stream("a"))
    assert cut.layout == torch.sparse_csr
    assert torch.equal(cut.to_dense(), bags().to_dense()[index])


def test_augmentation_depends_on_its_generator_alone():
    data = made(x=images(), transform=ImageTransform(pad=2, flip=True))

    def drawn(name: str) -> Tensor:
        return data.inputs(torch.arange(20), training=True, generator=stream(name))

    before = torch.get_rng_state()
    assert torch.equal(drawn("a"), drawn("a"))
    assert not torch.equal(drawn("a"), drawn("b"))
    assert torch.equal(torch.get_rng_state(), before)


def test_arrays_lists_tensors_and_scipy_matrices_are_taken():
    dense = np.random.default_rng(0).normal(size=(12, 5)) * (np.arange(60).reshape(12, 5) % 3 > 0)
    y = np.arange(12) % 3
    data = SampleData.of((dense, y))
    assert data.x.dtype == torch.float32
    assert data.y.dtype == torch.int64
    assert (data.num_classes, data.metric, data.task) == (3, "accuracy", "multiclass")
    assert SampleData.of((dense.tolist(), y.tolist())).fingerprint() == data.fingerprint()
    assert SampleData.of((torch.from_numpy(dense), y)).x.dtype == torch.float64
    for matrix in (sp.csr_matrix(dense), sp.coo_array(dense)):
        bag = SampleData.of((matrix, y.astype(float)))
        assert bag.x.layout == torch.sparse_csr
        assert torch.equal(bag.x.to_dense(), torch.from_numpy(dense).float())
    assert SampleData.of(data) is data


def test_scipy_matrices_are_left_as_they_were():
    doubled = sp.csr_matrix((np.ones(3), np.array([1, 0, 0]), np.array([0, 3, 3, 3])), (3, 2))
    data = SampleData.of((doubled, [0, 1, 1]))
    assert data.x.to_dense()[0].tolist() == [2.0, 1.0]
    assert doubled.indices.tolist() == [1, 0, 0]


@pytest.mark.parametrize("kind", ["bool", "float64", "int8"])
def test_labels_in_columns_and_sparse_labels(kind):
    dense = sparse_labels().to_dense().numpy().astype(kind)
    columns = SampleData.of((torch.randn(20, 2), dense))
    assert (columns.num_classes, columns.metric, columns.task) == (7, "micro_f1", "multilabel")
    sparse = SampleData.of((torch.randn(20, 2), sp.csr_matrix(dense)))
    assert (sparse.num_classes, sparse.metric, sparse.task) == (7, "precision@1", "multilabel")
    index = torch.tensor([3, 3, 19])
    assert torch.equal(sparse.labels(index).to_dense(), columns.labels(index))
    assert columns.y.dtype == sparse.y.dtype == torch.float32


@pytest.mark.parametrize(
    "as_y",
    [np.asarray, torch.as_tensor, list, lambda y: y[:, None]],
    ids=["array", "tensor", "list", "column"],
)
def test_truth_values_are_two_classes(as_y):
    y = np.arange(12) % 3 > 0
    data = SampleData.of((np.ones((12, 2)), as_y(y)))
    assert (data.task, data.num_classes) == ("multiclass", 2)
    assert data.y.tolist() == y.tolist()


def test_splits_are_drawn_once_and_for_all():
    pair = (torch.randn(103, 2), torch.arange(103) % 2)
    data = SampleData.of(pair)
    assert [len(data.split(name)) for name in ("train", "val", "test")] == [83, 10, 10]
    every = torch.cat([data.train, data.val, data.test])
    assert sorted(every.tolist()) == list(range(103))
    assert torch.equal(SampleData.of(pair).test, data.test)
    assert not torch.equal(SampleData.of(pair, seed=1).test, data.test)
    less = SampleData.of(pair, fractions=(0.2, 0.1, 0.3))
    assert [len(less.split(name)) for name in ("train", "val", "test")] == [21, 10, 31]


def test_splits_may_be_masks_or_numbers():
    pair = (torch.randn(6, 2), [0, 1] * 3)
    mask = np.array([True, False, True, False, True, False])
    data = SampleData.of(pair, train=mask, val=[1], test=torch.tensor([3, 5], dtype=torch.int32))
    assert data.train.tolist() == [0, 2, 4]
    assert data.test.tolist() == [3, 5]
    assert data.test.dtype == torch.int64
    sliced = SampleData.of(pair, train=slice(0, 6, 2), val=slice(1, 2), test=slice(-1, 2, -2))
    assert [sliced.split(s).tolist() for s in ("train", "val", "test")] == [[0, 2, 4], [1], [5, 3]]


def test_the_fingerprint_is_that_of_all_that_counts():
    prints = {
        made().fingerprint(),
        made(x=made().x + 1).fingerprint(),
        made(y=(torch.arange(20) + 1) % 4).fingerprint(),
        made(train=torch.arange(11)).fingerprint(),
        made(num_classes=5).fingerprint(),
        made(transform=Scale(mean=1.0)).fingerprint(),
        made(transform=Scale(mean=2.0)).fingerprint(),
        made(x=bags()).fingerprint(),
        made(x=bags() * 2).fingerprint(),
        made(y=sparse_labels(), num_classes=7, metric="precision@3").fingerprint(),
    }
    assert len(prints) == 10
    assert made(name="other").fingerprint() == made().fingerprint()


def test_scored_samples_are_those_of_the_split_in_order():
    data = made(x=images(), transform=ImageTransform(pad=3))
    pairs = list(data.scored("train", batch_size=5))
    assert [len(y) for _, y in pairs] == [5, 5, 2]
    whole = data.inputs(data.train, training=False, generator=stream("a"))
    assert torch.equal(torch.cat([x for x, _ in pairs]), whole)
    some = torch.cat([y for _, y in data.scored("train", batch_size=5, most=7)])
    assert len(some) == 7
    assert torch.equal(some, torch.cat([y for _, y in data.scored("train", batch_size=2, most=7)]))


def test_moving_to_its_own_device_is_no_copy():
    data = made()
    assert data.to("cpu") is data
    moved = data.to("meta")
    assert moved.x.device == moved.y.device == moved.train.device == torch.device("meta")
    assert moved.name == data.name


def test_half_precision_becomes_float32_and_labels_outside_the_splits_may_be_missing():
    y = torch.cat([torch.arange(20) % 4, torch.tensor([-1])])
    data = made(x=torch.randn(21, 3).half(), y=y)
    assert data.x.dtype == torch.float32
    assert repr(data).startswith("SampleData('data', 21 samples of shape (3,), multiclass with 4")


def nan_bags() -> Tensor:
    x = bags()
    x.values()[-1] = float("nan")
    return x


REFUSED = {
    "array": ({"x": np.zeros((20, 3))}, "x must be a tensor; got: ndarray"),
    "one dim": ({"x": torch.zeros(20)}, r"one row of features.*x\[:, None\]"),
    "whole numbers": ({"x": torch.zeros(20, 3).long()}, r"one row of features.*x\.float"),
    "coo": ({"x": torch.eye(20).to_sparse_coo()}, "sparse with compressed rows"),
    "nan": ({"x": torch.full((20, 3), float("nan"))}, "NaN or infinite values; got: 20 samples"),
    "nan bag": ({"x": nan_bags()}, "NaN or infinite values; got: 1 sample, first sample 19"),
    "bytes": ({"x": images()}, "bytes need a transform.*ImageTransform"),
    "channels": (
        {"x": images(), "transform": ImageTransform(mean=(0.0, 0.0))},
        "the transform cannot be applied.*RuntimeError",
    ),
    "ragged transform": (
        {"transform": lambda b, **_: b[:1]},
        r"one row for each sample; got: torch.float32 of \(1, 3\)",
    ),
    "transform makes nan": (
        {"transform": lambda b, **_: b / 0},
        "samples as the transform makes them hold NaN or infinite values; got: 2 samples",
    ),
    "labels of others": ({"y": torch.zeros(19).long()}, "disagree on the number of samples"),
    "float classes": ({"y": torch.zeros(20)}, "labels have a form"),
    "large class": ({"num_classes": 3}, "labels out of range; got: 3 and others at 5 samples"),
    "one class": ({"num_classes": 1}, "num_classes does not fit"),
    "columns": ({"y": torch.zeros(20, 3)}, r"int64 \[N\], or float 0/1 \[N, 4\]"),
    "no label": (
        {"y": torch.full((20, 4), 0.5), "metric": "micro_f1"},
        "labels out of range; got: 0.5 .*expected: 0 or 1",
    ),
    "sparse no label": (
        {"y": sparse_labels() * 2, "num_classes": 7, "metric": "precision@1"},
        "every stored entry of sparse labels must be a one; got: 2",
    ),
    "twice": (
        {
            "y": csr_tensor(
                torch.tensor([0, 2] + [2] * 19), torch.tensor([1, 1]), torch.ones(2), 4
            ),
            "metric": "precision@1",
        },
        "more than once; got: 1 entries",
    ),
    "empty": ({"val": torch.arange(0)}, "the val split is empty"),
    "overlap": ({"val": torch.arange(11, 16)}, "val split shares.*got: 1 sample, first sample 11"),
    "repeated": ({"val": torch.tensor([12, 12])}, "names a sample more than once"),
    "beyond": ({"test": torch.tensor([20])}, "samples that do not exist"),
    "mask": ({"test": torch.ones(20).bool()}, "must be sample numbers.*takes masks"),
    "undefined": (
        {"y": torch.eye(4)[[0] * 20], "metric": "roc_auc"},
        "ROC-AUC is undefined on the val split",
    ),
    "elsewhere": ({"y": torch.zeros(20, device="meta").long()}, "y is not on the device of x"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_data_that_cannot_be_trained_on_is_refused(changes, message):
    with pytest.raises(DataError, match=message):
        made(**changes)


def damaged(indptr: list[int], columns: list[int]) -> Tensor:
    return csr_tensor(torch.tensor(indptr), torch.tensor(columns), torch.ones(2), 2)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (damaged([0, 1, 2, 2], [0, 2]), "columns out of range"),
        (damaged([0, 2, 1, 2], [0, 1]), "row ends"),
    ],
)
def test_damaged_sparse_matrices_are_refused(matrix, message):
    with pytest.raises(DataError, match=f"the sparse x is damaged; got: {message}"):
        SampleData.of((matrix, [0, 1, 1]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "micro_f1"}, "does not fit the task multiclass.*expected: accuracy$"),
        ({"y": torch.eye(4)[torch.arange(20) % 4]}, r"'accuracy'.*\('n', 4\).*y.argmax\(1\)"),
        (
            {"y": sparse_labels(), "num_classes": 7, "metric": "roc_auc"},
            "does not fit sparse labels.*expected: precision@1 or precision@3 or precision@5",
        ),
    ],
)
def test_a_metric_must_fit_the_labels(changes, message):
    with pytest.raises(ConfigError, match=message):
        made(**changes)


X, Y = torch.zeros(6, 2), [0, 1] * 3


@pytest.mark.parametrize(
    ("data", "settings", "error", "message"),
    [
        (
            X,
            {},
            DataError,
            r"no samples and labels; got: Tensor; expected: a SampleData, or a pair",
        ),
        ((X, ["a"] * 6), {}, DataError, r"y cannot be read.*got: list of dtype <U1.*numpy.unique"),
        ((X, np.array([None] * 6)), {}, DataError, "y cannot.*ndarray of dtype object.*numpy.uni"),
        (([[1], [1, 2]], Y), {}, DataError, "x cannot be read as an array of numbers; got: list;"),
        ((X, [1.0, 0.5] * 3), {}, DataError, "regression is not.*got: 0.5 and others at 3 samples"),
        ((X, [1, np.nan, *Y[2:]]), {}, DataError, "labels are NaN.*got: 1 sample, first sample 1"),
        ((X, [1, np.inf, *Y[2:]]), {}, DataError, "labels are NaN or infinite; got: 1 sample"),
        ((X, []), {}, DataError, "labels must be real numbers, at least one"),
        ((X, [1j] * 6), {}, DataError, "labels must be real numbers.*complex128"),
        ((X + 1j, Y), {}, DataError, "real numbers"),
        ((X, Y), {"train": [0]}, ConfigError, "some splits are given.*got: no val and no test"),
        ((X, Y), {"fractions": (0.5, 0.5, 0.5)}, ConfigError, "three shares"),
        ((X, Y), {"fractions": (0.5, 0.5)}, ConfigError, "three shares"),
        ((X[:2], Y[:2]), {}, DataError, "too few samples"),
        ((X, Y), {"train": [0.5], "val": [1], "test": [2]}, DataError, "must say for each sample"),
        ((X, Y), {"train": [True], "val": [1], "test": [2]}, DataError, "must say for each sample"),
    ],
)
def test_what_holds_no_samples_is_refused(data, settings, error, message):
    with pytest.raises(error, match=message):
        SampleData.of(data, **settings)


@pytest.mark.parametrize(
    "setting",
    [
        {"train": [0, 1]},
        {"val": [2]},
        {"test": [3]},
        {"fractions": (0.5, 0.3, 0.2)},
        {"seed": 1},
        {"num_classes": 5},
        {"transform": Scale()},
        {"metric": "accuracy"},
        {"name": "mine"},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_data_that_are_made_take_no_settings(setting):
    data = SampleData.of((torch.randn(20, 2), torch.arange(20) % 2))
    (name,) = setting
    with pytest.raises(ConfigError, match=rf"settings already; got: a SampleData with {name};"):
        SampleData.of(data, **setting)
