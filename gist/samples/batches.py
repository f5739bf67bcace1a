"""What a training step sees of independent samples, and where it comes from.

Shape legend: ``B`` samples of a batch, ``S`` output columns that the loss is taken over.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gist.partition.streams import stream
from gist.samples.data import SampleData
from gist.samples.passes import Passes


@dataclass(frozen=True, kw_only=True, eq=False)
class SampleBatch:
    """One training step's samples.

    Attributes:
        x: ``[B, ...]`` the model's input: dense, or sparse CSR ``[B, F]``.
        y: Labels: ``[B]`` int64, ``[B, C]`` float, or that as sparse CSR.
        outputs: ``[S]`` int64, the only output columns that the loss is taken over, as which
            ``y`` counts them; None for all.
        correction: ``[S]``, what is added to the scores of these columns in the loss; see
            :class:`~gist.samples.sampled_outputs.SampledOutputs`.
    """

    x: Tensor
    y: Tensor
    outputs: Tensor | None = None
    correction: Tensor | None = None


class SampleSource(ABC):
    """Where a run's batches come from."""

    @property
    @abstractmethod
    def steps_per_epoch(self) -> int:
        """Batches that make one pass over the training samples."""

    @property
    @abstractmethod
    def smallest_batch(self) -> int:
        """Samples of the smallest batch, as far as it is known."""

    @abstractmethod
    def batches(self, *, seed: int, round: int, subnet: int, steps: int) -> Iterator[SampleBatch]:
        """``steps`` batches; a function of the arguments alone, on every machine."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Name and settings as JSON values: a run is resumed on the same ones."""


class TensorSource(SampleSource):
    """Batches of samples that are in memory; see :class:`~gist.samples.passes.Passes`.

    Augmentation draws from a stream of (seed, round, subnet, step).

    Args:
        data: The samples.
        batch_size: Samples of a batch.
        shards: Parts that the training samples are dealt into, or None.
        local_steps: ζ of the run.
        parts: Instead of shards, positions among the training samples of every client's.

    Raises:
        ConfigError: more shards than samples.
        DataError: a client without samples, or positions out of range.
    """

    def __init__(
        self,
        data: SampleData,
        batch_size: int,
        *,
        shards: int | None,
        local_steps: int,
        parts: Sequence[Tensor] | None = None,
    ) -> None:
        self.data = data
        self.passes = Passes(
            data.train, batch_size, local_steps=local_steps, shards=shards, parts=parts
        )

    @property
    def steps_per_epoch(self) -> int:
        """See :attr:`~gist.samples.passes.Passes.steps_per_epoch`."""
        return self.passes.steps_per_epoch

    @property
    def smallest_batch(self) -> int:
        """See :attr:`~gist.samples.passes.Passes.smallest_batch`."""
        return self.passes.smallest_batch

    def batches(self, *, seed: int, round: int, subnet: int, steps: int) -> Iterator[SampleBatch]:
        """See :meth:`SampleSource.batches`."""
        indices = self.passes.batches(seed=seed, round=round, subnet=subnet, steps=steps)
        for step, index in enumerate(indices):
            drawn = stream("augment", seed, round, subnet, step)
            x = self.data.inputs(index, training=True, generator=drawn)
            yield SampleBatch(x=x, y=self.data.labels(index))

    def describe(self) -> dict[str, Any]:
        """See :meth:`SampleSource.describe`."""
        return {"name": "TensorSource", **self.passes.describe()}
