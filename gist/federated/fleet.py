"""The clients of a federated run: how fast each is, how well connected, when it is there."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from gist.errors import ConfigError, one_of
from gist.partition.streams import stream


@dataclass(frozen=True, kw_only=True)
class ClientProfile:
    """One client's device and connection.

    Attributes:
        step_seconds: Of one local step of the whole model.
        download: Bytes per second from the server.
        upload: Bytes per second to the server.
        available: Share of the time in which it can be sent work; it finishes what it has begun.
        period: Seconds from one time that it comes to the next.

    Raises:
        ConfigError: a value that cannot be used.
    """

    step_seconds: float = 1.0
    download: float = math.inf
    upload: float = math.inf
    available: float = 1.0
    period: float = 86_400.0

    def __post_init__(self) -> None:
        for name in ("step_seconds", "download", "upload", "period"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive", got=getattr(self, name))
        for name in ("step_seconds", "period"):
            if not math.isfinite(getattr(self, name)):
                raise ConfigError(f"{name} must be finite", got=getattr(self, name))
        if not 0 < self.available <= 1:
            raise ConfigError("available must be a share above 0", got=self.available)


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """All clients, and what goes wrong with them.

    >>> fleet = dataclasses.replace(Fleet.lognormal(100, seed=0), lost=0.05)

    Attributes:
        profiles: One for each client.
        counts_operations: Whether a step of a narrower model takes as much less time as it has
            fewer operations; else as it holds fewer units, as the AsyncDrop authors' clock assumes.
        lost: Probability that a client never answers.
        repeated: Probability that an answer comes twice.
        corrupt: Probability that an answer is garbage.

    Raises:
        ConfigError: a value that cannot be used.
    """

    profiles: tuple[ClientProfile, ...]
    counts_operations: bool = True
    lost: float = 0.0
    repeated: float = 0.0
    corrupt: float = 0.0

    def __post_init__(self) -> None:
        if not self.profiles:
            raise ConfigError("a fleet needs a client")
        chances = (self.lost, self.repeated, self.corrupt)
        each_is = all(0 <= chance <= 1 for chance in chances)
        if not each_is or sum(chances) > 1 + 1e-9 or self.lost + self.corrupt >= 1:
            raise ConfigError(
                "lost, repeated and corrupt must be probabilities that sum to 1 at most",
                got=chances,
                expected="some sound answers",
            )

    def __len__(self) -> int:
        return len(self.profiles)

    def ranks(self) -> list[int]:
        """Each client's place by speed, 0 for the fastest; of equal ones the lower number first."""
        order = sorted(range(len(self)), key=lambda i: (self.profiles[i].step_seconds, i))
        ranks = [0] * len(self)
        for rank, client in enumerate(order):
            ranks[client] = rank
        return ranks

    def fate(self, seed: int, task: int) -> str:
        """What becomes of a task: ``"returned"``, ``"lost"``, ``"repeated"`` or ``"corrupt"``."""
        drawn = float(torch.rand((), generator=stream("fate", seed, task)))
        for name in ("lost", "repeated", "corrupt"):
            drawn -= getattr(self, name)
            if drawn < 0:
                return name
        return "returned"

    def next_available(self, client: int, time: float, seed: int) -> float:
        """The first moment from ``time`` on at which a client can be sent work."""
        profile = self.profiles[client]
        if profile.available == 1:
            return time
        offset = float(torch.rand((), generator=stream("availability", seed, client)))
        phase = (time / profile.period + offset) % 1
        if phase < profile.available or 1 - phase < 1e-9:  # rounding must not stop the clock
            return time
        return time + (1 - phase) * profile.period

    @classmethod
    def uniform(cls, clients: int, *, seed: int = 0) -> Fleet:
        """Clients that are all alike: a second for a step, no time to send anything."""
        del seed
        return cls(profiles=(ClientProfile(),) * clients)

    @classmethod
    def lognormal(cls, clients: int, *, seed: int = 0) -> Fleet:
        """Clients whose speeds and bandwidths spread as those of phones do.

        The logarithm of a step's seconds is normal about 0 with a deviation of 0.5, so the slowest
        of a hundred takes about ten times as long as the fastest. Downloads are lognormal about
        20 Mbit/s with a deviation of 0.5, and uploads a quarter of them.
        """
        drawn = torch.randn(2, clients, generator=stream("fleet", seed), dtype=torch.float64) * 0.5
        steps, bandwidths = drawn.exp().tolist()
        return cls(
            profiles=tuple(
                ClientProfile(step_seconds=step, download=width * 2.5e6, upload=width * 2.5e6 / 4)
                for step, width in zip(steps, bandwidths, strict=True)
            )
        )

    @classmethod
    def asyncdrop(cls, clients: int, *, seed: int = 0) -> Fleet:
        """The clock of the AsyncDrop authors' code.

        Client i takes (i % 8 + 1) / 4 seconds for a step of the whole model, a spread of 8; a
        narrower model takes as much less as it holds fewer units; sending takes no time.
        """
        del seed
        profiles = tuple(ClientProfile(step_seconds=(i % 8 + 1) / 4) for i in range(clients))
        return cls(profiles=profiles, counts_operations=False)


FLEETS: Mapping[str, Callable[..., Fleet]] = {
    "uniform": Fleet.uniform,
    "lognormal": Fleet.lognormal,
    "asyncdrop": Fleet.asyncdrop,
}
"""Fleets by name, made from a number of clients and a seed."""


def make_fleet(fleet: str | Fleet, clients: int, seed: int) -> Fleet:
    """A fleet by name, or the given one.

    Raises:
        ConfigError: an unknown name, or a fleet of another number of clients.
    """
    if isinstance(fleet, Fleet):
        if len(fleet) != clients:
            raise ConfigError(
                "the fleet has another number of clients", got=len(fleet), expected=clients
            )
        return fleet
    if isinstance(fleet, Sequence) and not isinstance(fleet, str):
        raise ConfigError(
            "these are no fleet", got=f"a {type(fleet).__name__}", remedy="Fleet(profiles=...)"
        )
    one_of("fleet", fleet, FLEETS)
    return FLEETS[fleet](clients, seed=seed)
