"""What users have (arrays, lists, scipy matrices, masks) turned into the tensors of samples.

Shape legend: ``N`` samples, ``F`` features, ``L`` labels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from gist.csr import csr_tensor, is_csr, parts, row_numbers
from gist.errors import ConfigError, DataError
from gist.metrics import METRICS, Metric, Task, is_precision
from gist.partition.streams import stream

SPLITS = ("train", "val", "test")


def as_sample_tensor(x: Any, like: Tensor | None = None) -> Tensor:
    """``[N, ...]``, dense or sparse CSR: tensors of floats and bytes keep their dtype.

    Arrays of floats and other numbers get torch's default dtype.

    Args:
        x: Tensor, array, list or scipy matrix.
        like: Samples that these are to join: floats get their precision, and all is left as it is
            where they are no floats.

    Raises:
        DataError: ``x`` is no array of numbers.
    """
    tensor = _as_tensor("x", x)
    if tensor.is_complex():
        raise DataError("samples must be real numbers", got=tensor.dtype)
    if is_bytes(tensor) or (like is not None and not like.is_floating_point()):
        return tensor
    if like is not None:
        return tensor.to(like.dtype)
    kept = isinstance(x, Tensor) and tensor.is_floating_point()
    return tensor if kept else tensor.to(torch.get_default_dtype())


def as_label_tensor(y: Any) -> Tensor:
    """``[N]`` int64 class numbers, or ``[N, L]`` float32 0/1, dense or sparse CSR.

    One column is as none, and of truth values are two classes.

    Raises:
        DataError: ``y`` is no array of numbers, or class numbers are not whole.
    """
    tensor = _as_tensor("y", y, "numpy.unique(y, return_inverse=True)[1] numbers names")
    if tensor.is_complex() or not tensor.shape.numel():
        raise DataError(
            "labels must be real numbers, at least one",
            got=f"{tensor.dtype} of shape {tuple(tensor.shape)}",
        )
    if is_csr(tensor):
        return tensor.float()
    if tensor.dim() == 2 and tensor.size(1) == 1:
        tensor = tensor[:, 0]
    if tensor.dim() != 1:
        return tensor.float()
    if tensor.is_floating_point():
        _check_whole(tensor)
    return tensor.long()


def _check_whole(y: Tensor) -> None:
    missing, broken = ~torch.isfinite(y), y != y.round()
    if bool(missing.any()):
        raise DataError(
            "labels are NaN or infinite",
            got=which(missing),
            expected="a class number for every sample",
            remedy="drop these samples; outside all splits a label may be -1",
        )
    if bool(broken.any()):
        raise DataError(
            "labels must be class numbers: regression is not supported",
            got=f"{y[broken][0].item():g} and others at {which(broken)}",
            expected="whole numbers from 0",
            remedy="numpy.digitize(y, edges) makes classes of ranges",
        )


def task_of(y: Tensor) -> Task:
    """What labels are for: ``[N]`` class numbers, or ``[N, L]``."""
    return "multiclass" if y.dim() == 1 else "multilabel"


def check_metric(metric: Metric, y: Tensor) -> None:
    """Refuses a metric that labels do not define: of sparse ones, all but precisions.

    Raises:
        ConfigError: see above; lists those that they do.
    """
    task = task_of(y)
    known = [m for m in METRICS[task] if is_precision(m) or not is_csr(y)]
    if metric in known:
        return
    columns = y.dim() == 2 and not is_csr(y)
    raise ConfigError(
        f"the metric does not fit {'sparse labels' if is_csr(y) else f'the task {task}'}",
        got=f"{metric!r} of {y.dtype} labels of shape {('n', *y.shape[1:])}",
        expected=" or ".join(known),
        remedy="class numbers are y.argmax(1) of one-hot labels, y[:, 0].long() of one column"
        if columns
        else None,
    )


def is_bytes(x: Tensor) -> bool:
    """Whether these are dense samples of bytes."""
    return x.dtype == torch.uint8 and not is_csr(x)


def check_finite(what: str, x: Tensor) -> None:
    """Refuses samples ``[N, ...]``, dense or sparse CSR, with NaN or infinite values.

    Raises:
        DataError: see above; says of which samples.
    """
    values = parts(x)[2] if is_csr(x) else x
    # NaN and infinity survive a sum: the cheap case.
    if not x.is_floating_point() or bool(torch.isfinite(values.sum())):
        return
    finite = torch.isfinite(values)
    if bool(finite.all()):
        return
    if is_csr(x):
        bad = torch.zeros(x.size(0), dtype=torch.bool, device=x.device)
        bad[row_numbers(x)[~finite]] = True
    else:
        bad = ~finite.reshape(len(x), -1).all(1)
    raise DataError(
        f"{what} hold NaN or infinite values",
        got=which(bad),
        expected="finite features",
        remedy="fill the missing values or drop the samples",
    )


def which(bad: Tensor) -> str:
    """How many entries of ``bad`` [N] are true, and which is the first."""
    numbers = bad.nonzero()[:, 0]
    noun = "sample" if len(numbers) == 1 else "samples"
    return f"{len(numbers):,} {noun}, first sample {int(numbers[0])}"


def as_splits(
    given: Mapping[str, Any],
    num_samples: int,
    fractions: tuple[float, float, float],
    seed: int,
    device: torch.device,
) -> dict[str, Tensor]:
    """Sample numbers of every split: the given ones, or where there are none, drawn uniformly.

    Args:
        given: Sample numbers, a boolean mask, a slice or None for train, val and test.
        num_samples: ``N``.
        fractions: Shares of drawn splits; each gets at least one sample.
        seed: Of drawn splits.
        device: Where the numbers are wanted.

    Raises:
        ConfigError: some splits are given and others not, or the fractions are no shares of one.
        DataError: a mask of another length, numbers that are not whole, or too few samples.
    """
    missing = [name for name in SPLITS if given[name] is None]
    if missing and len(missing) < len(SPLITS):
        raise ConfigError(
            "some splits are given and others not",
            got=f"no {' and no '.join(missing)}",
            expected="train, val and test, or none of them",
        )
    if not missing:
        return {name: _numbers(name, given[name], num_samples).to(device) for name in SPLITS}
    sound = len(fractions) == len(SPLITS) and all(f > 0 for f in fractions)
    if not sound or sum(fractions) > 1 + 1e-9:
        raise ConfigError(
            "fractions must be three shares of the samples",
            got=repr(fractions),
            expected="positive numbers that add up to at most 1, such as (0.8, 0.1, 0.1)",
        )
    if num_samples < len(SPLITS):
        raise DataError("too few samples to split", got=num_samples, expected="at least 3")
    val, test = (max(math.floor(f * num_samples + 0.5), 1) for f in fractions[1:])
    rest = num_samples - val - test
    everything = math.isclose(sum(fractions), 1)
    train = rest if everything else min(max(math.floor(fractions[0] * num_samples + 0.5), 1), rest)
    order = torch.randperm(num_samples, generator=stream("split", seed))
    drawn = torch.split(order[: train + val + test], [train, val, test])
    return {
        name: numbers.sort().values.to(device) for name, numbers in zip(SPLITS, drawn, strict=True)
    }


def _numbers(split: str, value: Any, num_samples: int) -> Tensor:
    if isinstance(value, slice):
        value = np.arange(num_samples)[value]
    numbers = _as_tensor(f"the {split} split", value)
    if numbers.dtype == torch.bool and numbers.shape == (num_samples,):
        return numbers.nonzero()[:, 0]
    bad = numbers.dtype == torch.bool or numbers.is_floating_point() or numbers.is_complex()
    if numbers.numel() and (bad or numbers.dim() != 1):
        raise DataError(
            f"the {split} split must say for each sample whether it belongs to it",
            got=f"{numbers.dtype} of shape {tuple(numbers.shape)}",
            expected=f"a boolean mask of shape ({num_samples},), a slice, or a list of sample "
            "numbers",
        )
    return numbers.long()


def _as_tensor(what: str, value: Any, remedy: str | None = None) -> Tensor:
    """A tensor of ``value``, sharing memory where possible; scipy matrices become sparse CSR."""
    if sp.issparse(value):
        matrix = sp.csr_matrix(value)
        if not matrix.has_canonical_format:
            matrix = matrix.copy()
            matrix.sum_duplicates()
        small = max(matrix.nnz, *matrix.shape) < 2**31 - 1
        kind = np.int32 if small else np.int64
        indptr, columns = (
            torch.from_numpy(a.astype(kind)) for a in (matrix.indptr, matrix.indices)
        )
        return csr_tensor(indptr, columns, torch.from_numpy(matrix.data), matrix.shape[1])
    if isinstance(value, Tensor):
        return (
            value.detach().to_sparse_csr() if value.layout == torch.sparse_coo else value.detach()
        )
    dtype = ""
    try:
        array = np.asarray(value)
        dtype = f" of dtype {array.dtype}"
        return torch.from_numpy(np.require(array, requirements=["C", "W"]))
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{what} cannot be read as an array of numbers",
            got=type(value).__name__ + dtype,
            expected="a torch tensor, a numpy array, a scipy matrix or equally long lists",
            remedy=remedy,
        ) from error
