"""The benchmark scripts: each runs, and writes the rows that its page shows."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "examples" / "benchmarks"

slow = pytest.mark.slow

COLUMNS = {
    "one_device": ("layers", "subnets", "method", "seconds", "speedup"),
    "graph_product": ("width", "kernel", "forward_seconds", "backward_seconds"),
    "scaling": ("sweep", "width", "subnets", "nodes", "seconds_per_round", "peak_memory_bytes"),
    "accuracy_vs_time": (
        "dataset",
        "subnets",
        "local_steps",
        "budget",
        "test_metric",
        "seconds",
        "seconds_to_target",
    ),
    "repartition": ("width", "local_steps", "seconds", "repartition_seconds", "share"),
    "profile_step": ("method", "operator", "milliseconds", "gflop", "megabytes", "above_floor"),
    "workers": ("table", "method", "workers", "seconds", "bytes_per_round", "planned_bytes"),
    "cached_start": ("edges", "open_seconds", "trainer_seconds", "resident_mib", "own_mib"),
    "step_options": ("width", "subnets", "precision", "compile", "step_seconds", "speedup"),
}

MAY_BE_ZERO = {"gflop", "megabytes", "floor_milliseconds", "bytes_per_round"}
"""Columns that are zero where an operator does not compute, or nothing is moved."""


def run_script(path: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(path), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def in_json(path: Path) -> list[dict[str, object]]:
    def refused(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(path.read_text(), parse_constant=refused)


@pytest.mark.parametrize(
    "name", ["cached_start", *(pytest.param(n, marks=slow) for n in COLUMNS if n != "cached_start")]
)
def test_a_benchmark_writes_its_rows(name, tmp_path):
    printed = run_script(
        BENCHMARKS / f"{name}.py", "--quick", "--threads", "1", "--json", str(tmp_path / "rows")
    )
    rows = in_json(tmp_path / "rows")
    assert rows
    for row in rows:
        assert set(COLUMNS[name]) <= row.keys()
        for column, value in row.items():
            assert column in printed
            if isinstance(value, float):
                assert math.isfinite(value)
                assert value > 0 or (value == 0 and column in MAY_BE_ZERO)


@slow
def test_a_profile_counts_all_products_of_a_step(tmp_path):
    sizes = ["--hidden", "64", "--layers", "3", "--nodes", "2000", "--local-steps", "2"]
    run_script(
        BENCHMARKS / "profile_step.py",
        *("--threads", "1", "--repeats", "1", "--json", str(tmp_path / "rows"), *sizes),
    )
    rows = {(row["method"], row["operator"]): row for row in in_json(tmp_path / "rows")}
    # two weights a layer, forward and for the gradients of weights; inputs need none in the first
    entries = 3 * 64 * 64 + 3 * 64 * 47 + 2 * 100 * 64
    assert sum(
        row["gflop"] for (method, op), row in rows.items() if method == "full" and "mm" in op
    ) == pytest.approx(2 * 2 * 2000 * entries / 1e9, rel=1e-6)
    for method in ("full", "gist, m = 8"):
        parts = [row for (of, op), row in rows.items() if of == method and op != "step"]
        whole = rows[method, "step"]
        assert sum(row["milliseconds"] for row in parts) == pytest.approx(whole["milliseconds"])
        assert sum(row["share"] for row in parts) == pytest.approx(1)


@slow
def test_one_device_holds_stacked_subnets_against_all_others(tmp_path):
    run_script(
        BENCHMARKS / "one_device.py", "--quick", "--threads", "1", "--json", str(tmp_path / "rows")
    )
    rows = in_json(tmp_path / "rows")
    for layers in {row["layers"] for row in rows}:
        of_depth = [row for row in rows if row["layers"] == layers]
        full = [row for row in of_depth if row["subnets"] == 1]
        assert {"full, ours", "full, PyG"} <= {row["method"] for row in full}
        fastest = min(row["seconds"] for row in full)
        for row in of_depth:
            assert row["speedup"] == pytest.approx(fastest / row["seconds"])
            # the budget rule: m subnets take m times fewer steps each
            assert row["steps"] * row["subnets"] == full[0]["steps"]


def test_what_is_no_number_is_null_in_the_file(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import tables

    parsed = tables.options("A table.").parse_args(["--json", str(tmp_path / "rows")])
    rows = [{"name": "a", "value": math.nan}, {"name": "b", "value": math.inf}]
    tables.finish(parsed, rows, ["name", "value"])
    assert in_json(tmp_path / "rows") == [
        {"name": "a", "value": None},
        {"name": "b", "value": None},
    ]
    assert "nan" not in capsys.readouterr().out


@pytest.mark.parametrize("store", [pytest.param("memory", marks=slow), "disk"])
def test_the_ultra_wide_script_trains(store, tmp_path):
    printed = run_script(
        ROOT / "examples" / "ultra_wide.py",
        *("--width", "256", "--subnets", "4", "--nodes", "2000", "--store", store),
        *("--rounds", "2", "--local-steps", "4", "--threads", "1", "--out", str(tmp_path)),
    )
    assert "peak" in printed
