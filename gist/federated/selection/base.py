"""Which units a client is sent: what is known by then, and what a selection is."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from gist.errors import ConfigError, PartitionError
from gist.partition import transfer
from gist.partition.parts import Part
from gist.partition.scores import unit_changes
from gist.partition.spec import PartitionSpec
from gist.partition.streams import stream

SelectionState = dict[str, Tensor]
"""What a selection remembers, as tensors: of one client under keys that begin with its number."""

State = Mapping[str, Tensor]
"""The same, to be read."""

Widths = Mapping[str, tuple[int, int]]
"""By group, how many of how many units."""

Units = dict[str, Tensor]
"""By group, some of its units: int64."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is known when a client is sent work; a function of clock and settings alone.

    Attributes:
        client: The client.
        task: Number of the task in the run, from 0 on.
        own: Which of the client's tasks it is, from 0 on.
        merges: Of the server, so far.
        capacity: Share of the units of every group that the client can train, in (0, 1].
        rank: The client's place by speed among all, 0 for the fastest.
        num_ranks: Number of clients.
        progress: Share of the budget that is spent, in [0, 1].
        seed: Of the run.

    Raises:
        ConfigError: a value out of range.
    """

    client: int
    task: int
    own: int
    merges: int
    capacity: float
    rank: int
    num_ranks: int
    progress: float
    seed: int

    def __post_init__(self) -> None:
        counts = (self.client, self.task, self.own, self.merges)
        fits = 0 < self.capacity <= 1 and 0 <= self.progress <= 1 and min(counts) >= 0
        if not fits or not 0 <= self.rank < self.num_ranks:
            raise ConfigError("a request is out of range", got=self)


class ServerView(Protocol):
    """What a selection sees of the server."""

    @property
    def spec(self) -> PartitionSpec:
        """Partition spec of the model."""

    def tensors_now(self) -> Mapping[str, Tensor]:
        """The global parameters and buffers by full name."""

    def initial(self) -> Mapping[str, Tensor]:
        """These as they were at the start; for selections with ``needs_initial``."""


class Report(Protocol):
    """What a client sent back."""

    @property
    def part(self) -> Part:
        """What it trained."""

    @property
    def losses(self) -> tuple[float, float]:
        """Of its first and its last local step."""


class Selection(ABC):
    """Which units a client is sent; subclasses are frozen dataclasses, and choose.

    The same request, view and state give the same units. What is drawn at random is drawn from
    streams named by seed, task and group.
    """

    needs_initial: ClassVar[bool] = False
    """Whether :meth:`ServerView.initial` is asked for."""

    needs_start: ClassVar[bool] = False
    """Whether :meth:`observe` asks what was sent: :attr:`~gist.partition.parts.Part.start`."""

    def count(self, size: int, request: Request) -> int:
        """How many units of a group a client is sent, at least one.

        A function of these arguments alone, as the clock asks before anything is trained.

        Args:
            size: Units of the group.
            request: What is known.
        """
        return rounded_up(size, request.capacity)

    def select(
        self, sizes: Mapping[str, int], request: Request, view: ServerView, state: State
    ) -> Units:
        """The units that a client is sent.

        Args:
            sizes: Units per group.
            request: What is known.
            view: The server.
            state: What :meth:`observe` left behind.

        Returns:
            For each group, :meth:`count` units: int64, ascending, on the CPU.

        Raises:
            PartitionError: a subclass chose another number of units, or one twice.
        """
        widths = {group: (self.count(size, request), size) for group, size in sizes.items()}
        cut = {group: (count, size) for group, (count, size) in widths.items() if count < size}
        chosen = self.choose(cut, request, view, state) if cut else {}
        held = {}
        for group, (count, size) in widths.items():
            units = torch.unique(chosen[group].cpu()) if group in cut else torch.arange(size)
            if units.numel() != count:
                raise PartitionError(
                    f"{type(self).__name__}.choose must give as many units of {group!r} as counted",
                    got=units.numel(),
                    expected=count,
                )
            held[group] = units
        return held

    @abstractmethod
    def choose(self, widths: Widths, request: Request, view: ServerView, state: State) -> Units:
        """Units of the groups of which a client is not sent all, in any order.

        Args:
            widths: How many of each of these groups are to be chosen, and of how many.
            request: See :meth:`select`.
            view: See :meth:`select`.
            state: See :meth:`select`.
        """

    def observe(  # noqa: B027
        self, request: Request, report: Report, view: ServerView, state: SelectionState
    ) -> None:
        """Learns from what came back; most selections learn nothing.

        Args:
            request: What was known when the work was sent.
            report: What came back, before it is merged.
            view: The server.
            state: What is remembered; changed in place.
        """

    def trained(self, names: Iterable[str], request: Request) -> frozenset[str]:
        """Which of the parameters a client trains and sends back; the others stay as they are.

        Args:
            names: Full names of the parameters that it is sent.
            request: What is known.
        """
        return frozenset(names)

    def uploaded(self, request: Request) -> float:
        """Bytes that come back, over bytes that are sent; in expectation, for the clock."""
        return 1.0


def rounded_up(size: int, share: float) -> int:
    """``ceil(share * size)``, at least 1; not one more because of how shares are rounded."""
    return max(1, math.ceil(share * size - 1e-9))


def rounded(size: int, share: float) -> int:
    """``share * size`` to the nearest whole number, halves up, at least 1."""
    return max(1, math.floor(share * size + 0.5))


def drawn(size: int, count: int, *key: int | str) -> Tensor:
    """``[count]``: different units, uniformly drawn from the stream of a key."""
    return torch.randperm(size, generator=stream("selection", *key))[:count]


def changes_in(report: Report, view: ServerView, p: float) -> dict[str, Tensor]:
    """``Σ |trained - sent|^p`` of each unit in a client's update.

    Raises:
        PartitionError: the part does not say what was sent.
    """
    part = report.part
    if part.start is None:
        raise PartitionError(
            "a selection that learns from updates needs what was sent",
            got="a part without start",
            remedy="keep it where needs_start of the selection is True",
        )
    held = transfer.Selection(view.spec, part.assignment, 0)
    return unit_changes(part.tensors, part.start, view.spec, p=p, selection=held)


def require_share(name: str, value: float, *, zero: bool = True) -> None:
    """Refuses what is no share of something.

    Raises:
        ConfigError: a value outside of [0, 1]; or 0, where ``zero`` is False.
    """
    if not 0 <= value <= 1 or (value == 0 and not zero):
        raise ConfigError(f"{name} must be in {'[' if zero else '('}0, 1]", got=repr(value))
