"""Federated training on machines of clients, through Flower (the extra ``flower``).

The server merges answers as they come, by any of
:data:`~gist.federated.strategies.STRATEGIES`; a client trains the narrow model that it was sent.
"""

from gist.federated.flower.client import client_app
from gist.federated.flower.server import evaluate_on, server_app

__all__ = ["client_app", "evaluate_on", "server_app"]
