"""The clients of a server: who is there, how fast each is, and who is sent work next."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from gist.partition.streams import stream

_LONGEST_REST = 60.0
"""Seconds that a client rests at most when its answers are of no use."""


@dataclass(kw_only=True, eq=False)
class Client:
    """What is known of a client.

    Attributes:
        node: What the network calls it.
        number: In the order in which clients were first seen, from 0 on.
        tasks: That it was sent.
        step_seconds: Of a local step of the whole model; infinite until it has answered.
        samples: That it trains on; 0 until it has answered.
        failures: Answers in a row that were of no use.
        rests_until: When it may be sent work again.
    """

    node: int
    number: int
    tasks: int = 0
    step_seconds: float = math.inf
    samples: int = 0
    failures: int = 0
    rests_until: float = 0.0

    def answered(self, *, step_seconds: float, samples: int) -> None:
        """Learns from an answer; old speeds count half as much with every new one."""
        known = self.step_seconds < math.inf
        self.step_seconds = (self.step_seconds + step_seconds) / 2 if known else step_seconds
        self.samples, self.failures = samples, 0

    def failed(self, now: float) -> None:
        """Rests, twice as long with every answer that is of no use."""
        self.failures += 1
        self.rests_until = now + min(2.0 ** min(self.failures, 10), _LONGEST_REST)


class Roster:
    """All clients that were ever seen.

    Attributes:
        here: Those that are there now, by number.
    """

    def __init__(self) -> None:
        self.here: list[Client] = []
        self._known: dict[int, Client] = {}

    def look(self, nodes: Iterable[int]) -> tuple[list[Client], list[Client]]:
        """Takes note of who is there now.

        Returns:
            Who has come, and who has left.
        """
        before, found = self.here, set(nodes)
        for node in sorted(found - self._known.keys()):
            self._known[node] = Client(node=node, number=len(self._known))
        self.here = sorted((self._known[node] for node in found), key=lambda c: c.number)
        came = [client for client in self.here if client not in before]
        return came, [client for client in before if client not in self.here]

    @property
    def samples(self) -> int:
        """Of all clients that have answered."""
        return sum(client.samples for client in self._known.values())

    def rank(self, client: Client, among: Sequence[Client]) -> int:
        """Place by speed, 0 for the fastest; of equals the lower number comes first."""
        own = client.step_seconds, client.number
        return sum((other.step_seconds, other.number) < own for other in among)

    def choose(self, busy: Iterable[Client], now: float, *key: int | str) -> Client | None:
        """Draws a client that is idle, if there is one.

        Args:
            busy: Clients that are not.
            now: Seconds; those that rest are not chosen.
            *key: Of the stream that is drawn from.
        """
        working = {client.number for client in busy}
        idle = [c.number not in working and c.rests_until <= now for c in self.here]
        if not any(idle):
            return None
        generator, place = stream(*key), -1
        while place < 0 or not idle[place]:
            place = int(torch.randint(len(idle), (), generator=generator))
        return self.here[place]
