"""How messages reach clients, and their answers the server."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from gist.federated.flower.messages import Records
from gist.federated.flower.records import flower, from_content, size_of, to_content


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What came back of a message.

    Attributes:
        message: The message that it answers.
        node: Who sent it; not the client, where the network says that no answer will come.
        nbytes: Size of its arrays.
        read: Gives its records, or raises a :class:`~gist.errors.DataError`.
        error: Why there are none.
    """

    message: str
    node: int
    nbytes: int = 0
    read: Callable[[], Records] | None = None
    error: str | None = None


class Link(Protocol):
    """Messages to clients; nothing of it waits."""

    def nodes(self) -> Iterable[int]:
        """The clients that are there now."""

    def send(self, node: int, records: Records, *, seconds: float, group: str) -> str | None:
        """Sends a message, which is void after some time.

        Returns:
            What the message is called; None where it was not taken.
        """

    def receive(self, messages: Iterable[str]) -> Sequence[Reply]:
        """What came back of these messages since they were last asked for."""


class GridLink:
    """Messages through Flower's ``Grid``.

    Args:
        grid: As the main function of a ``ServerApp`` is given it.
    """

    def __init__(self, grid: Any) -> None:
        self.grid = grid

    def nodes(self) -> Iterable[int]:
        """See :meth:`Link.nodes`."""
        nodes: Iterable[int] = self.grid.get_node_ids()
        return nodes

    def send(self, node: int, records: Records, *, seconds: float, group: str) -> str | None:
        """See :meth:`Link.send`."""
        content = to_content(records)
        message = flower("app").Message(content, node, "train", ttl=seconds, group_id=group)
        taken: list[str | None] = list(self.grid.push_messages([message]))
        return taken[0] if taken else None

    def receive(self, messages: Iterable[str]) -> Sequence[Reply]:
        """See :meth:`Link.receive`."""
        return [_reply(message) for message in self.grid.pull_messages(list(messages))]


def _reply(message: Any) -> Reply:
    about = message.metadata
    if message.has_error():
        reason = f"{message.error.reason} (code {message.error.code})"
        return Reply(message=about.reply_to_message_id, node=about.src_node_id, error=reason)
    return Reply(
        message=about.reply_to_message_id,
        node=about.src_node_id,
        nbytes=size_of(message.content),
        read=partial(from_content, message.content),
    )
