"""Settings of every test: one thread, repeatable examples, and where real data sets lie."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

settings.register_profile(
    "gist", deadline=None, max_examples=30, derandomize=bool(os.environ.get("CI"))
)
settings.load_profile("gist")

# Unless a backend is named, DGL writes a file into the home directory when it is first imported.
os.environ.setdefault("DGLBACKEND", "pytorch")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that start processes take longest, and begin first: none is left for the end."""
    items.sort(key=lambda item: item.path.parent.name != "workers")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Bit-for-bit comparisons, and several test processes side by side, want one thread each."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="module")
def _little_garbage() -> None:
    """Every run collects garbage before it starts: here not among the objects of all libraries."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def real_data_root() -> Path:
    """The folder with real data sets: ``GIST_DATA``, or ``shared/data`` beside the repository."""
    given = os.environ.get("GIST_DATA")
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not given and not beside.is_dir():
        pytest.skip("no real data: GIST_DATA is unset and ../shared/data does not exist")
    return Path(given or beside)
