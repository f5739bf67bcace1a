"""A model that is spread over workers is evaluated by all of them, and exactly."""

from __future__ import annotations

import pytest

from tests.workers.spawn import run_workers

FEW = ("gcn", "sage concat", "gin batch cat", "gat 4", "gatv2 4", "files", "trainer")


@pytest.mark.xdist_group("workers")
@pytest.mark.parametrize(
    ("workers", "cases"),
    [(1, FEW[-2:]), (3, FEW), *(pytest.param(n, (), marks=pytest.mark.slow) for n in (2, 3))],
)
def test_scores_are_exact_and_alike_within_limits_at_known_bytes(workers: int, cases):
    run_workers("spread.py", *cases, workers=workers, timeout=150)
