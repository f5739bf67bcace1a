"""Settings of a server whose clients are on machines of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gist.errors import ConfigError, require_count


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """When clients are sent work, and how their answers are merged.

    Attributes:
        strategy: Name of one of :data:`~gist.federated.strategies.STRATEGIES`, or a
            :class:`~gist.federated.strategies.Strategy`.
        capacity: Share of the units that a client can train, or levels of it, the fastest clients'
            first; None for the strategy's.
        in_flight: How many clients work at a time; for a synchronous strategy, its cohort. None for
            all that are there.
        min_clients: How many must be there for any to be sent work.
        duration: Seconds after which the run ends, however many merges were done.
        timeout: Seconds after which the server stops to wait for an answer. The client gets work
            again when it has answered nevertheless, or as many seconds later.
        poll: Seconds between two looks for answers.

    Raises:
        ConfigError: a value that cannot be used.
    """

    strategy: Any = "asyncdrop"
    capacity: float | Sequence[float] | None = None
    in_flight: int | None = None
    min_clients: int = 1
    duration: float | None = None
    timeout: float = 1800.0
    poll: float = 0.5

    def __post_init__(self) -> None:
        if self.in_flight is not None:
            require_count("in_flight", self.in_flight)
        require_count("min_clients", self.min_clients)
        for name, optional in (("duration", True), ("timeout", False), ("poll", False)):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and 0 < value < float("inf")) and not (optional and value is None):
                raise ConfigError(f"{name} must be a positive number of seconds", got=repr(value))

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON values; strategy and capacity are for the strategy to tell."""
        return {k: v for k, v in vars(self).items() if k not in ("strategy", "capacity")}
