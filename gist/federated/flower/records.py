"""Records in Flower's types, and Flower itself, which is imported when it is first needed."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from gist.errors import DataError, MissingDependencyError
from gist.federated.flower.messages import Records

EXTRA = "pip install 'gist-subnets[flower]'"
"""How Flower is installed."""


def flower(module: str) -> Any:
    """A module of Flower, such as ``"app"``.

    Raises:
        MissingDependencyError: it is not installed, or importing it fails.
    """
    try:
        return importlib.import_module(f"flwr.{module}")
    except ImportError as error:
        raise MissingDependencyError(
            "Flower cannot be imported", got=str(error).partition("\n")[0], remedy=EXTRA
        ) from error


def to_content(records: Records) -> Any:
    """Records as the ``RecordDict`` of a message."""
    app = flower("app")
    return app.RecordDict(
        {
            "arrays": app.ArrayRecord({k: app.Array(v) for k, v in records.arrays.items()}),
            "config": app.ConfigRecord(dict(records.config)),
            "metrics": app.MetricRecord(dict(records.metrics)),
        }
    )


def size_of(content: Any) -> int:
    """Bytes of the arrays of a message, before they are read."""
    return sum(
        len(array.data) for record in content.array_records.values() for array in record.values()
    )


def from_content(content: Any) -> Records:
    """Records of the ``RecordDict`` of a message.

    Raises:
        DataError: it has other records, or arrays that cannot be read.
    """
    try:
        arrays = {name: array.numpy() for name, array in content["arrays"].items()}
        if not all(isinstance(array, np.ndarray) for array in arrays.values()):
            raise TypeError("an archive is no array")
        return Records(
            arrays=arrays, config=dict(content["config"]), metrics=dict(content["metrics"])
        )
    except Exception as error:  # bytes from outside may raise anything when they are read
        raise DataError(
            "a message is damaged", got=f"{type(error).__name__}: {error}"[:200]
        ) from error
