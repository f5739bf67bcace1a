"""Losses and metrics against scikit-learn and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

from gist.errors import ConfigError, DataError
from gist.metrics import METRICS, compute_metric, loss

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
