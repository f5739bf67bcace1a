"""Torch ``DataLoader``s as batches for subnet training.

Shape legend: ``B`` samples of a batch, ``L`` labels, ``m`` subnets, ζ local steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import suppress
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from gist.csr import is_csr
from gist.errors import ConfigError, DataError
from gist.partition.streams import stream_seed
from gist.random_states import RandomStates
from gist.samples.batches import SampleBatch, SampleSource
from gist.samples.passes import Passes

Loader = Iterable[Any]
"""A torch ``DataLoader``, or anything that gives pairs ``(x, y)`` whenever it is iterated over."""


def loader_source(
    loader: Loader,
    device: torch.device,
    *,
    local_steps: int,
    num_subnets: int,
    shards: bool = False,
    steps_per_epoch: int | None = None,
) -> SampleSource:
    """Batches from a loader: its samples dealt anew where that can be, else in its own order.

    Args:
        loader: Gives pairs ``(x, y)``.
        device: Where batches are wanted.
        local_steps: ζ of the run.
        num_subnets: ``m``, the most of the run.
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
                expected=f"{_kind(loader)}, in batches of {loader.batch_size}",
                remedy="leave it out",
            )
        return DealtSource(
            loader, device, local_steps=local_steps, shards=num_subnets if shards else None
        )
    if shards:
        raise ConfigError(
            "only a map-style loader with its own sampler can be dealt into shards",
            got=_kind(loader),
            remedy="shards=False, or a DataLoader(dataset, batch_size=...) whose dataset has len",
        )
    return SeriesSource(
        loader,
        device,
        local_steps=local_steps,
        num_subnets=num_subnets,
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
        shards: int | None = None,
    ) -> None:
        self.loader, self.device = loader, device
        first_batch(loader)
        samples = torch.arange(len(loader.dataset))  # type: ignore[arg-type]
        assert loader.batch_size is not None
        self.passes = Passes(samples, loader.batch_size, local_steps=local_steps, shards=shards)

    @property
    def steps_per_epoch(self) -> int:
        """See :attr:`~gist.samples.passes.Passes.steps_per_epoch`."""
        return self.passes.steps_per_epoch

    def batches(self, *, seed: int, round: int, subnet: int, steps: int) -> Iterator[SampleBatch]:
        """See :meth:`SampleSource.batches`."""
        indices = self.passes.batches(seed=seed, round=round, subnet=subnet, steps=steps)
        for x, y in fetched(self.loader, indices, "loader", seed, round, subnet):
            yield SampleBatch(x=x.to(self.device), y=y.to(self.device))

    def describe(self) -> dict[str, Any]:
        """See :meth:`SampleSource.describe`."""
        return {"name": "DealtSource", **self.passes.describe()}


class SeriesSource(SampleSource):
    """Batches of a loader in its own order, as an endless series of passes.

    Step ``k`` of subnet ``i`` in a round is batch ``(round * m + i) * ζ + k`` of the series: no two
    subnets see the same one. The passes have random states of their own, named by (seed, pass,
    batch): torch's, numpy's and Python's global ones, and the loader's ``generator``. A loader that
    draws from others, or whose worker processes do, gives runs that cannot be repeated.

    One pass is kept open: batches ahead in it are iterated up to, those behind from its start.

    Args:
        loader: Gives ``steps_per_epoch`` or more pairs whenever it is iterated over.
        device: Where batches are wanted.
        local_steps: ζ of the run.
        num_subnets: ``m``, the most of the run.
        steps_per_epoch: Batches of one pass; those that the loader has beyond are not seen. None
            for its ``len``.

    Raises:
        ConfigError: no length, or a loader that can be iterated over once.
        DataError: an empty loader, or items that are no pairs.
    """

    def __init__(
        self,
        loader: Loader,
        device: torch.device,
        *,
        local_steps: int,
        num_subnets: int,
        steps_per_epoch: int | None = None,
    ) -> None:
        self.loader, self.device = loader, device
        self.local_steps, self.num_subnets = local_steps, num_subnets
        first_batch(loader)
        length = steps_per_epoch or length_of(loader)
        if length is None:
            raise ConfigError(
                "how many batches make one pass of the loader is not known",
                got=f"{_kind(loader)} without len",
                remedy="give steps_per_epoch=...",
            )
        self._length = length
        self._open: tuple[int, int] | None = None
        self._place = 0
        self._items: Iterator[Any] = iter(())

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one pass over the loader."""
        return self._length

    def batches(self, *, seed: int, round: int, subnet: int, steps: int) -> Iterator[SampleBatch]:
        """See :meth:`SampleSource.batches`."""
        first = (round * self.num_subnets + subnet) * self.local_steps
        for position in range(first, first + steps):
            x, y = as_pair(self._at(seed, *divmod(position, self._length)))
            yield SampleBatch(x=x.to(self.device), y=y.to(self.device))

    def describe(self) -> dict[str, Any]:
        """See :meth:`SampleSource.describe`."""
        return {"name": "SeriesSource", "steps_per_epoch": self.steps_per_epoch}

    def _at(self, seed: int, number: int, place: int) -> Any:
        """Item ``place`` of pass ``number``."""
        key = ("series", seed, number)
        if self._open != (seed, number) or place < self._place:
            self._items, self._place = iter(()), 0  # ends the workers of the last one
            self._items = opened(self.loader, *key)
            self._open = (seed, number)
        while True:
            with RandomStates(stream_seed(*key, self._place)):
                item = next(self._items, _END)
            if item is _END:
                self._open = None
                raise DataError(
                    "the loader ended before its pass was over",
                    got=f"{self._place} batches",
                    expected=f"{self._length}",
                    remedy="correct its len, or steps_per_epoch",
                )
            self._place += 1
            if self._place > place:
                return item


_END = object()


def deals_anew(loader: Loader) -> TypeGuard[DataLoader[Any]]:
    """Whether a loader takes every sample of a dataset once, in order or shuffled, in batches.

    Such a one can be dealt anew: its sampler says nothing else.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return False
    if type(loader).__iter__ is not DataLoader.__iter__ or loader.batch_size is None:
        return False
    if type(loader.batch_sampler) is not BatchSampler:
        return False
    sampler = loader.sampler
    if isinstance(sampler, RandomSampler):
        whole = sampler.num_samples == len(loader.dataset)  # type: ignore[arg-type]
        return type(sampler) is RandomSampler and whole and not sampler.replacement
    return type(sampler) is SequentialSampler


def fetched(
    loader: DataLoader[Any], indices: Iterable[Tensor], *key: int | str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of the given samples of a loader's dataset, collated and made as the loader does.

    Args:
        loader: For which :func:`deals_anew` holds.
        indices: Sample numbers of every batch.
        *key: With the number of the batch, names the random states in which it is made.
    """
    steps = [(stream_seed(*key, k), index.tolist()) for k, index in enumerate(indices)]
    assert loader.collate_fn is not None
    own: DataLoader[Any] = DataLoader(
        _Steps(loader.dataset, loader.collate_fn),
        batch_size=None,
        sampler=steps,
        num_workers=loader.num_workers,
        collate_fn=_as_is,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=torch.Generator().manual_seed(stream_seed(*key)),
        prefetch_factor=loader.prefetch_factor,
    )
    yield from map(as_pair, own)


class _Steps(Dataset[Any]):
    """Collated batches of a dataset, each made in random states of its own."""

    def __init__(self, dataset: Dataset[Any], collate: Callable[[list[Any]], Any]) -> None:
        self.dataset, self.collate = dataset, collate

    def __getitem__(self, step: tuple[int, list[int]]) -> Any:
        seed, index = step
        with RandomStates(seed):
            together = getattr(self.dataset, "__getitems__", None)
            return self.collate(together(index) if together else [self.dataset[i] for i in index])


def _as_is(item: Any) -> Any:
    return item


def opened(loader: Loader, *key: int | str) -> Iterator[Any]:
    """One pass of a loader, begun in random states that the key names."""
    if isinstance(generator := getattr(loader, "generator", None), torch.Generator):
        generator.manual_seed(stream_seed(*key))
    with RandomStates(stream_seed(*key)):
        return iter(loader)


def passed(loader: Loader, *key: int | str) -> Iterator[tuple[Tensor, Tensor]]:
    """All pairs of one pass of a loader, in its order, in random states that the key names."""
    items, place = opened(loader, *key), 0
    while True:
        with RandomStates(stream_seed(*key, place)):
            item = next(items, _END)
        if item is _END:
            return
        yield as_pair(item)
        place += 1


def first_batch(loader: Loader) -> tuple[Tensor, Tensor]:
    """A first pair of a loader: always the same one, if it can be.

    Raises:
        ConfigError: no loader, one that can be iterated over once, or with a sampler that deals
            over workers.
        DataError: it is empty, or its items are no pairs.
    """
    if not isinstance(loader, Iterable) or isinstance(loader, Iterator | Tensor):
        raise ConfigError(
            "a loader must be something that can be iterated over again and again",
            got=_kind(loader),
            expected="such as a torch DataLoader",
        )
    if isinstance(getattr(loader, "sampler", None), DistributedSampler):
        raise ConfigError(
            "subnets are dealt to workers, and every subnet has batches of its own",
            got="DistributedSampler",
            remedy="leave the sampler out",
        )
    if deals_anew(loader):
        size = min(len(loader.dataset), loader.batch_size or 1)  # type: ignore[arg-type]
        pairs = fetched(loader, [torch.arange(size)] if size else [], "first batch")
    else:
        pairs = passed(loader, "first batch")
    for pair in pairs:
        return pair
    raise DataError("the loader is empty", got=_kind(loader), expected="at least one batch")


def as_pair(item: Any) -> tuple[Tensor, Tensor]:
    """Input and labels: ``[B, ...]``, and ``[B]`` int64 or ``[B, L]`` float.

    Raises:
        DataError: the item is no such pair.
    """
    if isinstance(item, tuple | list) and len(item) == 2:
        x, y = item
        if isinstance(x, Tensor) and isinstance(y, Tensor) and x.dim() and len(x) == len(y):
            if y.dim() == 1 and not (y.is_floating_point() or y.is_complex()):
                return x, y.long()
            if y.dim() == 2 and not y.is_complex():
                return x, y if is_csr(y) else y.float()
    raise DataError(
        "a loader must give pairs of inputs and labels",
        got=_shown(item),
        expected="(x [B, ...], y [B] of whole numbers or [B, L] of 0 and 1)",
        remedy="a collate_fn that makes such pairs",
    )


def length_of(loader: Loader) -> int | None:
    """Batches of one pass, if the loader knows."""
    if isinstance(loader, Sized):
        with suppress(TypeError):  # a DataLoader whose data have no length
            return len(loader)
    return None


def _kind(loader: Any) -> str:
    dataset = getattr(loader, "dataset", None)
    return type(loader).__name__ + (f" of {type(dataset).__name__}" if dataset is not None else "")


def _shown(item: Any) -> str:
    if isinstance(item, Tensor):
        return f"{item.dtype} {tuple(item.shape)}"
    if isinstance(item, tuple | list):
        return f"{type(item).__name__} of {', '.join(map(_shown, item[:4]))}"
    return type(item).__name__
