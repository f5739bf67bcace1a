"""Losses and scores of predictions, one per task.

Shape legend: ``N`` nodes or samples, ``C`` output columns (classes; labels of a multilabel task;
binary: 1), ``E`` stored entries of sparse labels, ``m`` stacked subnets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from gist.csr import is_csr, parts, row_numbers, take_rows
from gist.errors import DataError, one_of

Task = Literal["multiclass", "multilabel", "binary"]
Metric = Literal["accuracy", "micro_f1", "roc_auc", "precision@1", "precision@3", "precision@5"]

METRICS: dict[Task, tuple[Metric, ...]] = {
    "multiclass": ("accuracy",),
    "binary": ("accuracy", "roc_auc"),
    "multilabel": ("micro_f1", "roc_auc", "precision@1", "precision@3", "precision@5"),
}
"""What can be reported for each task; the first is the default."""

_CHUNK_ENTRIES = 2**22
"""Outputs that are scored at a time."""


def loss(task: Task, logits: Tensor, y: Tensor) -> Tensor:
    """Mean loss: cross entropy for multiclass, binary cross entropy with logits for the others.

    Sparse labels, of which there may be very many, are learnt by cross entropy too: against the
    distribution that is uniform over the labels ``Y`` of a sample, ``log Σ_j exp(z_j) - 1/|Y|
    Σ_{c in Y} z_c``, as SLIDE learns Amazon-670k (Chen et al., MLSys 2020). A sample without labels
    counts as 0.

    Args:
        task: What kind of labels ``y`` holds.
        logits: ``[N, C]`` raw model outputs; binary: ``[N, 1]`` or ``[N]``; of ``m`` stacked
            subnets ``[N, m, C]``.
        y: ``[N]`` class numbers (multiclass), ``[N]`` 0/1 (binary) or ``[N, C]`` 0/1 (multilabel),
            dense or sparse CSR, where every stored entry is a label.

    Returns:
        A scalar, differentiable in ``logits``; ``[m]``, one per subnet, for stacked ones.

    Raises:
        ConfigError: the task is unknown.
    """
    one_of("task", task, METRICS)
    if is_csr(y):
        return _spread_cross_entropy(logits, y).mean(dim=0)
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


def _spread_cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """``[N]`` or ``[N, m]``: cross entropy against the uniform distribution over a row's labels."""
    rows, (indptr, columns, _) = row_numbers(y), parts(y)
    counts = indptr.diff()
    share = 1 / counts.clamp(min=1).to(logits.dtype)
    picked = logits[rows, ..., columns.long()]  # [E] or [E, m]
    aside = [1] * (picked.dim() - 1)
    weighed = picked * share[rows].view(-1, *aside)
    wanted = torch.zeros_like(logits[..., 0]).index_add(0, rows, weighed)
    return logits.logsumexp(dim=-1) * (counts > 0).view(-1, *aside) - wanted


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
        yield logits.index_select(0, some), take_rows(y, some)


def _accuracy(logits: Tensor, y: Tensor) -> tuple[Tensor, int]:
    """How many predictions are right, and how many there are."""
    predicted = logits > 0 if y.is_floating_point() else logits.argmax(dim=1)
    return (predicted == y).sum(), y.numel()


def _micro_f1(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """``2 TP``, and ``2 TP + FP + FN``."""
    predicted, actual = logits > 0, y > 0
    return 2 * (predicted & actual).sum(), predicted.sum() + actual.sum()


def is_precision(metric: Metric) -> bool:
    """Whether a metric is a precision at k."""
    return metric.startswith("precision@")


def _precision(k: int, logits: Tensor, y: Tensor) -> tuple[Tensor, int]:
    """How many of the ``k`` largest outputs of every row are labels, and ``k`` times the rows."""
    best = logits.topk(min(k, logits.size(1)), dim=1).indices
    if is_csr(y):
        keys = row_numbers(y) * y.size(1) + parts(y)[1]
        rows = torch.arange(len(best), device=best.device)[:, None]
        hits = torch.isin(rows * y.size(1) + best, keys)
    else:
        hits = y.gather(1, best) > 0
    return hits.sum(), k * len(best)


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
    "precision@1": partial(_precision, 1),
    "precision@3": partial(_precision, 3),
    "precision@5": partial(_precision, 5),
}
"""Metrics that are one sum over the nodes divided by another."""

_NAMES: tuple[Metric, ...] = (*_RATIOS, "roc_auc")


class RunningMetric:
    """A metric of outputs that come some rows at a time: see :func:`compute_metric`.

    Rows are forgotten once they are counted; for a ROC-AUC all are kept.

    Args:
        metric: Its name.

    Raises:
        ConfigError: the metric is unknown.
    """

    def __init__(self, metric: Metric) -> None:
        one_of("metric", metric, _NAMES)
        self.metric: Metric = metric
        self._above, self._below = 0, 0
        self._bad, self._count = 0, 0
        self._kept: list[tuple[Tensor, Tensor]] = []

    def add(self, logits: Tensor, y: Tensor) -> None:
        """Counts some rows.

        Args:
            logits: As for :func:`compute_metric`.
            y: Their labels.

        Raises:
            DataError: no rows, or shapes that do not fit.
        """
        logits = _fitting(self.metric, logits.detach(), y)
        self._bad += int((~torch.isfinite(logits)).sum())
        self._count += logits.numel()
        if self.metric in _RATIOS:
            above, below = _RATIOS[self.metric](logits, y)
            self._above, self._below = self._above + int(above), self._below + int(below)
        else:
            self._kept.append((logits, y))

    @property
    def is_defined(self) -> bool:
        """Whether the labels so far define it."""
        labels = [y for _, y in self._kept]
        return not labels or is_defined(self.metric, torch.cat(labels))

    def result(self) -> float:
        """The score of all rows, between 0 and 1.

        Raises:
            DataError: outputs that are NaN or infinite, or a ROC-AUC that no class defines.
        """
        refuse_diverged(self._bad, self._count)
        if self.metric in _RATIOS:
            return self._above / self._below if self._below else 0.0
        logits, y = (torch.cat(rows) for rows in zip(*self._kept, strict=True))
        return _roc_auc(logits, y, torch.arange(len(y), device=y.device))


def compute_metric(metric: Metric, logits: Tensor, y: Tensor, nodes: Tensor | None = None) -> float:
    """Scores raw model outputs against labels.

    - ``accuracy``: the largest logit is the class; with floating-point (binary) labels the
      prediction is ``logit > 0``.
    - ``micro_f1``: ``2 TP / (2 TP + FP + FN)`` over all entries, predicting where ``logit > 0``;
      0 where nothing is positive or predicted so.
    - ``roc_auc``: mean area under the ROC curve over the classes that have both labels, as in the
      Open Graph Benchmark (Hu et al., 2020).
    - ``precision@1``, ``@3``, ``@5``: the share of labels among the ``k`` largest outputs of a row,
      meaned over the rows, as in extreme classification (Prabhu and Varma, 2014): ``1/k Σ y_l``
      over the ``k`` best, however many labels a row has. Of less than ``k`` columns all are looked
      at, and the sum is divided by ``k`` all the same.

    Args:
        metric: One of these names.
        logits: ``[N, C]``; binary: ``[N, 1]`` or ``[N]``.
        y: ``[N]`` int64 (multiclass), ``[N]`` float (binary) or ``[N, C]`` float (multilabel); for
            a precision it may be sparse CSR, where every stored entry is a label.
        nodes: ``[n]`` int64: score these alone, without a copy of their outputs; None for all.

    Returns:
        The score, between 0 and 1.

    Raises:
        ConfigError: the metric is unknown.
        DataError: no nodes, shapes that do not fit, outputs that are NaN or infinite, or a ROC-AUC
            that no class defines.
    """
    running = RunningMetric(metric)
    if nodes is None:
        nodes = torch.arange(len(y), device=y.device)
    logits = _fitting(metric, logits.detach(), y, count=len(nodes))
    if metric in _RATIOS:
        for scores, labels in _chunks(logits, y, nodes):
            running.add(scores, labels)
        return running.result()
    bad = sum(int((~torch.isfinite(scores)).sum()) for scores, _ in _chunks(logits, y, nodes))
    refuse_diverged(bad, logits[:1].numel() * len(nodes))
    return _roc_auc(logits, y, nodes)


def _fitting(metric: Metric, logits: Tensor, y: Tensor, count: int | None = None) -> Tensor:
    """Outputs in the shape of the labels, where these are numbers and not classes.

    Raises:
        DataError: they do not fit each other or the metric, or there are none, of ``count`` wanted.
    """
    if y.is_floating_point() and logits.numel() == y.numel():
        logits = logits.reshape(y.shape)
    fits = logits.shape == y.shape if y.is_floating_point() else logits.shape[:-1] == y.shape
    fits = fits and (y.dim() == 2 if is_precision(metric) else not is_csr(y))
    if not (len(y) if count is None else count) or not fits:
        raise DataError(
            f"{metric} needs one row of outputs for each labelled node, and at least one",
            got=f"outputs {tuple(logits.shape)}, labels {tuple(y.shape)} of {y.dtype}",
            expected="[N, C] outputs and [N] class numbers, or both [N, C] with 0/1 labels",
        )
    return logits


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
