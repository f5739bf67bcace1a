"""Samples without the samples: sizes alone, and tensors of these sizes to rehearse a run with.

Shape legend: ``N`` samples, ``B`` of them in a batch, ``F`` features, ``C`` output columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gist.catalog.records import SampleCard
from gist.config import SampleConfig
from gist.csr import is_csr, parts
from gist.errors import ConfigError
from gist.metrics import Metric, Task
from gist.samples.batches import SampleBatch
from gist.samples.data import SampleData
from gist.samples.loaders import first_batch
from gist.samples.objective import SampleObjective

_MAKING = 4
"""Copies of a batch, in bytes of the model's input, that making the next one takes."""

_INDEX_BYTES = 4
"""Of an entry's column, and of a row's start, in sparse tensors."""


@dataclass(frozen=True, kw_only=True)
class SampleShape:
    """The sizes of samples: all that the costs of training on them depend on.

    Attributes:
        num_samples: ``N``, of all splits.
        sample_shape: Shape of one sample as the model sees it.
        num_classes: ``C``, output columns that a model needs.
        train_samples: Training samples; all where it is not known.
        task: Kind of labels.
        metric: What is reported; None for the default of the task.
        dtype: Of the model's input.
        stored_bytes: Of one sample as it is kept, such as an image of bytes; None for those of the
            model's input, 0 where nothing of the data is in memory.
        bag_entries: Features of a sample on average, where samples are bags of few of them.
        label_entries: Labels of a sample on average, where labels are stored sparse.
        name: For reports.

    Raises:
        ConfigError: a size that cannot be.
    """

    num_samples: int
    sample_shape: tuple[int, ...]
    num_classes: int
    train_samples: int | None = None
    task: Task = "multiclass"
    metric: Metric | None = None
    dtype: torch.dtype = torch.float32
    stored_bytes: int | None = None
    bag_entries: int | None = None
    label_entries: int | None = None
    name: str = "data"

    def __post_init__(self) -> None:
        sizes: dict[str, object] = {
            name: getattr(self, name) for name in ("num_samples", "num_classes")
        }
        for name in ("train_samples", "bag_entries", "label_entries"):
            if getattr(self, name) is not None:
                sizes[name] = getattr(self, name)
        sizes |= {f"sample_shape[{dim}]": size for dim, size in enumerate(self.sample_shape)}
        for name, value in sizes.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be a whole number from 1 on", got=repr(value))

    @classmethod
    def of(cls, data: SampleData) -> SampleShape:
        """The sizes of samples that are there."""
        per_sample = data.x.nbytes // data.num_samples if not is_csr(data.x) else 0
        return cls(
            num_samples=data.num_samples,
            sample_shape=data.sample_shape,
            num_classes=data.num_classes,
            train_samples=len(data.train),
            task=data.task,
            metric=data.metric,
            dtype=data.example().dtype,
            stored_bytes=per_sample or None,
            bag_entries=_entries(data.x),
            label_entries=_entries(data.y),
            name=data.name,
        )

    @classmethod
    def of_card(cls, card: SampleCard) -> SampleShape:
        """The sizes of a dataset, from its card; it need not be there. Images are of bytes."""
        shape = tuple(card.shape)
        return cls(
            num_samples=card.samples,
            sample_shape=shape,
            num_classes=card.classes,
            train_samples=card.split.train,
            task=card.task,
            metric=card.metric,
            stored_bytes=math.prod(shape) if len(shape) == 3 else None,
            name=card.name,
        )

    @property
    def is_sparse(self) -> bool:
        """Whether samples are bags of features."""
        return self.bag_entries is not None

    @property
    def training_samples(self) -> int:
        """Samples that are trained on, at most all."""
        known = self.num_samples if self.train_samples is None else self.train_samples
        return min(known, self.num_samples)

    @property
    def num_bytes(self) -> int:
        """Samples, labels and numbers of the samples in the splits, in memory."""
        if self.stored_bytes == 0:
            return 0
        entry = self.dtype.itemsize
        sample = self.stored_bytes
        if sample is None and self.bag_entries is not None:
            sample = self.bag_entries * (entry + _INDEX_BYTES) + _INDEX_BYTES
        elif sample is None:
            sample = math.prod(self.sample_shape) * entry
        label = 8 if self.task == "multiclass" else 4 * self.num_classes
        if self.label_entries is not None:
            label = self.label_entries * (4 + _INDEX_BYTES) + _INDEX_BYTES
        return self.num_samples * (sample + label + 8)

    def batch(self, size: int, device: torch.device) -> SampleBatch:
        """A batch of so many samples, unfilled: under a mode without memory it takes none."""
        x: Any
        y: Any
        if self.bag_entries is not None:
            x = OutlineRows(size, self.sample_shape[0], self.bag_entries, self.dtype, device)
        else:
            x = torch.empty(size, *self.sample_shape, dtype=self.dtype, device=device)
        if self.label_entries is not None:
            y = OutlineRows(size, self.num_classes, self.label_entries, torch.float32, device)
        elif self.task == "multiclass":
            y = torch.empty(size, dtype=torch.int64, device=device)
        else:
            y = torch.empty(size, self.num_classes, device=device)
        return SampleBatch(x=x, y=y)


class OutlineRows:
    """As much of a sparse CSR tensor as models and losses look at.

    Tensors without memory cannot be sparse.

    Args:
        rows: ``N``.
        columns: ``F``.
        each: Entries of a row.
        dtype: Of the values.
        device: Where they seem to be.
    """

    layout = torch.sparse_csr

    def __init__(
        self, rows: int, columns: int, each: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.shape = torch.Size((rows, columns))
        self.dtype, self.device = dtype, device
        self._indptr = torch.empty(rows + 1, dtype=torch.int32, device=device)
        self._columns = torch.empty(rows * each, dtype=torch.int32, device=device)
        self._values = torch.empty(rows * each, dtype=dtype, device=device)

    def __len__(self) -> int:
        return self.shape[0]

    def dim(self) -> int:
        """As of the tensor; so are all others."""
        return 2

    def size(self, dim: int) -> int:
        """``N`` or ``F``."""
        return self.shape[dim]

    def is_floating_point(self) -> bool:
        """Of the values."""
        return self.dtype.is_floating_point

    def crow_indices(self) -> Tensor:
        """``[N + 1]``."""
        return self._indptr

    def col_indices(self) -> Tensor:
        """``[E]``."""
        return self._columns

    def values(self) -> Tensor:
        """``[E]``."""
        return self._values


class OutlineSamples(SampleObjective):
    """The data side of a run whose tensors may be without memory; every step sees the same batch.

    Args:
        shape: Sizes of the samples.
        device: Where they seem to be.
        config: Settings.
        num_subnets: m, the most of the run.
        batch_size: Samples of a step; None for what the settings say.
        steps_per_epoch: Likewise.

    Attributes:
        shape: Sizes of the samples.
        batch: What a step sees.
    """

    def __init__(
        self,
        shape: SampleShape,
        device: torch.device,
        config: SampleConfig,
        *,
        num_subnets: int,
        batch_size: int | None = None,
        steps_per_epoch: int | None = None,
    ) -> None:
        self.shape, self.device, self.config = shape, device, config
        self.data = shape  # type: ignore[assignment]  # a loss asks for the task alone
        training = shape.training_samples
        seen = -(-training // num_subnets) if config.shards else training
        size = batch_size or min(config.batch_size, seen)
        self._steps = steps_per_epoch or max(training // config.batch_size, 1)
        self.batch = self._sampled(shape.batch(size, device))
        made = _MAKING * size * math.prod(shape.sample_shape) * shape.dtype.itemsize
        if shape.is_sparse:
            made = _MAKING * sum(part.nbytes for part in parts(self.batch.x))
        orders = 2 * 8 * training  # a pass in its order, and the samples that it is an order of
        self._kept = torch.empty(shape.num_bytes + made + orders, dtype=torch.uint8, device=device)

    @classmethod
    def like(cls, objective: SampleObjective, num_subnets: int) -> Callable[[], OutlineSamples]:
        """Makes one of the sizes of an objective that is there.

        What there is to look at is looked at here, and not when the result is called.

        Args:
            objective: The data side of a run.
            num_subnets: m, the most of the run.
        """
        data, steps = objective.data, objective.steps_per_epoch
        if isinstance(data, SampleData):
            shape, size = SampleShape.of(data), None
        else:
            x, y = first_batch(data.train)
            size = len(x)
            shape = SampleShape(
                num_samples=size * steps,
                sample_shape=tuple(x.shape[1:]),
                num_classes=data.num_classes,
                task=data.task,
                metric=data.metric,
                dtype=x.dtype,
                stored_bytes=0,
                bag_entries=_entries(x),
                label_entries=_entries(y),
                name=data.name,
            )
        return partial(
            cls,
            shape,
            objective.device,
            objective.config,
            num_subnets=num_subnets,
            batch_size=size,
            steps_per_epoch=steps,
        )

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one pass over the training samples."""
        return self._steps

    @property
    def rebuilds(self) -> bool:
        """Batches are made for every step."""
        return True

    def batches(self, *, seed: int, round: int, subnet: int, steps: int) -> Iterator[SampleBatch]:
        """The same batch in every step."""
        return iter([self.batch] * steps)

    def _sampled(self, batch: SampleBatch) -> SampleBatch:
        """With the columns that a loss is taken over: as if no two labels of it were the same."""
        drawn = self.config.sampled_outputs
        if drawn is None:
            return batch
        labels = len(batch.y) * (self.shape.label_entries or 1)
        columns = min(labels + drawn, self.shape.num_classes)
        outputs = torch.empty(columns, dtype=torch.int64, device=self.device)
        return replace(batch, outputs=outputs, correction=torch.empty(columns, device=self.device))


def _entries(tensor: Tensor) -> int | None:
    """Stored entries of a row on average, rounded up; None for what is not sparse."""
    return -(-tensor.values().numel() // max(len(tensor), 1)) if is_csr(tensor) else None
