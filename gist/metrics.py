"""Losses and scores of predictions, one per task.

Shape legend: ``N`` nodes, ``C`` output columns (classes; labels of a multilabel task; binary: 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from gist.errors import ConfigError, DataError

Task = Literal["multiclass", "multilabel", "binary"]
Metric = Literal["accuracy", "micro_f1", "roc_auc"]

METRICS: dict[Task, tuple[Metric, ...]] = {
    "multiclass": ("accuracy",),
    "binary": ("accuracy", "roc_auc"),
    "multilabel": ("micro_f1", "roc_auc"),
}
"""What can be reported for each task; the first is the default."""

_CHUNK_ENTRIES = 2**22
"""Outputs that are scored at a time."""


def one_of(what: str, value: Any, known: Any) -> None:
    """Refuses a ``value`` that is not among the ``known`` ones, listing them.

    Raises:
        ConfigError: ``value`` is not known.
    """
    if value not in known:
        raise ConfigError(f"unknown {what}", got=repr(value), expected=" or ".join(known))


def loss(task: Task, logits: Tensor, y: Tensor) -> Tensor:
    """Mean loss: cross entropy for multiclass, binary cross entropy with logits for the others.

    Args:
        task: What kind of labels ``y`` holds.
        logits: ``[N, C]`` raw model outputs; binary: ``[N, 1]`` or ``[N]``; of ``m`` stacked
            subnets ``[N, m, C]``.
        y: ``[N]`` class numbers (multiclass), ``[N]`` 0/1 (binary) or ``[N, C]`` 0/1 (multilabel).

    Returns:
        A scalar, differentiable in ``logits``; ``[m]``, one per subnet, for stacked ones.

    Raises:
        ConfigError: the task is unknown.
    """
    one_of("task", task, METRICS)
    if logits.dim() == 3:
        m = logits.size(1)
        targets = y.reshape(len(y), 1, -1).expand(-1, m, -1)
        if task == "multiclass":
            each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        else:
            each = F.binary_cross_entropy_with_logits(
                logits, targets.to(logits.dtype), reduction="none"
            ).mean(dim=2)
        return each.view(len(y), m).mean(dim=0)
    if task == "multiclass":
        return F.cross_entropy(logits, y)
    return F.binary_cross_entropy_with_logits(logits.reshape(y.shape), y.to(logits.dtype))


def mean_prediction(task: Task, logits: Iterable[Tensor]) -> Tensor:
    """Logits of the mean of several models' class probabilities, summed in their order.

    Multiclass: ``log(1/m Σ softmax(z_i))``; else the logit of ``1/m Σ sigmoid(z_i)``. Those of a
    single model are returned as they are.

    Args:
        task: As for :func:`loss`.
        logits: ``[N, C]`` of each model, at least one.

    Returns:
        ``[N, C]``.
    """
    one_of("task", task, METRICS)
    first: Tensor | None = None
    yes = no = torch.empty(0)
    count = 0
    for count, each in enumerate(logits, start=1):
        if task == "multiclass":
            here, against = F.log_softmax(each, dim=1), yes.new_zeros(())
        else:
            here, against = F.logsigmoid(each), F.logsigmoid(-each)
        first = each if count == 1 else None
        yes = here if count == 1 else torch.logaddexp(yes, here)
        no = against if count == 1 or task == "multiclass" else torch.logaddexp(no, against)
    if first is not None:
        return first
    return yes - math.log(count) if task == "multiclass" else yes - no


def mean_loss(task: Task, logits: Tensor, y: Tensor, nodes: Tensor) -> float:
    """The mean loss over some nodes, a chunk at a time: no second copy of the scores is made.

    Args:
        task: As for :func:`loss`.
        logits: ``[N, C]``, as for :func:`loss`.
        y: Labels of all nodes.
        nodes: ``[n]`` int64, at least one.
    """
    total = 0.0
    for scores, labels in _chunks(logits, y, nodes):
        total += float(loss(task, scores, labels)) * len(labels)
    return total / len(nodes)


def _chunks(logits: Tensor, y: Tensor, nodes: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Scores and labels of ``nodes``, some at a time, in order."""
    rows = max(_CHUNK_ENTRIES // max(logits[:1].numel(), 1), 1)
    for some in torch.split(nodes, rows):
        yield logits.index_select(0, some), y.index_select(0, some)


def _accuracy(logits: Tensor, y: Tensor) -> tuple[Tensor, int]:
    """How many predictions are right, and how many there are."""
    predicted = logits > 0 if y.is_floating_point() else logits.argmax(dim=1)
    return (predicted == y).sum(), y.numel()


def _micro_f1(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """``2 TP``, and ``2 TP + FP + FN``."""
    predicted, actual = logits > 0, y > 0
    return 2 * (predicted & actual).sum(), predicted.sum() + actual.sum()


def is_defined(metric: Metric, y: Tensor) -> bool:
    """Whether labels define the metric: a ROC-AUC needs a class with both labels."""
    if metric != "roc_auc":
        return True
    return len(_with_both_labels(y.reshape(len(y), -1))) > 0


def _with_both_labels(labels: Tensor) -> Tensor:
    return ((labels > 0).any(0) & (labels <= 0).any(0)).nonzero()[:, 0]


def _roc_auc(logits: Tensor, y: Tensor, nodes: Tensor) -> float:
    from sklearn.metrics import roc_auc_score  # takes a second to import

    scores, labels = logits.reshape(len(y), -1), y.reshape(len(y), -1)
    found = []
    for column in range(labels.size(1)):  # scikit-learn's own average refuses a single label
        actual = labels[:, column].index_select(0, nodes)
        if len(_with_both_labels(actual[:, None])):
            score = scores[:, column].index_select(0, nodes).float()
            found.append(float(roc_auc_score(actual.cpu(), score.cpu())))
    if not found:
        raise DataError(
            "ROC-AUC is undefined: no class has both positive and negative nodes here",
            got=f"{len(nodes)} nodes, {labels.size(1)} classes",
            expected="at least one class with both labels",
            remedy="use a larger or stratified split",
        )
    return sum(found) / len(found)


_RATIOS: dict[Metric, Callable[[Tensor, Tensor], tuple[Any, Any]]] = {
    "accuracy": _accuracy,
    "micro_f1": _micro_f1,
}
"""Metrics that are one sum over the nodes divided by another."""


def compute_metric(metric: Metric, logits: Tensor, y: Tensor, nodes: Tensor | None = None) -> float:
    """Scores raw model outputs against labels.

    - ``accuracy``: the largest logit is the class; with floating-point (binary) labels the
      prediction is ``logit > 0``.
    - ``micro_f1``: ``2 TP / (2 TP + FP + FN)`` over all entries, predicting where ``logit > 0``;
      0 where nothing is positive or predicted so.
    - ``roc_auc``: mean area under the ROC curve over the classes that have both labels, as in the
      Open Graph Benchmark (Hu et al., 2020).

    Args:
        metric: One of the three names.
        logits: ``[N, C]``; binary: ``[N, 1]`` or ``[N]``.
        y: ``[N]`` int64 (multiclass), ``[N]`` float (binary) or ``[N, C]`` float (multilabel).
        nodes: ``[n]`` int64: score these alone, without a copy of their outputs; None for all.

    Returns:
        The score, between 0 and 1.

    Raises:
        ConfigError: the metric is unknown.
        DataError: no nodes, shapes that do not fit, outputs that are NaN or infinite, or a ROC-AUC
            that no class defines.
    """
    one_of("metric", metric, ("accuracy", "micro_f1", "roc_auc"))
    logits = logits.detach()
    if y.is_floating_point() and logits.numel() == y.numel():
        logits = logits.reshape(y.shape)
    fits = logits.shape == y.shape if y.is_floating_point() else logits.shape[:-1] == y.shape
    if nodes is None:
        nodes = torch.arange(len(y), device=y.device)
    if not len(nodes) or not fits:
        raise DataError(
            f"{metric} needs one row of outputs for each labelled node, and at least one",
            got=f"outputs {tuple(logits.shape)}, labels {tuple(y.shape)} of {y.dtype}",
            expected="[N, C] outputs and [N] class numbers, or both [N, C] with 0/1 labels",
        )
    bad, count = 0, 0
    above, below = 0, 0
    for scores, labels in _chunks(logits, y, nodes):
        bad += int((~torch.isfinite(scores)).sum())
        count += scores.numel()
        if metric in _RATIOS:
            numerator, denominator = _RATIOS[metric](scores, labels)
            above, below = above + int(numerator), below + int(denominator)
    refuse_diverged(bad, count)
    if metric in _RATIOS:
        return above / below if below else 0.0
    return _roc_auc(logits, y, nodes)


def refuse_diverged(bad: int, count: int) -> None:
    """Refuses outputs of which any are NaN or infinite.

    Raises:
        DataError: ``bad`` of ``count`` are.
    """
    if bad:
        raise DataError(
            "the model's outputs are NaN or infinite: training diverged",
            got=f"{bad} of {count} values",
            expected="finite outputs",
            remedy="lower the learning rate, or add a normalisation layer",
        )
