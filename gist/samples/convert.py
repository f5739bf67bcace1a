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

from gist.csr import csr_tensor, is_csr
from gist.errors import ConfigError, DataError
from gist.partition.streams import stream

SPLITS = ("train", "val", "test")


def as_sample_tensor(x: Any) -> Tensor:
    """``[N, ...]``, dense or sparse CSR: tensors of floats and bytes keep their dtype.

    Arrays of floats and other numbers get torch's default dtype.

    Raises:
        DataError: ``x`` is no array of numbers.
    """
    tensor = _as_tensor("x", x)
    if tensor.is_complex():
        raise DataError("samples must be real numbers", got=tensor.dtype)
    kept = tensor.dtype == torch.uint8 and not is_csr(tensor)
    kept = kept or (isinstance(x, Tensor) and tensor.is_floating_point())
    return tensor if kept else tensor.to(torch.get_default_dtype())


def as_label_tensor(y: Any) -> Tensor:
    """``[N]`` int64 class numbers, or ``[N, L]`` float32 0/1, dense or sparse CSR.

    Raises:
        DataError: ``y`` is no array of numbers, or class numbers are not whole.
    """
    tensor = _as_tensor("y", y)
    if is_csr(tensor):
        return tensor.float()
    if tensor.dim() == 2 and tensor.size(1) == 1:
        tensor = tensor[:, 0]
    if tensor.dim() != 1:
        return tensor.float()
    whole = not tensor.is_complex() and bool((tensor == tensor.round()).all())
    if not whole or not len(tensor):
        raise DataError(
            "class numbers must be whole numbers, at least one",
            got=f"{tensor.dtype} of shape {tuple(tensor.shape)}",
            remedy="numpy.unique(y, return_inverse=True)[1] numbers classes with names",
        )
    return tensor.long()


def as_splits(
    given: Mapping[str, Any],
    num_samples: int,
    fractions: tuple[float, float, float],
    seed: int,
    device: torch.device,
) -> dict[str, Tensor]:
    """Sample numbers of every split: the given ones, or where there are none, drawn uniformly.

    Args:
        given: Sample numbers, a boolean mask or None for train, val and test.
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
    numbers = _as_tensor(f"the {split} split", value)
    if numbers.dtype == torch.bool and numbers.shape == (num_samples,):
        return numbers.nonzero()[:, 0]
    bad = numbers.dtype == torch.bool or numbers.is_floating_point() or numbers.is_complex()
    if numbers.numel() and (bad or numbers.dim() != 1):
        raise DataError(
            f"the {split} split must say for each sample whether it belongs to it",
            got=f"{numbers.dtype} of shape {tuple(numbers.shape)}",
            expected=f"a boolean mask of shape ({num_samples},), or a list of sample numbers",
        )
    return numbers.long()


def _as_tensor(what: str, value: Any) -> Tensor:
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
    try:
        return torch.from_numpy(np.require(np.asarray(value), requirements=["C", "W"]))
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{what} cannot be read as an array of numbers",
            got=type(value).__name__,
            expected="a torch tensor, a numpy array, a scipy matrix or equally long lists",
        ) from error
