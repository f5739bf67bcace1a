"""Any number of workers gives the same bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.workers import equal
from tests.workers.spawn import torchrun


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """What one process gets."""
    return {name: equal.outcome(name) for name in equal.CASES}


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_weights_and_history_are_those_of_one_process(
    alone: dict[str, Any], workers: int, tmp_path: Path
):
    torchrun("equal.py", str(tmp_path / "out.json"), workers=workers)
    got = json.loads((tmp_path / "out.json").read_text())
    assert got.keys() == alone.keys()
    differ = [name for name in alone if got[name] != json.loads(json.dumps(alone[name]))]
    assert not differ
    assert len({each["weights"] for each in got.values()}) == len(got), "cases are different runs"
