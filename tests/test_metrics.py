"""Losses and metrics against scikit-learn and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

from gist.errors import ConfigError, DataError
from gist.metrics import METRICS, RunningMetric, compute_metric, is_precision, loss

shapes = given(st.integers(1, 40), st.integers(2, 6), st.integers(0, 10**6))


@shapes
def test_multiclass_accuracy_is_that_of_scikit_learn(n, c, seed):
    rng = torch.Generator().manual_seed(seed)
    logits, y = torch.randn(n, c, generator=rng), torch.randint(c, (n,), generator=rng)
    expected = accuracy_score(y, logits.argmax(1))
    assert compute_metric("accuracy", logits, y) == pytest.approx(expected)


@shapes
def test_micro_f1_is_that_of_scikit_learn(n, c, seed):
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, c, generator=rng)
    y = torch.randint(2, (n, c), generator=rng).float()
    expected = f1_score(y, logits > 0, average="micro", zero_division=0)
    assert compute_metric("micro_f1", logits, y) == pytest.approx(expected)


def test_micro_f1_without_positives_is_zero():
    assert compute_metric("micro_f1", -torch.ones(3, 2), torch.zeros(3, 2)) == 0.0


def test_roc_auc_is_the_mean_over_classes_with_both_labels():
    rng = np.random.default_rng(0)
    scores, y = rng.normal(size=(50, 4)), rng.integers(2, size=(50, 4)).astype(float)
    y[:, 1], y[:, 3] = 0.0, 1.0
    expected = np.mean([roc_auc_score(y[:, c], scores[:, c]) for c in (0, 2)])
    got = compute_metric("roc_auc", torch.tensor(scores), torch.tensor(y))
    assert got == pytest.approx(expected)


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_binary_scores_take_one_column_or_none(shape):
    logits = torch.tensor([3.0, -1.0, 2.0, -2.0]).reshape(shape)
    y = torch.tensor([1.0, 0.0, 0.0, 0.0])
    assert compute_metric("accuracy", logits, y) == 0.75
    assert compute_metric("roc_auc", logits, y) == 1.0
    assert loss("binary", logits, y) == F.binary_cross_entropy_with_logits(logits.flatten(), y)


def test_losses_are_means_and_differentiable():
    logits = torch.randn(5, 3, requires_grad=True)
    y = torch.tensor([0, 1, 2, 1, 0])
    assert torch.equal(loss("multiclass", logits, y), F.cross_entropy(logits, y))
    many = F.one_hot(y).double()
    loss("multilabel", logits, many).backward()
    assert torch.isfinite(logits.grad).all()


def test_half_precision_outputs_are_scored():
    y = torch.tensor([[1.0], [0.0]])
    assert compute_metric("roc_auc", torch.tensor([[1.0], [-1.0]], dtype=torch.bfloat16), y) == 1.0


def test_metrics_refuse_unknown_names():
    with pytest.raises(ConfigError, match="unknown metric; got: 'f1'; expected: accuracy or"):
        compute_metric("f1", torch.zeros(1, 2), torch.zeros(1).long())
    with pytest.raises(ConfigError, match="unknown task; got: 'regression'"):
        loss("regression", torch.zeros(1, 2), torch.zeros(1).long())


@pytest.mark.parametrize(
    ("metric", "logits", "y"),
    [
        ("accuracy", torch.zeros(0, 3), torch.zeros(0).long()),
        ("accuracy", torch.zeros(3, 2), torch.zeros(4).long()),
        ("micro_f1", torch.zeros(3, 2), torch.zeros(3, 3)),
        ("roc_auc", torch.zeros(3, 2), torch.zeros(3)),
    ],
)
def test_metrics_refuse_shapes_that_do_not_fit(metric, logits, y):
    with pytest.raises(DataError, match=f"{metric} needs one row of outputs"):
        compute_metric(metric, logits, y)


@pytest.mark.parametrize("metric", ["accuracy", "roc_auc"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_metrics_refuse_diverged_outputs(metric, value):
    with pytest.raises(DataError, match=r"training diverged; got: 1 of 2 values.*learning rate"):
        compute_metric(metric, torch.tensor([value, 0.0]), torch.tensor([1.0, 0.0]))


def test_roc_auc_refuses_labels_of_one_kind():
    with pytest.raises(DataError, match=r"ROC-AUC is undefined.*got: 3 nodes, 2 classes"):
        compute_metric("roc_auc", torch.randn(3, 2), torch.tensor([[1.0, 0.0]] * 3))


def test_every_task_has_a_metric():
    assert set(METRICS) == {"multiclass", "multilabel", "binary"}
    assert all(METRICS.values())


labelled = given(st.integers(1, 12), st.integers(1, 8), st.integers(0, 10**6), st.floats(0, 1))


def random_labels(n: int, c: int, seed: int, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of which no two are equal, and 0/1 labels; some rows may have none."""
    rng = torch.Generator().manual_seed(seed)
    scores = torch.randperm(n * c, generator=rng).view(n, c).double()
    return scores, (torch.rand(n, c, generator=rng) < share).double()


@labelled
def test_precision_at_k_counts_labels_among_the_best(n, c, seed, share):
    scores, y = random_labels(n, c, seed, share)
    for k in (1, 3, 5):
        hits = 0.0
        for row, labels in zip(scores.tolist(), y.tolist(), strict=True):
            best = sorted(range(c), key=lambda j: -row[j])[:k]
            hits += sum(labels[j] for j in best)
        for stored in (y, y.to_sparse_csr()):
            assert compute_metric(f"precision@{k}", scores, stored) == pytest.approx(hits / n / k)


@labelled
def test_the_loss_of_sparse_labels_is_that_of_a_uniform_distribution_over_them(n, c, seed, share):
    scores, y = random_labels(n, c, seed, share)
    scores = (scores / 10).requires_grad_()
    mass = y / y.sum(1, keepdim=True).clamp(min=1)
    expected = F.cross_entropy(scores, mass)
    got = loss("multilabel", scores, y.to_sparse_csr())
    assert got.item() == pytest.approx(expected.item())
    (wanted,) = torch.autograd.grad(expected, scores)
    assert torch.allclose(torch.autograd.grad(got, scores)[0], wanted)
    stacked = loss("multilabel", torch.stack([scores, -scores], dim=1), y.to_sparse_csr())
    other = F.cross_entropy(-scores, mass)
    assert torch.allclose(stacked, torch.stack([expected, other]))


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_sparse_labels_may_be_counted_in_any_whole_numbers(kind):
    scores, y = random_labels(6, 5, 0, 0.5)
    sparse = y.to_sparse_csr()
    parts = (sparse.crow_indices().to(kind), sparse.col_indices().to(kind), sparse.values())
    counted = torch.sparse_csr_tensor(*parts, y.shape, check_invariants=True)
    assert loss("multilabel", scores, counted) == loss("multilabel", scores, sparse)
    assert compute_metric("precision@3", scores, counted) == compute_metric(
        "precision@3", scores, y
    )


@settings(max_examples=10)
@given(st.integers(2, 30), st.integers(0, 999), st.integers(1, 9))
def test_a_running_metric_is_that_of_all_rows(n, seed, size):
    scores, y = random_labels(n, 4, seed, 0.5)
    y[0], y[1] = 0.0, 1.0  # so that a ROC-AUC is defined
    for metric in METRICS["multilabel"]:
        running = RunningMetric(metric)
        for some in torch.arange(n).split(size):
            running.add(scores[some], y[some])
        assert running.is_defined
        assert running.result() == pytest.approx(compute_metric(metric, scores, y))


def test_a_running_metric_refuses_what_one_of_all_rows_does():
    running = RunningMetric("accuracy")
    running.add(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    running.add(torch.tensor([[float("nan"), 0.0]]), torch.tensor([0]))
    with pytest.raises(DataError, match="training diverged; got: 1 of 4 values"):
        running.result()
    with pytest.raises(DataError, match="accuracy needs one row of outputs"):
        running.add(torch.zeros(2, 3), torch.zeros(3).long())
    alike = RunningMetric("roc_auc")
    alike.add(torch.zeros(2, 1), torch.ones(2, 1))
    assert not alike.is_defined
    with pytest.raises(ConfigError, match="unknown metric"):
        RunningMetric("recall")


@pytest.mark.parametrize(
    ("metric", "y"),
    [
        ("precision@1", torch.zeros(3).long()),
        ("micro_f1", torch.eye(3).to_sparse_csr()),
        ("roc_auc", torch.eye(3).to_sparse_csr()),
    ],
)
def test_sparse_labels_have_precisions_and_class_numbers_have_none(metric, y):
    assert is_precision(metric) == (metric == "precision@1")
    with pytest.raises(DataError, match=f"{metric} needs one row of outputs"):
        compute_metric(metric, torch.zeros(3, 3), y)
