"""A loader in its own order, as an endless series of batches for the subnets.

Shape legend: ``m`` subnets, ζ local steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any
from weakref import WeakSet

import torch
from torch.utils.data import BatchSampler

from gist.errors import ConfigError, DataError
from gist.samples.batches import SampleBatch, SampleSource
from gist.samples.loaders import (
    Loader,
    LoaderPass,
    as_pair,
    check_batch,
    first_batch,
    kind_of,
    length_of,
)


class SeriesSource(SampleSource):
    """Batches of a loader in its own order, as an endless series of passes.

    Step ``k`` of subnet ``i`` in a round is batch ``(round * m + i) * ζ + k`` of the series: no two
    subnets see the same one. Every pass is a :class:`~gist.samples.loaders.LoaderPass`, named by
    (seed, pass).

    One pass is kept open. Batches that it goes past are kept where batches asked for are yet to be
    taken, and what was asked for last is kept for those that ask for it again: at most ``m * ζ``,
    or as many as are asked for at once. Where a round is taken in any order, and after those before
    it, nothing is drawn twice; any other batch is iterated up to from the start of its pass.

    Args:
        loader: Gives ``steps_per_epoch`` or more pairs whenever it is iterated over.
        device: Where batches are wanted.
        local_steps: ζ of the run.
        num_subnets: ``m``, the most of the run.
        num_classes: See :func:`~gist.samples.loaders.check_batch`.
        steps_per_epoch: Batches of one pass; those that the loader has beyond are not seen. None
            for its ``len``.

    Raises:
        ConfigError: no length, persistent workers, or a loader that can be iterated over once.
        DataError: an empty loader, or items that are no pairs.
    """

    def __init__(
        self,
        loader: Loader,
        device: torch.device,
        *,
        local_steps: int,
        num_subnets: int,
        num_classes: int,
        steps_per_epoch: int | None = None,
    ) -> None:
        self.loader, self.device, self.num_classes = loader, device, num_classes
        self.local_steps, self.num_subnets = local_steps, num_subnets
        if getattr(loader, "persistent_workers", False):
            raise ConfigError(
                "a loader with persistent workers restarts its open pass when it is evaluated on",
                got=f"persistent_workers=True, {kind_of(loader)}",
                expected="a loader whose passes do not share workers",
                remedy="persistent_workers=False: a pass over all batches starts them once",
            )
        first = len(first_batch(loader)[1])
        length = steps_per_epoch or length_of(loader)
        if length is None:
            raise ConfigError(
                "how many batches make one pass of the loader is not known",
                got=f"{kind_of(loader)} without len",
                remedy="give steps_per_epoch=...",
            )
        self._length = length
        self._smallest = min(first, _last_batch(loader, length) or first)
        self._pass: LoaderPass | None = None
        self._reached = (0, 0)  # seed, position of the next batch of the open pass
        self._again = (0, range(0))  # seed, positions asked for last
        self._readers: WeakSet[_Reader] = WeakSet()
        self._kept: dict[tuple[int, int], Any] = {}  # by seed and position

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one pass over the loader."""
        return self._length

    @property
    def smallest_batch(self) -> int:
        """Samples of the first batch or, where a ``DataLoader`` tells, of the last."""
        return self._smallest

    def batches(self, *, seed: int, round: int, subnet: int, steps: int) -> Iterator[SampleBatch]:
        """See :meth:`SampleSource.batches`."""
        first = (round * self.num_subnets + subnet) * self.local_steps
        before, again = self._again
        stop = again.stop if before == seed and first in again else first
        self._again = (seed, range(first, max(first + steps, stop)))
        reader = _Reader(self, seed, range(first, first + steps))
        self._readers.add(reader)
        self._kept = {at: item for at, item in self._kept.items() if self._is_wanted(*at)}
        return reader

    def describe(self) -> dict[str, Any]:
        """See :meth:`SampleSource.describe`."""
        return {"name": "SeriesSource", "steps_per_epoch": self.steps_per_epoch}

    def take(self, seed: int, position: int) -> SampleBatch:
        """Batch ``position`` of the series."""
        at = (seed, position)
        if at not in self._kept:
            self._go_to(seed, position)
        again = self._is_wanted(*at)
        x, y = as_pair(self._kept[at] if again else self._kept.pop(at))
        number, place = divmod(position, self._length)
        check_batch(x, y, self.num_classes, f"batch {place} of pass {number} of the train loader")
        # What is kept must outlive models that change their input in place.
        return SampleBatch(x=x.to(self.device, copy=again), y=y.to(self.device, copy=again))

    def _is_wanted(self, seed: int, position: int) -> bool:
        of, again = self._again
        if of == seed and position in again:
            return True
        return any(r.seed == seed and position in r.rest for r in self._readers)

    def _go_to(self, seed: int, position: int) -> None:
        """Keeps a batch, and all that are wanted on the way there."""
        of, reached = self._reached
        ahead = of == seed and reached <= position
        for at in range(reached if ahead else position, position + 1):
            if at == position or self._is_wanted(seed, at):
                self._kept[seed, at] = self._drawn(seed, at)
                self._reached = (seed, at + 1)

    def _drawn(self, seed: int, position: int) -> Any:
        number, place = divmod(position, self._length)
        key = ("series", seed, number)
        if self._pass is None or self._pass.key != key or place < self._pass.place:
            self._pass = None  # ends the workers of the last one
            self._pass = LoaderPass(self.loader, *key)
        for item in self._pass:
            if self._pass.place > place:
                return item
        ended, self._pass = self._pass.place, None
        raise DataError(
            "the loader ended before its pass was over",
            got=f"{ended} batches",
            expected=f"{self._length}",
            remedy="correct its len, or steps_per_epoch",
        )


def _last_batch(loader: Loader, length: int) -> int:
    """Samples that a ``DataLoader`` is left with for the last of ``length`` batches, if any."""
    batches = getattr(loader, "batch_sampler", None)
    if type(batches) is not BatchSampler or not isinstance(batches.sampler, Sized):
        return 0
    complete, rest = divmod(len(batches.sampler), batches.batch_size)
    return rest if complete < length and not batches.drop_last else 0


class _Reader(Iterator[SampleBatch]):
    """Takes the batches at some positions of a series, and says which are yet to be taken."""

    def __init__(self, source: SeriesSource, seed: int, positions: range) -> None:
        self.source, self.seed, self.rest = source, seed, positions

    def __next__(self) -> SampleBatch:
        if not self.rest:
            raise StopIteration
        position, self.rest = self.rest[0], self.rest[1:]
        return self.source.take(self.seed, position)
