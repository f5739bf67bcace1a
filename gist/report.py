"""A report of finished runs: PNG figures and one HTML page that needs nothing but itself."""

from __future__ import annotations

import base64
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure

from gist import plots
from gist.checkpoint import write_atomically
from gist.errors import ConfigError, DataError, PartitionError
from gist.history import TrainResult
from gist.partition import samplers
from gist.partition.samplers import Sampler
from gist.runs import Run, read_comparison, read_run


@dataclass(frozen=True)
class Cell:
    """A value as text and, where it is a number, exactly."""

    text: str
    value: float | None = None


@dataclass(frozen=True)
class Row:
    """One row of a table on the page."""

    label: str
    cells: list[Cell]

    @cached_property
    def merged(self) -> list[Cell]:
        """One cell where all are alike."""
        return self.cells[:1] if len(set(self.cells)) == 1 else self.cells


@dataclass(frozen=True, kw_only=True)
class Section:
    """One part of the page: text, a figure (PNG, base64), a table, commands; any may be empty."""

    title: str
    text: str = ""
    figure: str = ""
    caption: str = ""
    head: Sequence[str] = ()
    rows: Sequence[Row] = ()
    commands: Sequence[str] = ()


def write_report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Writes ``report.html`` and the figures in it as PNG files.

    Args:
        folders: Run directories, and at most one directory of a comparison, which brings its runs.
        out: Receives ``report.html``, ``curves.png``, ``cost.png``, where units were dealt
            ``partition.png``, and ``comparison.png`` of a comparison. The first of ``folders`` by
            default.

    Returns:
        The path of the page. It holds its figures and loads nothing.

    Raises:
        DataError: a folder is no run, or a file in it is missing or damaged. Nothing is written.
    """
    folders = [Path(folder) for folder in folders]
    if not folders:
        raise DataError("a report needs at least one run directory", got="none")
    runs, tables = [], []
    names = [folder.resolve().name for folder in folders]
    for folder, name in zip(folders, names, strict=True):
        if (folder / "table.json").is_file():
            table = read_comparison(folder)
            tables.append(table)
            for row in table["rows"]:
                label = plots.row_label(row)
                runs += [read_run(folder / run, label=label) for run in row["runs"]]
        else:
            runs.append(read_run(folder, name=name if names.count(name) == 1 else str(folder)))
    if len(tables) > 1:
        raise DataError("a report holds one comparison at most", got=f"{len(tables)} of them")
    if not runs:
        raise DataError("a comparison without any run", got=folders[0])

    page = _Page(runs, tables[0] if tables else None)
    figures = page.figures()
    target = folders[0] if out is None else Path(out)
    images = {
        name: base64.b64encode(plots.save_figure(figure, target / f"{name}.png")).decode()
        for name, figure in figures.items()
    }
    template = files("gist").joinpath("report_page.html.j2").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    html = environment.from_string(template).render(
        title=page.title, subtitle=page.subtitle, sections=page.sections(images)
    )
    write_atomically(target / "report.html", html)
    return target / "report.html"


class _Page:
    """Text and figures of a report."""

    def __init__(self, runs: Sequence[Run], table: Mapping[str, Any] | None) -> None:
        self.runs, self.table = runs, table
        self.metric = str(table["metric"] if table else runs[0].config.get("metric", "metric"))
        self.labelled = [(run.label, run.result) for run in runs]
        self.dealt = next((run for run in runs if _was_dealt(run)), None)

    @property
    def title(self) -> str:
        """Dataset, models and methods."""
        configs = [run.config for run in self.runs]
        dataset, model, method = (
            ", ".join(dict.fromkeys(str(config[key]) for config in configs if key in config))
            for key in ("dataset", "model", "method")
        )
        return f"{dataset or 'Unnamed data'}: {model}" + (f" ({method})" if method else "")

    @property
    def subtitle(self) -> str:
        """The runs in one line."""
        best = max(self.runs, key=lambda run: run.result.val_metric)
        result, metric = best.result, self.metric.replace("_", " ")
        which = f"Best of {len(self.runs)} runs, {best.name}" if len(self.runs) > 1 else "One run"
        return (
            f"{which}: test {metric} {_percent(result.test_metric).text} at validation {metric} "
            f"{_percent(result.val_metric).text}, after {plots.seconds_text(result.seconds)} "
            "of training."
        )

    def figures(self) -> dict[str, Figure]:
        """Figures by the name of their file."""
        figures = {
            "curves": plots.curves(self.labelled, metric=self.metric),
            "cost": plots.cost_plot(self.labelled),
        }
        if self.dealt is not None:
            config, sampler = self.dealt.config, _sampler(self.dealt)
            assert sampler is not None, "checked by _was_dealt"
            history, seed = self.dealt.result.history, config["settings"]["seed"]
            try:
                held = plots.held_units(config["groups"], sampler, history, seed=seed)
            except PartitionError as error:
                raise DataError(
                    f"history.jsonl of {self.dealt.name} does not fit its config.json", got=error
                ) from error
            figures["partition"] = plots.partition_heatmap(held)
        if self.table is not None:
            figures["comparison"] = plots.comparison(self.table)
        return figures

    def sections(self, images: Mapping[str, str]) -> list[Section]:
        """The page, given the figures as base64."""
        head = ("", *(run.name for run in self.runs)) if len(self.runs) > 1 else ()
        commands = [self.table] if self.table else [run.config for run in self.runs]
        known = list(dict.fromkeys(str(c["command"]) for c in commands if c.get("command")))
        return [
            *self._comparison(images),
            Section(
                title="Result",
                text="The model kept is that of the round with the best validation metric.",
                head=head,
                rows=self._rows(_RESULT),
            ),
            Section(
                title="Curves",
                figure=images["curves"],
                caption="Mean training loss of the subnets, and validation metric of the merged "
                "model. A ring marks the best round.",
            ),
            self._partition(images),
            Section(
                title="Cost",
                figure=images["cost"],
                caption="Left: where the time went. Right: parameters that a subnet of the last "
                "round trains, as a share of the global model.",
                head=head,
                rows=self._rows(_COST),
            ),
            Section(title="Settings", head=head, rows=self._settings()),
            Section(
                title="Versions and command",
                text="" if known else "The command is not recorded: the run was started in Python.",
                head=head,
                rows=self._described("versions"),
                commands=known,
            ),
        ]

    def _rows(self, columns: Mapping[str, Callable[[TrainResult], Cell]]) -> list[Row]:
        return [
            Row(name, [cell(run.result) for run in self.runs]) for name, cell in columns.items()
        ]

    def _comparison(self, images: Mapping[str, str]) -> Iterable[Section]:
        if self.table is None:
            return
        yield Section(
            title="Comparison",
            figure=images["comparison"],
            caption="Mean and standard deviation over seeds; speedup is against the median time "
            "of the full model.",
            head=["method", *_COMPARISON],
            rows=[
                Row(plots.row_label(row), [cell(row) for cell in _COMPARISON.values()])
                for row in self.table["rows"]
            ],
        )

    def _partition(self, images: Mapping[str, str]) -> Section:
        if self.dealt is not None:
            of = f" of {self.dealt.name}" if len(self.runs) > 1 else ""
            return Section(
                title="Partition",
                figure=images["partition"],
                caption=f"Which subnet{of} held which unit, round by round, drawn again from the "
                "seed. Each panel is one group of units.",
            )
        if all(record.num_subnets == 1 for run in self.runs for record in run.result.history):
            why = "The model was never split: every round had one subnet."
        else:
            names = dict.fromkeys(str(r.config["settings"]["sampler"]["name"]) for r in self.runs)
            why = f"Not drawn: the sampler {', '.join(names)} is not one of the package."
        return Section(title="Partition", text=why)

    def _settings(self) -> list[Row]:
        rows = [
            Row(label, [_plain(run.config.get(key)) for run in self.runs])
            for label, key in _HEADLINES.items()
        ]
        rows += self._described("model_settings") + self._described("settings")
        return list({row.label: row for row in reversed(rows)}.values())[::-1]  # the first counts

    def _described(self, part: str) -> list[Row]:
        """One row for each key of a mapping in the configs."""
        parts = [run.config[part] for run in self.runs]
        keys = dict.fromkeys(key for values in parts for key in values)
        return [
            Row(key.replace("_", " "), [_plain(values.get(key), key) for values in parts])
            for key in keys
        ]


def _percent(value: float) -> Cell:
    return Cell(f"{100 * value:.2f}%", value)


def _spread(row: Mapping[str, Any], split: str) -> Cell:
    mean, std = row[f"{split}_mean"], row[f"{split}_std"]
    text = f"{100 * mean:.2f} ± {100 * std:.2f}%" if row["seeds"] != 1 else f"{100 * mean:.2f}%"
    return Cell(text, mean)


def _seconds(value: float) -> Cell:
    return Cell(plots.seconds_text(value), value)


def _timed(part: Callable[[TrainResult], float]) -> Callable[[TrainResult], Cell]:
    return lambda result: _seconds(part(result))


def _count(value: float | None) -> Cell:
    return Cell("–") if value is None else Cell(f"{value:,}", value)


def _bytes(value: int | None) -> Cell:
    return Cell("–") if value is None else Cell(f"{value / 2**20:,.1f} MiB", value)


def _largest(per_subnet: Any) -> Any:
    return max(per_subnet) if isinstance(per_subnet, list | tuple) else per_subnet


def _plain(value: Any, key: str = "") -> Cell:
    """A JSON value as text."""
    if value is None:
        return Cell("–")
    if isinstance(value, bool):
        return Cell("yes" if value else "no")
    if isinstance(value, int | float):
        return Cell(str(value), value)
    if key == "num_subnets":
        return Cell(plots.subnets_text(value))
    if isinstance(value, dict):
        name = value.get("name", "")
        items = ", ".join(f"{k}={_plain(v).text}" for k, v in value.items() if k != "name")
        return Cell(f"{name}({items})" if name else items or "none")
    if isinstance(value, list):
        return Cell(", ".join(_plain(item).text for item in value) or "none")
    return Cell(str(value))


_HEADLINES = {
    "dataset": "dataset",
    "method": "method",
    "model": "model",
    "executor used": "executor",
    "unit groups": "groups",
    "data fingerprint": "data",
}

_RESULT: dict[str, Callable[[TrainResult], Cell]] = {
    "best round": lambda r: Cell(f"{r.best.round + 1} of {len(r.history)}", r.best.round + 1),
    "validation metric, best round": lambda r: _percent(r.val_metric),
    "test metric, best round": lambda r: _percent(r.test_metric),
    "test metric, last round": lambda r: _percent(r.last_test_metric),
    "training time": lambda r: _seconds(r.seconds),
    "evaluation time": lambda r: _seconds(r.eval_seconds),
    "repartition, share of training": lambda r: Cell(
        f"{r.repartition_seconds / r.seconds:.1%}" if r.seconds else "–", r.repartition_seconds
    ),
    "peak memory": lambda r: _bytes(r.peak_memory_bytes),
    "parameters": lambda r: _count(r.num_parameters),
}

_COST: dict[str, Callable[[TrainResult], Cell]] = {
    **{f"{part} time": _timed(seconds) for part, seconds in plots.SECONDS.items()},
    "bytes sent": lambda r: _bytes(r.bytes_sent),
    "bytes received": lambda r: _bytes(r.bytes_received),
    "peak memory": lambda r: _bytes(r.peak_memory_bytes),
    "parameters": lambda r: _count(r.num_parameters),
    "parameters of the largest subnet, last round": lambda r: _count(max(r.parameters_per_subnet)),
    "rounds": lambda r: _count(len(r.history)),
}

_COMPARISON: dict[str, Callable[[Mapping[str, Any]], Cell]] = {
    "seeds": lambda row: _count(row["seeds"]),
    "validation": lambda row: _spread(row, "val"),
    "test": lambda row: _spread(row, "test"),
    "time": lambda row: _seconds(row["seconds"]),
    "speedup": lambda row: (
        Cell("–") if row["speedup"] is None else Cell(f"{row['speedup']:.2f}×", row["speedup"])
    ),
    "peak memory": lambda row: _bytes(row["peak_memory_bytes"]),
    "parameters": lambda row: _count(row["num_parameters"]),
    "per subnet": lambda row: _count(_largest(row["parameters_per_subnet"])),
}


def _was_dealt(run: Run) -> bool:
    """Whether units were dealt to several subnets, by a sampler that can be run again."""
    several = any(record.num_subnets > 1 for record in run.result.history)
    return several and bool(run.config["groups"]) and _sampler(run) is not None


def _sampler(run: Run) -> Sampler | None:
    """The sampler of a run, or None for one from outside the package."""
    arguments = dict(run.config["settings"]["sampler"])
    found = getattr(samplers, str(arguments.pop("name")), None)
    if not (inspect.isclass(found) and issubclass(found, Sampler)) or inspect.isabstract(found):
        return None
    try:
        return found(**arguments)
    except (TypeError, ConfigError) as error:
        raise DataError(f"config.json of {run.name} is damaged: sampler", got=error) from error
