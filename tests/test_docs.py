"""The documentation tells the truth: its code runs, and it names every option and every field."""

from __future__ import annotations

import json
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pytest
import typer.main
from torch import nn
from typer.testing import CliRunner

import gist
from gist.cli import app
from gist.history import RoundRecord
from gist.partition.rules.registry import _RULES

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
CLI_PAGE = DOCS / "cli.md"
COMMANDS = typer.main.get_command(app).commands

# A plain block, or one that the build of the documentation executes.
_CODE = re.compile(r"^```(?:python|\{code-cell\}[^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SLOW = {
    "asyncdrop.md",
    "first_run.md",
    "ist.md",
    "link_prediction.md",
    "loft.md",
    "resist.md",
    "theory.md",
}


def code_blocks(page: Path) -> Iterator[tuple[int, str]]:
    """Line number and code of each block of Python on a page."""
    text = page.read_text(encoding="utf-8")
    for found in _CODE.finditer(text):
        code = re.sub(r"^:.*$", "", found[1], flags=re.MULTILINE)  # options of a cell
        yield text.count("\n", 0, found.start(1)), code


def run_page(page: Path) -> None:
    """Runs the blocks of a page in order in one namespace; errors point to the line on the page."""
    namespace = {"__name__": page.stem}
    for line, code in code_blocks(page):
        exec(compile("\n" * line + code, str(page), "exec"), namespace)


def pages() -> list[Path]:
    written = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
    ignored = ("_build", "generated", "jupyter_execute")
    kept = [p for p in written if not any(part in p.parts for part in ignored)]
    return [p for p in kept if p.exists() and any(code_blocks(p))]


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(
            page,
            id=str(page.relative_to(ROOT)),
            marks=[pytest.mark.slow] if page.name in _SLOW else [],
        )
        for page in pages()
    ],
)
def test_the_code_on_the_page_runs(page, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)  # pages write runs
    with matplotlib.rc_context({"backend": "agg"}):
        run_page(page)
    plt.close("all")  # figures of pyplot outlive their page


def test_errors_in_code_point_to_the_page(tmp_path):
    page = tmp_path / "page.md"
    plain, cell = "```python\na = 1\n```\n", "```{code-cell} ipython3\n:tags: [x]\na / 0\n```\n"
    page.write_text(f"# Title\n\n{plain}\n{cell}")
    with pytest.raises(ZeroDivisionError) as raised:
        run_page(page)
    assert raised.traceback[-1].path == page
    assert raised.traceback[-1].lineno + 1 == 9


def section(command: str) -> str:
    """The part of the page about one command."""
    _, found, rest = CLI_PAGE.read_text(encoding="utf-8").partition(f"\n## `gist {command}`")
    assert found, f"docs/cli.md has no section '## `gist {command}`'"
    return rest.partition("\n## ")[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_on_the_page_and_no_other(command):
    parameters = COMMANDS[command].params
    known = {name for p in parameters for name in (*p.opts, *p.secondary_opts) if "-" in name}
    wanted = {p.opts[0] for p in parameters if p.param_type_name == "option"}
    table = "\n".join(line for line in section(command).splitlines() if line.startswith("| `-"))
    named = set(re.findall(r"`(--[a-z-]+)", table))
    assert wanted - named == set()
    assert named - known == set()
    arguments = [p.name.upper() for p in parameters if p.param_type_name == "argument"]
    assert all(f"`{name}`" in section(command) for name in arguments)


def test_every_command_is_on_the_page():
    on_page = re.findall(r"^## `gist (\w+)`", CLI_PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(on_page) == sorted(COMMANDS)


def fields_named(command: str) -> set[str]:
    return set(re.findall(r"^\| `(\w+)`", section(command), re.MULTILINE))


def test_every_field_that_train_writes_is_on_the_page(tmp_path):
    arguments = ["train", "digits", "--fast-dev-run", "--json", "-", "--out", str(tmp_path)]
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 0, outcome.output
    assert set(json.loads(outcome.stdout)) - fields_named("train") == set()
    written = {path.name for path in tmp_path.iterdir()}
    assert all(f"`{name}`" in section("train") for name in written)


def test_every_field_that_compare_writes_is_on_the_page(tmp_path):
    arguments = ["compare", "digits", "--fast-dev-run", "--subnets", "2", "--json", "-"]
    outcome = CliRunner().invoke(app, [*arguments, "--hidden", "16"])
    assert outcome.exit_code == 0, outcome.output
    table = json.loads(outcome.stdout)
    assert (set(table) | set(table["rows"][0])) - fields_named("compare") == set()


def keys_within(value: object) -> set[str]:
    """The keys of an object and of all objects in it."""
    if not isinstance(value, dict):
        return set()
    return set(value).union(*(keys_within(inner) for inner in value.values()))


_SIZES = ["--nodes", "500", "--edges", "2000", "--features", "8", "--classes", "3"]


@pytest.mark.parametrize(
    "options",
    [
        [*_SIZES, "--executor", "auto", "--optimizer-state", "carry", "--workers", "2"],
        [*_SIZES, "--store", "disk", "--checkpoint-every", "1"],
        ["digits-images"],
        ["speech-commands"],
    ],
)
def test_every_field_that_plan_writes_is_on_the_page(options):
    outcome = CliRunner().invoke(app, ["plan", *options, "--hidden", "16", "--json", "-"])
    assert outcome.exit_code == 0, outcome.output
    plan = json.loads(outcome.stdout)
    data, disk = plan.pop("data"), plan.pop("disk")
    assert (keys_within(plan) | {"data", "disk"}) - fields_named("plan") == set()
    assert all(f"`{name}`" in section("plan") for name in [*data, *disk])


def test_every_field_that_doctor_writes_is_on_the_page():
    outcome = CliRunner().invoke(app, ["doctor", "--json", "-"])
    assert outcome.exit_code == 0, outcome.output
    diagnosis = json.loads(outcome.stdout)
    assert (set(diagnosis) | set(diagnosis["checks"][0])) - fields_named("doctor") == set()


def test_every_field_of_the_history_is_on_the_page():
    assert set(RoundRecord.__dataclass_fields__) - fields_named("train") == set()


def test_every_public_module_is_in_the_reference():
    """A package is listed with all that is in it where its block is recursive."""
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    listed: set[str] = set()
    whole: set[str] = set()
    for block in re.findall(r"\.\. autosummary::\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        names = set(re.findall(r"^   (gist[\w.]*)$", block, re.MULTILINE))
        assert not names & listed, "each once"
        listed |= names
        whole |= names if ":recursive:" in block else set()
    modules = {
        module.name
        for module in pkgutil.walk_packages(gist.__path__, "gist.")
        if not any(part.startswith("_") for part in module.name.split("."))
    }
    assert listed - modules == set()
    covered = {name for name in modules if any(f"{name}.".startswith(f"{w}.") for w in whole)}
    # The command line is documented by its options.
    assert modules - listed - covered == {"gist.cli"}


def test_every_layer_with_a_rule_is_on_the_page():
    """Rules of optional packages are there once one of their layers was met."""
    text = (DOCS / "custom_layers.md").read_text(encoding="utf-8")
    _, _, table = text.partition("\n## Layers that are known\n")
    named = set(re.findall(r"`(\w+)`", table.partition("\n## ")[0]))
    known = {kind for kind in _RULES if kind.__module__.partition(".")[0] in ("torch", "gist")}
    known |= {kind for kind in _RULES if kind.__module__.startswith("torch_geometric.")}
    assert nn.Linear in known
    assert {kind.__name__ for kind in known} - named == set()


def test_the_tests_that_the_design_names_exist():
    text = (DOCS / "design.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text))
    assert named
    for path, name in sorted(named):
        assert (ROOT / path).is_file(), path
        assert not name or f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), (path, name)


def test_the_layout_in_the_design_is_that_of_the_package():
    tree = (DOCS / "design.md").read_text(encoding="utf-8").partition("```\ngist/\n")[2]
    listed, package = set(), ""
    for indent, name in re.findall(r"^( {2,4})(\w+(?:\.py|/)) ", tree, re.MULTILINE):
        package = "" if len(indent) == 2 else package
        listed.add(package + name)
        package = name if len(indent) == 2 and name.endswith("/") else package
    sources = [path.relative_to(ROOT / "gist") for path in (ROOT / "gist").rglob("*.py")]
    exist = {str(p) for p in sources if p.name != "__init__.py"} | {
        f"{p.parent}/" for p in sources if p.name == "__init__.py" and p.parent.name
    }
    told_in_parts = {name.partition("/")[0] for name in listed if name[-1] != "/" and "/" in name}
    wanted = {
        name
        for name in exist
        if "/" not in name[:-1] or (name.count("/") < 2 and name.partition("/")[0] in told_in_parts)
    }
    assert listed - exist == set()
    assert wanted - listed == set()
