"""Pairs of inputs and labels from torch ``DataLoader`` objects.

Shape legend: ``B`` samples of a batch, ``C`` output columns, ``L`` labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager, suppress
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

from gist.csr import is_csr, parts
from gist.errors import ConfigError, DataError
from gist.partition.streams import stream_seed
from gist.random_states import RandomStates
from gist.samples.convert import check_finite

Loader = Iterable[Any]
"""A torch ``DataLoader``, or anything that gives pairs ``(x, y)`` whenever it is iterated over."""

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


class LoaderPass(Iterator[Any]):
    """One pass of a loader, in random states that belong to it alone.

    These are torch's, numpy's and Python's global ones, anew for every item, and the generators of
    the loader and its samplers. A loader that draws from others, or whose worker processes do,
    gives passes that cannot be repeated.

    Args:
        loader: What is iterated over.
        *key: Names the random states.

    Attributes:
        key: As given.
        place: Items that were taken.
    """

    def __init__(self, loader: Loader, *key: int | str) -> None:
        self.key, self.place = key, 0
        self._states = {
            generator: torch.Generator(generator.device)
            .manual_seed(stream_seed(*key, "generator", i))
            .get_state()
            for i, generator in enumerate(_generators(loader))
        }
        with self._own_states(*key):
            self._items = iter(loader)

    def __next__(self) -> Any:
        with self._own_states(*self.key, self.place):
            item = next(self._items, _END)
        if item is _END:
            raise StopIteration
        self.place += 1
        return item

    @contextmanager
    def _own_states(self, *key: int | str) -> Iterator[None]:
        outer = {generator: generator.get_state() for generator in self._states}
        with RandomStates(stream_seed(*key)):
            for generator, state in self._states.items():
                generator.set_state(state)
            try:
                yield
            finally:
                for generator, state in outer.items():
                    self._states[generator] = generator.get_state()
                    generator.set_state(state)


def _generators(loader: Loader) -> list[torch.Generator]:
    """Those that a loader and its samplers draw from, each once."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    inner = getattr(batch_sampler, "sampler", None)
    owners = (loader, getattr(loader, "sampler", None), batch_sampler, inner)
    found = (getattr(owner, "generator", None) for owner in owners)
    return list(dict.fromkeys(g for g in found if isinstance(g, torch.Generator)))


def passed(loader: Loader, *key: int | str) -> Iterator[tuple[Tensor, Tensor]]:
    """All pairs of one :class:`LoaderPass`, in the loader's order."""
    return map(as_pair, LoaderPass(loader, *key))


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
            got=kind_of(loader),
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
    raise DataError("the loader is empty", got=kind_of(loader), expected="at least one batch")


def as_pair(item: Any) -> tuple[Tensor, Tensor]:
    """Input and labels: ``[B, ...]``, and ``[B]`` int64 or ``[B, L]`` float; ``B`` > 0.

    One column of whole numbers is ``[B]``.

    Raises:
        DataError: the item is no such pair.
    """
    if isinstance(item, tuple | list) and len(item) == 2:
        x, y = item
        if isinstance(x, Tensor) and isinstance(y, Tensor) and x.dim() and len(x) == len(y) > 0:
            numbers = not (y.is_floating_point() or y.is_complex() or is_csr(y))
            if numbers and y.shape[1:] in ((), (1,)):
                return x, y.reshape(-1).long()
            if y.dim() == 2 and not y.is_complex():
                return x, y if is_csr(y) else y.float()
    raise DataError(
        "a loader must give pairs of inputs and labels",
        got=_shown(item),
        expected="(x [B, ...], y [B] of whole numbers or [B, L] of 0 and 1)",
        remedy="a collate_fn that makes such pairs",
    )


def check_batch(x: Tensor, y: Tensor, num_classes: int, batch: str) -> None:
    """Refuses inputs that are not finite, and labels as :func:`check_labels` does.

    Args:
        x: As :func:`as_pair` gives them.
        y: Likewise.
        num_classes: ``C``.
        batch: Names the batch.

    Raises:
        DataError: see above.
    """
    check_finite(f"samples of {batch}", x)
    check_labels(y, num_classes, batch)


def check_labels(y: Tensor, num_classes: int, batch: str) -> None:
    """Refuses labels of a batch that a model with ``num_classes`` outputs cannot be scored by.

    Args:
        y: As :func:`as_pair` gives them.
        num_classes: ``C``.
        batch: Names it.

    Raises:
        DataError: class numbers out of range, other than ``C`` columns, or other labels than 0
            and 1.
    """
    if y.dim() == 1:
        low, high = int(y.min()), int(y.max())
        if low < 0 or high >= num_classes:
            raise DataError(
                f"labels of {batch} do not fit num_classes",
                got=f"class numbers {low} to {high}",
                expected=f"num_classes={num_classes}: 0 to {num_classes - 1}",
            )
        return
    if y.size(1) != num_classes:
        raise DataError(
            f"labels of {batch} do not fit num_classes",
            got=f"{y.size(1)} columns",
            expected=f"num_classes={num_classes}",
        )
    values = parts(y)[2] if is_csr(y) else y
    wrong = values != 1 if is_csr(y) else (values != 0) & (values != 1)
    if bool(wrong.any()):
        raise DataError(
            f"labels of {batch} are out of range",
            got=f"{values[wrong][0].item():g}",
            expected="1 in every stored entry" if is_csr(y) else "0 or 1",
        )


def length_of(loader: Loader) -> int | None:
    """Batches of one pass, if the loader knows."""
    if isinstance(loader, Sized):
        with suppress(TypeError):  # a DataLoader whose data have no length
            return len(loader)
    return None


def kind_of(loader: Any) -> str:
    """Names the type of a loader, and of its dataset, for errors."""
    dataset = getattr(loader, "dataset", None)
    return type(loader).__name__ + (f" of {type(dataset).__name__}" if dataset is not None else "")


def _shown(item: Any) -> str:
    if isinstance(item, Tensor):
        return f"{item.dtype} {tuple(item.shape)}"
    if isinstance(item, tuple | list):
        return f"{type(item).__name__} of {', '.join(map(_shown, item[:4]))}"
    return type(item).__name__
