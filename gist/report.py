"""A report of finished runs: PNG figures and one HTML page that needs nothing but itself."""

from __future__ import annotations

import base64
import inspect
import math
import textwrap
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
from gist.federated.answers import Answers, read_answers
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
    answers: list[Answers | None] = []
    names = [folder.resolve().name for folder in folders]
    for folder, name in zip(folders, names, strict=True):
        if (folder / "table.json").is_file():
            table = read_comparison(folder)
            tables.append(table)
            for row in table["rows"]:
                label = plots.row_label(row)
                runs += [read_run(folder / run, label=label) for run in row["runs"]]
                answers += [None] * len(row["runs"])
        else:
            run = read_run(folder, name=name if names.count(name) == 1 else str(folder))
            runs.append(run)
            answers.append(read_answers(folder, run.result) if _is_federated(run) else None)
    if len(tables) > 1:
        raise DataError("a report holds one comparison at most", got=f"{len(tables)} of them")
    if not runs:
        raise DataError("a comparison without any run", got=folders[0])

    page = _Page(runs, answers, tables[0] if tables else None)
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

    def __init__(
        self,
        runs: Sequence[Run],
        answers: Sequence[Answers | None],
        table: Mapping[str, Any] | None,
    ) -> None:
        self.runs, self.answers, self.table = runs, answers, table
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
        clock = result.history[-1].clock
        counted = "" if clock is None else f" and {plots.seconds_text(clock)} of the clock"
        return (
            f"{which}: test {metric} {_percent(result.test_metric).text} at validation {metric} "
            f"{_percent(result.val_metric).text}, after {plots.seconds_text(result.seconds)} "
            f"of training{counted}."
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
            *self._clients(head),
            Section(
                title="Curves",
                figure=images["curves"],
                caption="Mean training loss of the subnets, and validation metric of the merged "
                f"model. A ring marks the best round.{self._clocked}",
            ),
            self._partition(images),
            Section(
                title="Cost",
                figure=images["cost"],
                caption="Left: where the time went. Right: parameters that a subnet of the last "
                "round trains, as a share of the global model.",
                head=head,
                rows=self._rows(_COST if None in self.answers else _FEDERATED_COST),
            ),
            Section(title="Settings", head=head, rows=self._settings()),
            Section(
                title="Versions and command",
                text="" if known else "The command is not recorded: the run was started in Python.",
                head=head,
                rows=self._described([run.config["versions"] for run in self.runs]),
                commands=known,
            ),
        ]

    def _rows(self, columns: Mapping[str, Callable[[TrainResult], Cell]]) -> list[Row]:
        return [
            Row(name, [cell(run.result) for run in self.runs]) for name, cell in columns.items()
        ]

    def _clients(self, head: Sequence[str]) -> Iterable[Section]:
        if not any(self.answers):
            return
        counted = {kind for known in self.answers if known for kind in known.events}
        kinds = dict.fromkeys([*_WRONG, *sorted(counted - {"sent", "merged"})])
        metric = self.metric.replace("_", " ")
        columns: dict[str, Callable[[Answers], Cell]] = {
            **_CLIENTS,
            f"{metric} on clients' own data, mean": lambda a: _share(a.mean),
            f"{metric} on clients' own data, worst": lambda a: _share(a.worst),
            "clients' own data": lambda a: _plain(a.measured_on),
            **{f"answers {kind}" if kind in _WRONG else kind: _happened(kind) for kind in kinds},
        }
        yield Section(
            title="Clients",
            text="A round is a merge of the server. The clock is that of clients and network; "
            "training time is what this machine took.",
            head=head,
            rows=[
                Row(name, [Cell("–") if known is None else cell(known) for known in self.answers])
                for name, cell in columns.items()
            ],
        )

    @property
    def _clocked(self) -> str:
        """What the caption of the curves says of the clock."""
        if not any(self.answers):
            return ""
        alone = "" if all(self.answers) else ", which the federated runs alone have"
        return f" On the right, against the clock{alone}."

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
        others = [run for run, sent in zip(self.runs, self.answers, strict=True) if sent is None]
        if not others:
            why = "Not drawn: a client holds what its server's strategy sends it."
        elif all(record.num_subnets == 1 for run in others for record in run.result.history):
            why = "The model was never split: every round had one subnet."
        else:
            names = dict.fromkeys(str(r.config["settings"]["sampler"]["name"]) for r in others)
            why = f"Not drawn: the sampler {', '.join(names)} is not one of the package."
        if 0 < len(others) < len(self.runs):
            why += " Federated runs are not drawn: a client holds what its server sends it."
        return Section(title="Partition", text=why)

    def _settings(self) -> list[Row]:
        rows = [
            Row(label, [_plain(run.config.get(key)) for run in self.runs])
            for label, key in _HEADLINES.items()
        ]
        rows += self._described([run.config["model_settings"] for run in self.runs])
        rows += self._described([settings_of(run) for run in self.runs])
        return list({row.label: row for row in reversed(rows)}.values())[::-1]  # the first counts

    def _described(self, parts: Sequence[Mapping[str, Any]]) -> list[Row]:
        """One row for each key of the mappings, of which each run has one."""
        keys = dict.fromkeys(key for values in parts for key in values)
        return [
            Row(key.replace("_", " "), [_plain(values.get(key), key) for values in parts])
            for key in keys
        ]


def _percent(value: float) -> Cell:
    return Cell(f"{100 * value:.2f}%", value)


def _share(value: float | None) -> Cell:
    return Cell("–") if value is None or math.isnan(value) else _percent(value)


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


def _happened(kind: str) -> Callable[[Answers], Cell]:
    return lambda answers: _count(answers.events.get(kind, 0) if answers.events else None)


def _staleness(answers: Answers) -> Cell:
    mean = answers.mean_staleness
    text = "–" if mean is None else f"{mean:.2f} merges, at most {max(answers.staleness)}"
    return Cell(text, mean)


def _per_client(answers: Answers) -> Cell:
    each = answers.per_client
    if not each:
        return Cell("–")
    idle = f"{each.count(0):,} of {len(each):,} clients had none"
    return Cell(f"{min(each):,} to {max(each):,}; {idle}")


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

_FEDERATED_COST = {name: cell for name, cell in _COST.items() if not name.startswith("bytes")}
"""Bytes are among the rows of clients."""

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


_WRONG = ("lost", "refused", "repeated")
"""Events that are told of every federated run, none or some."""

_CLIENTS: dict[str, Callable[[Answers], Cell]] = {
    "clock": lambda a: Cell("–") if a.clock is None else _seconds(a.clock),
    "merges": lambda a: _count(a.merges),
    "bytes down, to clients": lambda a: _bytes(a.bytes_down),
    "bytes up, from clients": lambda a: _bytes(a.bytes_up),
    "tasks sent": _happened("sent"),
    "answers merged": _happened("merged"),
    "answers merged, by client": _per_client,
    "answers that held the rarest unit": lambda a: _count(a.least_coverage),
    "mean staleness": _staleness,
}

_IDLE_ANYWHERE = (
    *("num_subnets", "sampler", "optimizer_state", "store", "executor", "capacities"),
    *("shared_batches", "backend", "worker_timeout", "memory_limit"),
)
_IDLE = {
    "federated": _IDLE_ANYWHERE,
    "flower": (
        *(*_IDLE_ANYWHERE, "epochs", "depth_correction", "compile", "early_stopping"),
        *("recalibrate_bn", "deterministic", "fast_dev_run", "checkpoint_every"),
    ),
}
"""Settings that play no part in a federated run, by executor."""


def _is_federated(run: Run) -> bool:
    return run.config["executor"] in _IDLE


def settings_of(run: Run) -> dict[str, Any]:
    """Those that play a part, of a federated run with those of its clients first."""
    settings: dict[str, Any] = run.config["settings"]
    if not _is_federated(run):
        return settings
    own = {**run.config.get("federated", {}), **settings}
    idle = set(_IDLE[run.config["executor"]])
    if own.get("duration") is not None:
        idle |= {"epochs"} if own.get("rounds") else {"epochs", "rounds"}
    own = {key: value for key, value in own.items() if key not in idle}
    texts = {key: own[key] for key in ("strategy", "split", "fleet") if key in own}
    return own | {k: textwrap.shorten(str(v), 200, placeholder=" …") for k, v in texts.items()}


def _was_dealt(run: Run) -> bool:
    """Whether units were dealt to several subnets, by a sampler that can be run again."""
    if _is_federated(run):
        return False
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
