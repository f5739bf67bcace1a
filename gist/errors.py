"""Errors that a user can act on: what went wrong, what was got, what was expected, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class GistError(Exception):
    """Base of every error that this package raises on purpose.

    Args:
        what: One sentence naming the thing that is wrong.
        got: The offending value.
        expected: What would have been accepted.
        remedy: What the user can do about it.
    """

    def __init__(
        self, what: str, *, got: Any = None, expected: Any = None, remedy: str | None = None
    ) -> None:
        parts = [what.rstrip(".")]
        if got is not None:
            parts.append(f"got: {got}")
        if expected is not None:
            parts.append(f"expected: {expected}")
        if remedy is not None:
            parts.append(f"remedy: {remedy}")
        super().__init__("; ".join(parts))
        self.what, self.got, self.expected, self.remedy = what, got, expected, remedy


class ConfigError(GistError, ValueError):
    """A setting that cannot be used."""


class DataError(GistError, ValueError):
    """Input data that cannot be trained on."""


class PartitionError(GistError, ValueError):
    """A model, spec or assignment that cannot be partitioned."""


class CheckpointError(GistError, ValueError):
    """A checkpoint that is missing, damaged or of another run."""


class DivergedError(GistError, ArithmeticError):
    """The loss of a subnet became NaN or infinite."""


class WorkerLostError(GistError, RuntimeError):
    """Another process of a distributed run died, or does not answer."""


class MissingDependencyError(GistError, ImportError):
    """An optional package is needed and not installed."""


def require_count(name: str, value: Any) -> None:
    """Refuses what is no number of things.

    Raises:
        ConfigError: a value below 1, or no whole number.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name} must be a whole number of at least 1", got=repr(value))


def one_of(what: str, value: Any, known: Iterable[Any]) -> None:
    """Refuses a ``value`` that is not among the ``known`` ones, with those that may be meant.

    Raises:
        ConfigError: ``value`` is not known.
    """
    names = list(known)
    if value in names:
        return
    texts = [str(name) for name in names]
    close = difflib.get_close_matches(value.lower(), texts, n=1) if isinstance(value, str) else []
    raise ConfigError(
        f"unknown {what}",
        got=repr(value)[:200],
        expected=" or ".join(texts),
        remedy=f"did you mean {close[0]!r}?" if close else None,
    )
