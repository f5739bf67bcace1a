"""Torch ``DataLoader`` objects as batches for subnet training.

Shape legend: ``m`` subnets, ζ local steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from gist.errors import ConfigError
from gist.samples.batches import SampleBatch, SampleSource
from gist.samples.loaders import Loader, check_batch, deals_anew, fetched, first_batch, kind_of
from gist.samples.passes import Passes
from gist.samples.series import SeriesSource


def loader_source(
    loader: Loader,
    device: torch.device,
    *,
    local_steps: int,
    num_subnets: int,
    num_classes: int,
    shards: bool = False,
    steps_per_epoch: int | None = None,
) -> SampleSource:
    """Batches from a loader: its samples dealt anew where that can be, else in its own order.

    Args:
        loader: Gives pairs ``(x, y)``.
        device: Where batches are wanted.
        local_steps: ζ of the run.
        num_subnets: ``m``, the most of the run.
        num_classes: See :func:`~gist.samples.loaders.check_batch`.
        shards: Each subnet sees samples of its own.
        steps_per_epoch: Batches of one pass over a loader that cannot tell.

    Raises:
        ConfigError: a loader that cannot be used so, or no length.
        DataError: an empty loader, or items that are no pairs.
    """
    if deals_anew(loader):
        if steps_per_epoch is not None:
            raise ConfigError(
                "this loader knows how many batches make one pass",
                got=f"steps_per_epoch={steps_per_epoch}",
                expected=f"{kind_of(loader)}, in batches of {loader.batch_size}",
                remedy="leave it out",
            )
        return DealtSource(
            loader,
            device,
            local_steps=local_steps,
            num_classes=num_classes,
            shards=num_subnets if shards else None,
        )
    if shards:
        raise ConfigError(
            "only a map-style loader with its own sampler can be dealt into shards",
            got=kind_of(loader),
            remedy="shards=False, or a DataLoader(dataset, batch_size=...) whose dataset has len",
        )
    return SeriesSource(
        loader,
        device,
        local_steps=local_steps,
        num_subnets=num_subnets,
        num_classes=num_classes,
        steps_per_epoch=steps_per_epoch,
    )


class DealtSource(SampleSource):
    """Batches of a map-style ``DataLoader``, dealt by :class:`~gist.samples.passes.Passes`.

    Dataset, batch size, ``collate_fn`` and workers are the loader's; training samples are shuffled
    whether or not it does, and batches are full, ``drop_last`` or not. Workers start anew for every
    subnet and round. What the dataset or ``collate_fn`` draw from torch's, numpy's or Python's
    global random states depends on (seed, round, subnet, step) alone, not on the number of workers,
    and nothing else sees it.

    Args:
        loader: For which :func:`deals_anew` holds.
        device: Where batches are wanted.
        local_steps: ζ of the run.
        num_classes: See :func:`~gist.samples.loaders.check_batch`.
        shards: See :class:`~gist.samples.passes.Passes`.

    Raises:
        ConfigError: more shards than samples.
        DataError: no samples, or items that are no pairs.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        device: torch.device,
        *,
        local_steps: int,
        num_classes: int,
        shards: int | None = None,
    ) -> None:
        self.loader, self.device, self.num_classes = loader, device, num_classes
        first_batch(loader)
        samples = torch.arange(len(loader.dataset))  # type: ignore[arg-type]
        assert loader.batch_size is not None
        self.passes = Passes(samples, loader.batch_size, local_steps=local_steps, shards=shards)

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
        pairs = fetched(self.loader, indices, "loader", seed, round, subnet)
        for step, (x, y) in enumerate(pairs):
            batch = f"batch {step} of subnet {subnet} in round {round}"
            check_batch(x, y, self.num_classes, batch)
            yield SampleBatch(x=x.to(self.device), y=y.to(self.device))

    def describe(self) -> dict[str, Any]:
        """See :meth:`SampleSource.describe`."""
        return {"name": "DealtSource", **self.passes.describe()}
