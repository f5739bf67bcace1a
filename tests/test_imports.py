"""Who may import whom (see docs/design.md): read from the source, nothing is run."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import gist

ROOT = Path(gist.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Every module of the package that a file imports, anywhere in it, by full name."""
    found: set[str] = set()
    package = module_name(path).split(".")
    package = package if path.name == "__init__.py" else package[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{origin}.{alias.name}" for alias in node.names} | {origin}
    return {name for name in found if name == "gist" or name.startswith("gist.")}


def within(name: str, *packages: str) -> bool:
    return any(name == p or name.startswith(f"{p}.") for p in packages)


def files(package: str) -> list[Path]:
    return [path for path in FILES if within(module_name(path), package)]


def offenders(package: str, *, allowed: tuple[str, ...] = (), banned: tuple[str, ...] = ()):
    return [
        f"{module_name(path)} imports {name}"
        for path in files(package)
        for name in sorted(imports(path) - {"gist"})
        if (banned and within(name, *banned)) or (allowed and not within(name, *allowed))
    ]


def test_the_reader_of_imports_sees_them():
    assert "gist.partition.samplers" in imports(ROOT / "config.py")
    assert any(within(name, "gist.execution") for name in imports(ROOT / "trainer.py"))
    assert len(files("gist.partition")) > 8
    packages = ("graph", "samples", "catalog", "execution", "nn", "costs", "methods", "families")
    assert all(files(f"gist.{package}") for package in packages)


def test_the_engine_imports_nothing_but_itself_and_errors():
    assert offenders("gist.partition", allowed=("gist.partition", "gist.errors")) == []


def test_execution_and_graph_do_not_know_each_other():
    assert offenders("gist.execution", banned=("gist.graph",)) == []
    assert offenders("gist.graph", banned=("gist.execution",)) == []


def test_samples_know_neither_graphs_nor_executors_nor_the_reverse():
    assert offenders("gist.samples", banned=("gist.graph", "gist.execution")) == []
    assert offenders("gist.graph", banned=("gist.samples",)) == []
    assert offenders("gist.execution", banned=("gist.samples",)) == []


def test_the_catalog_stands_on_errors_and_metrics():
    assert offenders("gist.catalog", allowed=("gist.catalog", "gist.errors", "gist.metrics")) == []


def test_execution_stands_on_settings_and_the_engine():
    ground = ("gist.execution", "gist.partition", "gist.config", "gist.plan", "gist.errors")
    assert offenders("gist.execution", allowed=ground) == []


def test_settings_and_errors_stand_at_the_bottom():
    assert offenders("gist.errors", banned=("gist",)) == []
    assert offenders("gist.config", allowed=("gist.errors", "gist.partition")) == []
    assert offenders("gist.plan", allowed=("gist.errors", "gist.config")) == []


@pytest.mark.parametrize("top", ["gist.cli", "gist.families", "gist.methods", "gist.baselines"])
def test_what_sits_on_top_is_not_imported_below(top):
    below = ("partition", "execution", "graph", "samples", "catalog", "nn", "costs", "trainer")
    assert [o for package in below for o in offenders(f"gist.{package}", banned=(top,))] == []


def test_methods_do_not_know_what_experiments_are_made_of_by_name():
    assert offenders("gist.methods", banned=("gist.families", "gist.baselines")) == []


def test_nobody_imports_the_command_line():
    mine = [path for path in FILES if not within(module_name(path), "gist.cli", "gist.__main__")]
    assert [p for p in mine if any(within(n, "gist.cli") for n in imports(p))] == []
