"""Every run collects garbage before it starts: here not among the objects of all libraries."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def _little_garbage() -> Iterator[None]:
    gc.freeze()
    yield
    gc.unfreeze()
