"""Independent samples with everything that training on them needs, checked once on entry.

Shape legend: ``N`` samples, ``n`` of them, ``F`` features, ``C`` output columns, ``L`` labels.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Generator, Tensor

from gist.csr import is_csr, parts, row_numbers, take_rows
from gist.errors import ConfigError, DataError, one_of
from gist.metrics import Metric, Task, is_defined
from gist.partition.streams import stream
from gist.samples.convert import (
    SPLITS,
    as_label_tensor,
    as_sample_tensor,
    as_splits,
    check_finite,
    check_metric,
    is_bytes,
    task_of,
    which,
)
from gist.samples.transforms import ImageTransform, Scale, Transform, identify


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class SampleData:
    """Samples, labels and splits.

    Build it from arrays with :meth:`of`; the constructor takes tensors in their final form.
    Samples outside all splits need no label.

    Attributes:
        x: ``[N, ...]`` float features (float64 is kept, other floats become float32); uint8, such
            as images ``[N, C, H, W]``, with a transform; or bags of features ``[N, F]``, float
            ``torch.sparse_csr``.
        y: ``[N]`` int64 class numbers; ``[N, L]`` float 0/1 labels; or, for very many labels, the
            same as ``torch.sparse_csr``, in which every entry is a one.
        train: int64 numbers of samples. The three splits share none and none is empty.
        val: As ``train``.
        test: As ``train``.
        num_classes: Output columns that a model needs, ``C``.
        transform: What turns stored samples into the model's input; see
            :class:`~gist.samples.transforms.Transform`.
        metric: As :data:`gist.metrics.METRICS` allows for the labels; precision at k alone for
            sparse ones.
        name: For reports.

    Raises:
        DataError: anything that cannot be trained on, see the messages.
        ConfigError: a metric that is unknown or does not fit the labels.
    """

    x: Tensor
    y: Tensor
    train: Tensor
    val: Tensor
    test: Tensor
    num_classes: int
    transform: Transform | None = None
    metric: Metric = "accuracy"
    name: str = "data"

    def __post_init__(self) -> None:
        self._check_samples()
        self._check_splits()
        self._check_labels()
        self._check_metric()
        self._check_transform()

    def __repr__(self) -> str:
        split = " / ".join(f"{len(self.split(name)):,}" for name in SPLITS)
        kind = "bags of features" if is_csr(self.x) else "samples"
        return (
            f"SampleData({self.name!r}, {self.num_samples:,} {kind} of shape {self.sample_shape}, "
            f"{self.task} with {self.num_classes:,} outputs, {self.metric}, split {split}, "
            f"{self.x.dtype} on {self.x.device})"
        )

    @property
    def num_samples(self) -> int:
        """``N``."""
        return self.x.size(0)

    @property
    def task(self) -> Task:
        """``"multiclass"`` or ``"multilabel"``."""
        return task_of(self.y)

    @property
    def is_sparse(self) -> bool:
        """Whether samples are bags of features."""
        return is_csr(self.x)

    @cached_property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample as the model sees it."""
        return tuple(self.example().shape[1:])

    def example(self) -> Tensor:
        """The model's input for one sample: ``[1, ...]``."""
        return self.inputs(self.train[:1], training=False, generator=stream("example"))

    def split(self, name: str) -> Tensor:
        """The sample numbers of ``"train"``, ``"val"`` or ``"test"``."""
        one_of("split", name, SPLITS)
        numbers: Tensor = getattr(self, name)
        return numbers

    def inputs(self, index: Tensor, *, training: bool, generator: Generator) -> Tensor:
        """The model's input for some samples: ``[n, ...]``, transformed.

        Args:
            index: ``[n]`` int64 sample numbers.
            training: Whether to augment.
            generator: What augmentation draws from; on the CPU.
        """
        return self.prepared(self._rows(self.x, index), training=training, generator=generator)

    def prepared(self, stored: Tensor, *, training: bool, generator: Generator) -> Tensor:
        """The model's input for samples ``[n, ...]`` in the form in which ``x`` holds them."""
        if self.transform is None:
            return stored
        return self.transform(stored, training=training, generator=generator)

    def labels(self, index: Tensor) -> Tensor:
        """Labels of some samples, in the layout of ``y``."""
        return self._rows(self.y, index)

    def scored(
        self, split: str, *, batch_size: int, most: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and labels of a split without augmentation, some at a time.

        Args:
            split: ``"train"``, ``"val"`` or ``"test"``.
            batch_size: Samples at a time.
            most: Samples in all, at most: always the same ones, drawn uniformly.
        """
        numbers = self.split(split)
        if most is not None and most < len(numbers):
            chosen = torch.randperm(len(numbers), generator=stream("scored"))[:most].sort().values
            numbers = numbers[chosen.to(numbers.device)]
        for some in torch.split(numbers, batch_size):
            inputs = self.inputs(some, training=False, generator=stream("scored"))
            yield inputs, self.labels(some)

    def to(self, device: torch.device | str) -> SampleData:
        """The same data on ``device``; itself where it is there already."""
        if torch.empty(0, device=device).device == self.x.device:
            return self
        moved = copy.copy(self)  # checked already: not through the constructor
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                object.__setattr__(moved, field.name, value.to(device))
        return moved

    def fingerprint(self) -> str:
        """SHA-256, in hex, of samples, labels, splits and the settings of the transform.

        The same on every device; checkpoints carry it to notice that the data changed.
        """
        digest = hashlib.sha256(f"{self.num_classes} {identify(self.transform)}".encode())
        for tensor in (self.x, self.y, self.train, self.val, self.test):
            for part in parts(tensor) if is_csr(tensor) else (tensor,):
                digest.update(f"{part.dtype} {tuple(part.shape)}".encode())
                digest.update(part.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    @classmethod
    def of(
        cls,
        data: Any,
        *,
        train: Any = None,
        val: Any = None,
        test: Any = None,
        fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
        seed: int = 0,
        num_classes: int | None = None,
        transform: Transform | None = None,
        metric: Metric | None = None,
        name: str = "data",
    ) -> SampleData:
        """Whatever holds samples and labels.

        Args:
            data: A :class:`SampleData`, which is returned as it is and takes no settings; or a pair
                ``(x, y)`` of tensors, numpy arrays, lists or scipy matrices. Arrays of numbers that
                are no bytes get torch's default dtype; tensors keep theirs. Sparse ``x`` are bags
                of features, sparse ``y`` many labels.
            train: Sample numbers, a boolean mask ``[N]``, or a slice of all samples. Without any
                split all three are drawn uniformly.
            val: As ``train``.
            test: As ``train``.
            fractions: Shares of the samples that drawn splits get.
            seed: Of drawn splits.
            num_classes: Without it the largest class number plus one, or the columns of ``y``.
            transform: Without it bytes are scaled to [0, 1].
            metric: Without it accuracy; of labels in columns micro-F1, or precision at 1 where they
                are sparse.
            name: For reports.

        Raises:
            DataError: data that cannot be trained on.
            ConfigError: settings that cannot be used.
        """
        given = {"train": train, "val": val, "test": test}
        if isinstance(data, SampleData):
            settings = {
                **given,
                "fractions": None if fractions == (0.8, 0.1, 0.1) else fractions,
                "seed": seed or None,
                "num_classes": num_classes,
                "transform": transform,
                "metric": metric,
                "name": None if name == "data" else name,
            }
            if named := [key for key, value in settings.items() if value is not None]:
                raise ConfigError(
                    "these data have their settings already",
                    got=f"a SampleData with {', '.join(named)}",
                    expected="a SampleData alone, or a pair (x, y) with settings",
                    remedy="dataclasses.replace(data, ...) changes some of them",
                )
            return data
        if not isinstance(data, tuple | list) or len(data) != 2:
            raise DataError(
                "this holds no samples and labels",
                got=type(data).__name__,
                expected="a SampleData, or a pair (x, y) of tensors or arrays",
                remedy="a torch DataLoader goes into LoaderData(train=..., val=..., test=...)",
            )
        x = as_sample_tensor(data[0])
        y = as_label_tensor(data[1])
        if num_classes is None:
            num_classes = y.size(1) if y.dim() == 2 else max(int(y.max()) + 1, 2)
        if transform is None and is_bytes(x):
            transform = ImageTransform() if x.dim() == 4 else Scale(std=255.0)
        if metric is None:
            metric = "precision@1" if is_csr(y) else "micro_f1" if y.dim() == 2 else "accuracy"
        return cls(
            x=x,
            y=y.to(x.device),
            **as_splits(given, x.size(0), fractions, seed, x.device),
            num_classes=num_classes,
            transform=transform,
            metric=metric,
            name=name,
        )

    @staticmethod
    def _rows(tensor: Tensor, index: Tensor) -> Tensor:
        return take_rows(tensor, index.to(tensor.device))

    def _check_samples(self) -> None:
        x = self.x
        for name in ("x", "y", *SPLITS):
            value = getattr(self, name)
            if not isinstance(value, Tensor):
                raise DataError(
                    f"{name} must be a tensor",
                    got=type(value).__name__,
                    remedy="SampleData.of takes arrays and lists",
                )
            if value.device != x.device:
                raise DataError(
                    f"{name} is not on the device of x", got=value.device, expected=x.device
                )
        if x.dim() < 2 or not x.shape.numel() or not (x.is_floating_point() or is_bytes(x)):
            raise DataError(
                "x must hold one row of features, or one image, per sample",
                got=f"{x.dtype} of shape {tuple(x.shape)}",
                expected="floats or uint8 of shape [N, ...], no dim of which is 0",
                remedy="reshape a single feature with x[:, None]" if x.dim() == 1 else "x.float()",
            )
        if x.layout != torch.strided and not is_csr(x):
            raise DataError(
                "x must be dense, or sparse with compressed rows",
                got=x.layout,
                expected="torch.strided or torch.sparse_csr",
                remedy="x.to_sparse_csr()",
            )
        if is_csr(x):
            _check_csr("x", x)
        if x.is_floating_point() and x.dtype != torch.float64:
            object.__setattr__(self, "x", x.detach().float())
        check_finite("samples", self.x)

    def _check_splits(self) -> None:
        taken = torch.zeros(self.num_samples, dtype=torch.bool, device=self.x.device)
        for split in SPLITS:
            numbers = self.split(split)
            if numbers.dtype != torch.int64 or numbers.dim() != 1:
                raise DataError(
                    f"the {split} split must be sample numbers",
                    got=f"{numbers.dtype} of shape {tuple(numbers.shape)}",
                    expected="torch.int64 of shape [n]",
                    remedy="SampleData.of takes masks",
                )
            if not len(numbers):
                raise DataError(
                    f"the {split} split is empty", got="0 samples", expected="at least 1 sample"
                )
            low, high = int(numbers.min()), int(numbers.max())
            if low < 0 or high >= self.num_samples:
                raise DataError(
                    f"the {split} split names samples that do not exist",
                    got=f"numbers between {low} and {high}",
                    expected=f"0 to {self.num_samples - 1}",
                )
            own = torch.zeros_like(taken)
            own[numbers] = True
            if int(own.sum()) != len(numbers):
                raise DataError(
                    f"the {split} split names a sample more than once",
                    got=f"{len(numbers)} numbers of {int(own.sum())} different samples",
                    expected="each sample once",
                )
            if bool((own & taken).any()):
                raise DataError(
                    f"the {split} split shares samples with an earlier split: labels would leak",
                    got=which(own & taken),
                    expected="train, val and test without a common sample",
                )
            taken |= own

    def _check_labels(self) -> None:
        y, least = self.y, 2 if self.y.dim() == 1 else 1
        if not isinstance(self.num_classes, int) or self.num_classes < least:
            raise DataError(
                f"num_classes does not fit labels of shape {tuple(y.shape)}",
                got=repr(self.num_classes),
                expected=f"a whole number of at least {least}",
            )
        classes = y.dim() == 1 and y.dtype == torch.int64
        columns = y.dim() == 2 and y.is_floating_point() and y.size(1) == self.num_classes
        if not (classes or columns) or (y.layout != torch.strided and not is_csr(y)):
            raise DataError(
                "labels have a form that cannot be trained on",
                got=f"{y.dtype} of shape {tuple(y.shape)}, {y.layout}",
                expected=f"int64 [N], or float 0/1 [N, {self.num_classes}], dense or sparse CSR",
                remedy="SampleData.of takes other numbers",
            )
        if y.size(0) != self.num_samples:
            raise DataError(
                "y and x disagree on the number of samples",
                got=y.size(0),
                expected=f"{self.num_samples}, as in x",
            )
        if is_csr(y):
            _check_csr("y", y)
            _check_label_entries(y)
            return
        used = torch.zeros(self.num_samples, dtype=torch.bool, device=y.device)
        for split in SPLITS:
            used[self.split(split)] = True
        wrong = (y < 0) | (y >= self.num_classes) if classes else (y != 0) & (y != 1)
        bad = wrong.reshape(len(y), -1).any(1) & used
        if bool(bad.any()):
            value = y[bad][wrong[bad]][0].item()
            raise DataError(
                "labels out of range",
                got=f"{value:g} and others at {which(bad)}",
                expected=f"0 to {self.num_classes - 1}" if classes else "0 or 1",
                remedy="renumber the classes from 0, or correct num_classes" if classes else None,
            )

    def _check_metric(self) -> None:
        check_metric(self.metric, self.y)
        for split in ("val", "test"):
            if not is_defined(self.metric, self.labels(self.split(split))):
                raise DataError(
                    f"ROC-AUC is undefined on the {split} split: no class has both labels there",
                    got=f"{len(self.split(split)):,} samples",
                    expected="at least one class with positive and negative samples",
                    remedy="use a larger or stratified split, or another metric",
                )

    def _check_transform(self) -> None:
        if self.transform is None:
            if is_bytes(self.x):
                raise DataError(
                    "samples of bytes need a transform that makes numbers of them",
                    got="x of torch.uint8, transform=None",
                    remedy="transform=ImageTransform(mean=..., std=...), or x.float()",
                )
            return
        some = self.train[:2]
        for training in (True, False):
            try:
                out: Any = self.inputs(some, training=training, generator=stream("example"))
            except Exception as error:  # a transform of the user's may raise anything
                raise DataError(
                    "the transform cannot be applied to the samples",
                    got=f"{type(error).__name__}: {error}".splitlines()[0],
                    expected=f"a callable that takes {self.x.dtype} of shape "
                    f"{('n', *self.x.shape[1:])}, training and generator",
                ) from error
            fits = isinstance(out, Tensor) and out.is_floating_point() and len(out) == len(some)
            if not fits:
                got = f"{out.dtype} of {tuple(out.shape)}" if isinstance(out, Tensor) else type(out)
                raise DataError(
                    "the transform must give floats, one row for each sample",
                    got=got,
                    expected=f"floats of shape ({len(some)}, ...)",
                )
            check_finite("samples as the transform makes them", out)


def _check_csr(name: str, matrix: Tensor) -> None:
    if matrix.dim() != 2:
        raise DataError(f"the sparse {name} must be one matrix", got=f"{matrix.dim()} dims")
    indptr, columns, _ = parts(matrix)
    rising = bool((indptr.diff() >= 0).all())
    ends = rising and int(indptr[0]) == 0 and int(indptr[-1]) == len(columns)
    inside = not len(columns) or (int(columns.min()) >= 0 and int(columns.max()) < matrix.size(1))
    if not ends or not inside:
        raise DataError(
            f"the sparse {name} is damaged",
            got="columns out of range" if ends else "row ends that do not rise to the entries",
            expected=f"a sound CSR matrix of shape {tuple(matrix.shape)}",
        )


def _check_label_entries(y: Tensor) -> None:
    _, columns, values = parts(y)
    if not bool((values == 1).all()):
        raise DataError(
            "every stored entry of sparse labels must be a one",
            got=f"{values[values != 1][0].item():g}",
            remedy="matrix.eliminate_zeros() of scipy, and ones for the rest",
        )
    keys = (row_numbers(y) * y.size(1) + columns).sort().values
    repeated = int((keys.diff() == 0).sum())
    if repeated:
        raise DataError(
            "sparse labels name a label of a sample more than once",
            got=f"{repeated:,} entries too many",
            remedy="matrix.sum_duplicates() of scipy, and ones again",
        )
