"""What the files of a federated run say of its clients."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gist.errors import DataError
from gist.history import TrainResult


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What clients of a federated run were sent, and what became of it.

    Attributes:
        clock: Seconds.
        merges: Rounds of the run.
        bytes_down: To clients.
        bytes_up: From clients.
        events: How many of each kind.
        staleness: Merged answers by staleness, in merges.
        per_client: Merged answers of each client.
        least_coverage: Merged answers that held the unit that fewest held; None where unknown.
        mean: Metric on each client's own data, mean over the clients; None where unknown.
        worst: Likewise, the lowest.
        measured_on: Which data these are.
    """

    clock: float | None
    merges: int
    bytes_down: int
    bytes_up: int
    events: Mapping[str, int]
    staleness: Mapping[int, int]
    per_client: Sequence[int]
    least_coverage: int | None = None
    mean: float | None = None
    worst: float | None = None
    measured_on: str | None = None

    @property
    def mean_staleness(self) -> float | None:
        """Over the merged answers; None where there are none."""
        merged = sum(self.staleness.values())
        return sum(s * n for s, n in self.staleness.items()) / merged if merged else None


def read_answers(folder: Path, result: TrainResult) -> Answers:
    """Reads ``federated.json``; where there is none, as of Flower, ``events.jsonl``.

    Args:
        folder: Of the run.
        result: Of the run.

    Raises:
        DataError: the file is damaged; names it.
    """
    path, events = folder / "federated.json", folder / "events.jsonl"
    found: dict[str, Any] = {"events": {}, "staleness": {}, "per_client": ()}
    try:
        if path.is_file():
            found = _summarized(json.loads(path.read_bytes()))
        elif events.is_file():
            path = events
            found = _counted([json.loads(line) for line in path.read_bytes().splitlines()])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is damaged", got=repr(error)) from error
    return Answers(
        clock=result.history[-1].clock,
        merges=len(result.history),
        bytes_down=result.bytes_sent,
        bytes_up=result.bytes_received,
        **found,
    )


def _summarized(report: Mapping[str, Any]) -> dict[str, Any]:
    """Of what :meth:`gist.FederatedTrainer.report` gave."""
    own = report["client_metric"]
    covered = [int(times) for times in report["least_coverage"].values()]
    return {
        "events": {str(kind): int(n) for kind, n in report["events"].items()},
        "staleness": {int(s): int(n) for s, n in report["staleness"].items()},
        "per_client": tuple(map(int, report["merges_per_client"])),
        "least_coverage": min(covered, default=None),
        **{key: None if own[key] is None else float(own[key]) for key in ("mean", "worst")},
        "measured_on": str(own["measured_on"]),
    }


def _counted(events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of everything that happened."""
    merged = [event for event in events if event["event"] == "merged"]
    clients = {event["client"] for event in events} - {None}
    each = Counter(event["client"] for event in merged)
    return {
        "events": Counter(str(event["event"]) for event in events),
        "staleness": Counter(int(event["staleness"]) for event in merged),
        "per_client": tuple(each[client] for client in clients),
    }
