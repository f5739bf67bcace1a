"""Independent samples that loaders give.

Shape legend: ``n`` samples, ``C`` output columns, ``L`` labels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gist.csr import is_csr, parts, take_rows
from gist.errors import DataError, one_of
from gist.metrics import Metric, Task
from gist.partition.streams import stream
from gist.samples.convert import SPLITS, check_metric, task_of
from gist.samples.loaders import (
    Loader,
    check_batch,
    deals_anew,
    fetched,
    first_batch,
    length_of,
    passed,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class LoaderData:
    """A torch ``DataLoader`` for each split, which gives pairs ``(x, y)``.

    ``x`` is what the model takes; ``y`` is ``[n]`` class numbers, as which one column of whole
    numbers counts too, or ``[n, L]`` 0/1 labels. See :mod:`gist.samples.loader_source` for how
    training batches are made. A first batch of each is drawn and checked, and every other as it
    comes.

    Attributes:
        train: Training samples, augmented by their dataset if they should be.
        val: Validation samples.
        test: Test samples.
        num_classes: Output columns that a model needs, ``C``.
        metric: As :data:`gist.metrics.METRICS` allows for the labels.
        name: For reports.
        fingerprint: Identifies the data; made of a first batch of each loader, and how many
            there are, where it is not given.

    Raises:
        ConfigError: something that is no loader, or a metric that does not fit the labels.
        DataError: an empty loader, items that are no pairs, samples that are not finite, or labels
            out of range.
    """

    train: Loader
    val: Loader
    test: Loader
    num_classes: int
    metric: Metric = "accuracy"
    name: str = "data"
    fingerprint: str | None = None
    _example: Tensor = field(init=False, repr=False)
    _task: Task = field(init=False, repr=False)

    def __post_init__(self) -> None:
        firsts = {split: first_batch(self.loader(split)) for split in SPLITS}
        for split, (x, y) in firsts.items():
            self._check(split, x, y, firsts["train"])
        digest = hashlib.sha256(str(self.num_classes).encode())
        for split, pair in firsts.items():
            loader = self.loader(split)
            size = len(loader.dataset) if deals_anew(loader) else length_of(loader)  # type: ignore[arg-type]
            digest.update(f"{split} {size}".encode())
            for tensor in pair:
                for part in parts(tensor) if is_csr(tensor) else (tensor,):
                    digest.update(f"{part.dtype} {tuple(part.shape)}".encode())
                    digest.update(part.cpu().contiguous().view(torch.uint8).numpy().data)
        if self.fingerprint is None:
            object.__setattr__(self, "fingerprint", digest.hexdigest())
        x, y = firsts["train"]
        object.__setattr__(self, "_example", take_rows(x, torch.tensor([0])))
        object.__setattr__(self, "_task", task_of(y))

    @property
    def task(self) -> Task:
        """``"multiclass"`` or ``"multilabel"``."""
        return self._task

    def example(self) -> Tensor:
        """The model's input for one sample: ``[1, ...]``."""
        return self._example

    def loader(self, split: str) -> Loader:
        """The loader of ``"train"``, ``"val"`` or ``"test"``."""
        one_of("split", split, SPLITS)
        loader: Loader = getattr(self, split)
        return loader

    def scored(
        self, split: str, *, batch_size: int, most: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and labels of a split, as many at a time as the loader gives.

        Args:
            split: ``"train"``, ``"val"`` or ``"test"``.
            batch_size: Samples at a time, of a map-style loader.
            most: Samples in all, at most: always the same ones of a map-style loader, drawn
                uniformly; the first of any other.

        Raises:
            DataError: samples of a batch that are not finite, or labels out of range.
        """
        loader, key = self.loader(split), ("scored", split)
        if deals_anew(loader):
            size = len(loader.dataset)  # type: ignore[arg-type]
            numbers = torch.arange(size)
            if most is not None and most < size:
                numbers = torch.randperm(size, generator=stream("scored"))[:most].sort().values
            pairs = fetched(loader, torch.split(numbers, batch_size), *key)
        else:
            pairs = passed(loader, *key)
        count = 0
        for place, (x, y) in enumerate(pairs):
            check_batch(x, y, self.num_classes, f"batch {place} of the {split} loader")
            if most is not None and count + len(y) > most:
                first = torch.arange(most - count, device=y.device)
                x, y = take_rows(x, first), take_rows(y, first)
            yield x, y
            count += len(y)
            if count == most:
                return

    def _check(self, split: str, x: Tensor, y: Tensor, train: tuple[Tensor, Tensor]) -> None:
        known: list[Any] = [x.shape[1:], x.dtype, y.shape[1:], y.dtype]
        first: list[Any] = [train[0].shape[1:], train[0].dtype, train[1].shape[1:], train[1].dtype]
        if known != first:
            raise DataError(
                f"the {split} loader gives other samples than the train loader",
                got=f"x {known[1]} {tuple(known[0])}, y {known[3]} {tuple(known[2])} per sample",
                expected=f"x {first[1]} {tuple(first[0])}, y {first[3]} {tuple(first[2])}",
            )
        check_metric(self.metric, y)
        check_batch(x, y, self.num_classes, f"the first batch of the {split} loader")
