"""The scripts of the paper tables: each runs on small data, and writes the rows that it shows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PAPERS = Path(__file__).resolve().parents[2] / "examples" / "papers"

METHODS = {
    "ist": ["full", "data-parallel", "local-sgd", "ist"] * 2,
    "resist": ["full", "local-sgd", "resist"],
    "loft": [
        "full",
        "full, 50% pruned, fine-tuned",
        "full, 50% pruned, rewound",
        "local-sgd",
        "loft",
        "loft, 50% pruned, fine-tuned",
        "loft, 50% pruned, rewound",
    ],
}


@pytest.mark.parametrize(
    "name",
    ["ist", *(pytest.param(name, marks=pytest.mark.slow) for name in ("resist", "loft"))],
)
def test_it_runs(name, tmp_path):
    out, plot = tmp_path / "rows.json", tmp_path / "plot.png"
    more = ["--plot", str(plot)] if name == "loft" else []
    done = subprocess.run(
        [
            *(sys.executable, str(PAPERS / f"{name}.py"), "--quick", "--threads", "1"),
            *("--local-steps", "10", "--json", str(out), *more),
        ],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.read_text())
    assert [row["method"] for row in rows] == METHODS[name]
    assert plot.exists() == (name == "loft")
    for row in rows:
        assert 10 < row["test_metric"] <= 100
        assert row["seconds"] > 0
        assert row["paper"] is None, "that is of other data"
        trained_by_many = row["subnets"] > 1 and "pruned" not in row["method"]
        assert (row["bytes_per_round"] > 0) == trained_by_many


@pytest.mark.slow
def test_federated_strategies(tmp_path):
    out = tmp_path / "rows.json"
    script = str(PAPERS / "asyncdrop.py")
    done = subprocess.run(
        [sys.executable, script, "--quick", "--threads", "1", "--seeds", "1", "--json", str(out)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.read_text())
    assert [row["strategy"] for row in rows] == ["asyncdrop", "asyncdrop-uniform", "async-fedavg"]
    for row in rows:
        assert 10 < row["best"] <= 100
        assert row["merges"] > 10
        assert row["megabytes_down"] >= row["megabytes_up"] > 0
        assert row["paper"] is None, "that is of other data"
