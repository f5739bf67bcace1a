"""The ``gist`` command."""

from __future__ import annotations

import inspect
import json
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import torch
import typer
from rich.console import Console
from rich.table import Table

import gist
from gist.catalog.cards import table as card_table
from gist.catalog.places import data_folders, sums_known
from gist.checkpoint import write_atomically
from gist.compare import compare as run_comparison
from gist.compare import differing_settings, write_run_config
from gist.compare import render as render_comparison
from gist.config import (
    BACKENDS,
    EVALUATIONS,
    EXECUTORS,
    OPTIMIZER_STATES,
    OPTIMIZERS,
    PRECISIONS,
    SCHEDULES,
    STORES,
    SubnetSchedule,
)
from gist.costs.costs import render as render_costs
from gist.datasets import find_card, load_dataset, prepare_dataset
from gist.errors import ConfigError, GistError
from gist.execution.comm import is_launched, local_device
from gist.experiment import BASELINES, METHODS, MODELS, Experiment, plan_run
from gist.families.federated import FEDERATED_SETTINGS
from gist.families.graphs import HEADS
from gist.federated.fleet import FLEETS
from gist.federated.splits import SPLITS
from gist.federated.strategies import STRATEGIES
from gist.graph.clusters import Cluster
from gist.graph.data import GraphData
from gist.graph.layout import keep_layout, keep_training_graph
from gist.launch import launch

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_console = Console()
_errors = Console(stderr=True)

Dataset = Annotated[
    str,
    typer.Argument(help="Name of a dataset, as `gist prepare --list` prints, or path of a graph."),
]
DataOption = Annotated[
    list[str] | None,
    typer.Option("--data", help="Option of the dataset, NAME=VALUE; may be repeated."),
]
MethodOption = Annotated[
    str | None,
    typer.Option(
        "--method",
        help=f"One of {', '.join(METHODS)}; by default the subnet training that data and model are "
        "made for.",
    ),
]
Model = Annotated[str | None, typer.Option(help=f"One of {', '.join(MODELS)}.")]
Hidden = Annotated[int | None, typer.Option(help="Width of every hidden layer.")]
Layers = Annotated[int | None, typer.Option(help="Number of layers.")]
NormOption = Annotated[str | None, typer.Option(help="layer, batch or none.")]
DropoutOption = Annotated[float | None, typer.Option(help="Dropout probability.")]
Heads = Annotated[int | None, typer.Option(help=f"Attention heads of a GAT; {HEADS} by default.")]
LocalSteps = Annotated[int | None, typer.Option(help="Steps of every subnet between two merges.")]
Epochs = Annotated[float | None, typer.Option(help="Total budget, split over the subnets.")]
Rounds = Annotated[int | None, typer.Option(help="Budget as a number of rounds instead.")]
OptimizerOption = Annotated[str | None, typer.Option(help=f"One of {', '.join(OPTIMIZERS)}.")]
Lr = Annotated[float | None, typer.Option("--lr", help="Base learning rate.")]
WeightDecay = Annotated[float | None, typer.Option(help="Weight decay.")]
Schedule = Annotated[str | None, typer.Option(help=f"Learning rate: {', '.join(SCHEDULES)}.")]
OptimizerState = Annotated[
    str | None, typer.Option(help=f"Between rounds: {' or '.join(OPTIMIZER_STATES)}.")
]
ExecutorOption = Annotated[
    str | None, typer.Option(help=f"Where subnets run: {', '.join(EXECUTORS)}.")
]
SharedBatches = Annotated[
    bool | None, typer.Option(help="All subnets see the same batches, or each its own.")
]
MemoryLimit = Annotated[
    str | None, typer.Option(help="Memory the run may take, such as 8GiB; default: what is free.")
]
KeepBest = Annotated[
    bool, typer.Option(help="Hand back the best validation round's model, or the last one's.")
]
StoreOption = Annotated[
    str | None,
    typer.Option(help=f"Where the parameters live: {' or '.join(STORES)}; disk needs --out."),
]
Precision = Annotated[str | None, typer.Option(help=f"One of {', '.join(PRECISIONS)}.")]
CompileOption = Annotated[bool, typer.Option("--compile", help="Use torch.compile.")]
Clusters = Annotated[int | None, typer.Option(help="Cut the graph into so many clusters.")]
ClustersPerBatch = Annotated[int | None, typer.Option(help="Clusters of a batch.")]
EvaluationOption = Annotated[
    str | None, typer.Option("--evaluation", help=f"One of {', '.join(EVALUATIONS)}.")
]
Inductive = Annotated[
    bool | None, typer.Option(help="Train on the subgraph of the training nodes alone, or not.")
]
BatchSize = Annotated[int | None, typer.Option(help="Samples of a step; not of graphs.")]
Shards = Annotated[
    bool | None, typer.Option(help="Each subnet sees its own share of the samples alone, or all.")
]
SampledOutputs = Annotated[
    int | None, typer.Option(help="Take the loss over so many outputs, drawn in every step.")
]
Stages = Annotated[
    str | None, typer.Option(help="resist: stages whose blocks are dealt, with commas.")
]
MinBlocks = Annotated[
    int | None, typer.Option(help="resist: blocks of a stage that a subnet holds at least.")
]
WarmupRounds = Annotated[
    int | None, typer.Option(help="resist: rounds at the start with whole models, by local SGD.")
]
ClientsOption = Annotated[int | None, typer.Option("--clients", help="federated: how many.")]
InFlight = Annotated[int | None, typer.Option(help="federated: clients that work at a time.")]
SplitOption = Annotated[
    str | None,
    typer.Option("--split", help=f"federated: who has which data: {', '.join(SPLITS)}, clusters."),
]
FleetOption = Annotated[
    str | None, typer.Option("--fleet", help=f"federated: clients' speeds: {', '.join(FLEETS)}.")
]
StrategyOption = Annotated[
    str | None, typer.Option("--strategy", help=f"federated: one of {', '.join(STRATEGIES)}.")
]
Capacity = Annotated[
    str | None,
    typer.Option(help="federated: share of the units that a client trains, or levels with commas."),
]
Duration = Annotated[
    float | None, typer.Option(help="federated: the budget as seconds of the clock.")
]
TimeoutOption = Annotated[
    float | None,
    typer.Option("--timeout", help="federated: seconds to wait for a client."),
]
ClipNorm = Annotated[float | None, typer.Option(help="Largest gradient norm.")]
EarlyStopping = Annotated[
    int | None, typer.Option(help="Stop after so many evaluations without improvement.")
]
EvalEvery = Annotated[int | None, typer.Option(help="Evaluate after every so many rounds.")]
Workers = Annotated[
    int | None,
    typer.Option(min=1, help="Start so many processes on this machine, and train in all of them."),
]
MaxRestarts = Annotated[
    int,
    typer.Option(min=0, help="Start all workers again, at the last checkpoint, when one has died."),
]
Capacities = Annotated[
    str | None,
    typer.Option(help="Relative speeds of the workers, with commas, or measured: sizes subnets."),
]
Backend = Annotated[
    str | None, typer.Option(help=f"What workers talk through: {' or '.join(BACKENDS)}.")
]
WorkerTimeout = Annotated[
    float | None, typer.Option(help="Seconds that a worker waits for the others.")
]
Seed = Annotated[int, typer.Option(help="Seed of initialisation and training.")]
Device = Annotated[
    str, typer.Option(help="cpu, or cuda where there is one; each worker takes a GPU of its own.")
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads.")]
JsonFile = Annotated[
    Path | None, typer.Option("--json", help="Write the outcome to this file; - prints it.")
]
FastDevRun = Annotated[bool, typer.Option(help="A smoke run: one round of two steps.")]
Deterministic = Annotated[bool, typer.Option(help="Refuse operations that are not deterministic.")]


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"gist {gist.__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Independent subnet training of graph networks and other wide or deep models."""


@app.command()
def train(
    dataset: Dataset,
    method: MethodOption = None,
    subnets: Annotated[
        str | None,
        typer.Option(help="m (default 4, or the card's), or a schedule: 0.6:8,0.4:1 (share:m)."),
    ] = None,
    data: DataOption = None,
    model: Model = None,
    hidden: Hidden = None,
    layers: Layers = None,
    norm: NormOption = None,
    dropout: DropoutOption = None,
    heads: Heads = None,
    local_steps: LocalSteps = None,
    epochs: Epochs = None,
    rounds: Rounds = None,
    optimizer: OptimizerOption = None,
    lr: Lr = None,
    weight_decay: WeightDecay = None,
    schedule: Schedule = None,
    optimizer_state: OptimizerState = None,
    clusters: Clusters = None,
    clusters_per_batch: ClustersPerBatch = None,
    inductive: Inductive = None,
    evaluation: EvaluationOption = None,
    batch_size: BatchSize = None,
    shards: Shards = None,
    sampled_outputs: SampledOutputs = None,
    stages: Stages = None,
    min_blocks: MinBlocks = None,
    warmup_rounds: WarmupRounds = None,
    strategy: StrategyOption = None,
    clients: ClientsOption = None,
    in_flight: InFlight = None,
    split: SplitOption = None,
    fleet: FleetOption = None,
    capacity: Capacity = None,
    duration: Duration = None,
    timeout: TimeoutOption = None,
    executor: ExecutorOption = None,
    shared_batches: SharedBatches = None,
    memory_limit: MemoryLimit = None,
    store: StoreOption = None,
    keep_best: KeepBest = True,
    precision: Precision = None,
    compile: CompileOption = False,
    clip_norm: ClipNorm = None,
    early_stopping: EarlyStopping = None,
    eval_every: EvalEvery = None,
    checkpoint_every: Annotated[
        int | None, typer.Option(help="Write a checkpoint after every so many rounds; needs --out.")
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="A run's directory: go on from its last checkpoint. auto: --out, if any."
        ),
    ] = None,
    workers: Workers = None,
    max_restarts: MaxRestarts = 0,
    capacities: Capacities = None,
    backend: Backend = None,
    worker_timeout: WorkerTimeout = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory for model, settings, history, checkpoints.")
    ] = None,
    json_file: JsonFile = None,
    seed: Seed = 0,
    device: Device = "cpu",
    threads: Threads = None,
    deterministic: Deterministic = False,
    fast_dev_run: FastDevRun = False,
) -> None:
    """Train one model; settings not given come from the dataset's card, if it has one."""
    parameters = dict(locals())
    _check_launch(workers, max_restarts)
    starts = workers is not None and not is_launched()
    if not starts:  # else a GPU is left to the workers
        device = _use(threads, device)
    experiment = Experiment(
        dataset=dataset,
        method=method,
        data_options=_pairs(data),
        settings={
            **_given(parameters, _TRAIN_SETTINGS),
            **({} if subnets is None else {"num_subnets": parse_subnets(subnets)}),
            "deterministic": deterministic,
            "fast_dev_run": fast_dev_run,
        },
        seed=seed,
    )
    if workers is not None and starts:
        experiment.check_workers(workers)
        raise SystemExit(
            launch(["-m", "gist", *sys.argv[1:]], workers=workers, max_restarts=max_restarts)
        )
    trainer = experiment.trainer(experiment.load_data(), device)
    try:
        result = trainer.fit(resume="auto" if resume == Path("auto") else resume)
    except KeyboardInterrupt:
        if not trainer.comm.is_main:
            raise typer.Exit(130) from None
        kept = out is not None and checkpoint_every is not None
        then = f"go on with --resume {out}" if kept else "nothing was saved: no --checkpoint-every"
        _errors.print(f"interrupted after {len(trainer.history)} rounds; {then}", soft_wrap=True)
        raise typer.Exit(130) from None
    if not trainer.comm.is_main:
        return
    summary = {**experiment.summary(trainer, result), "command": _command()}
    if out is not None:
        write_run_config(out, summary)
    _write_json(json_file, summary)
    if json_file != Path("-"):
        of = f"m = {_subnets_text(trainer.config.num_subnets)}"
        if (clock := trainer.history[-1].clock) is not None:
            merges = len(trainer.history)
            of = f"{merges} merge{'s' * (merges != 1)} in {clock:,.0f} s of the clock"
        _console.print(
            f"{summary['dataset']}, {experiment.method}, {of}: "
            f"{trainer.metric} "
            f"[bold]{100 * result.test_metric:.2f}%[/] test, "
            f"{100 * result.val_metric:.2f}% validation (round {result.best.round + 1} of "
            f"{len(trainer.rounds)}), {result.seconds:.2f} s training, "
            f"{result.peak_memory_bytes / 2**20:,.0f} MiB peak"
        )


@app.command()
def compare(
    dataset: Dataset,
    method: MethodOption = None,
    subnets: Annotated[
        str, typer.Option(help="Values of m, with commas; a schedule as 0.6:8/0.4:1.")
    ] = "1,2,4,8",
    full: Annotated[bool, typer.Option(help="Also train the full model.")] = True,
    baselines: Annotated[
        str, typer.Option(help=f"Also train, with commas: {', '.join(BASELINES)}.")
    ] = "",
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 1,
    data: DataOption = None,
    model: Model = None,
    hidden: Hidden = None,
    layers: Layers = None,
    norm: NormOption = None,
    dropout: DropoutOption = None,
    heads: Heads = None,
    local_steps: LocalSteps = None,
    epochs: Epochs = None,
    rounds: Rounds = None,
    optimizer: OptimizerOption = None,
    lr: Lr = None,
    weight_decay: WeightDecay = None,
    schedule: Schedule = None,
    optimizer_state: OptimizerState = None,
    clusters: Clusters = None,
    clusters_per_batch: ClustersPerBatch = None,
    inductive: Inductive = None,
    evaluation: EvaluationOption = None,
    batch_size: BatchSize = None,
    shards: Shards = None,
    sampled_outputs: SampledOutputs = None,
    stages: Stages = None,
    min_blocks: MinBlocks = None,
    warmup_rounds: WarmupRounds = None,
    executor: ExecutorOption = None,
    shared_batches: SharedBatches = None,
    memory_limit: MemoryLimit = None,
    keep_best: KeepBest = True,
    precision: Precision = None,
    compile: CompileOption = False,
    clip_norm: ClipNorm = None,
    early_stopping: EarlyStopping = None,
    eval_every: EvalEvery = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory for the table, a plot, and every run.")
    ] = None,
    json_file: JsonFile = None,
    seed: Seed = 0,
    device: Device = "cpu",
    threads: Threads = None,
    deterministic: Deterministic = False,
    fast_dev_run: FastDevRun = False,
) -> None:
    """Compare numbers of subnets with the full model: one table, one plot."""
    parameters = {**locals(), "out": None}
    _use(threads, device)
    experiment = Experiment(
        dataset=dataset,
        method=method,
        data_options=_pairs(data),
        settings={
            **_given(parameters, _TRAIN_SETTINGS),
            "deterministic": deterministic,
            "fast_dev_run": fast_dev_run,
        },
        seed=seed,
    )
    quiet = json_file == Path("-")

    def announce(name: str, summary: dict[str, Any]) -> None:
        if not quiet:
            _errors.print(
                f"{name}: test {100 * summary['test_metric']:.2f}%, {summary['seconds']:.2f} s"
            )

    values = [parse_subnets(text.replace("/", ",")) for text in subnets.split(",")]
    table = run_comparison(
        experiment,
        values,
        full=full,
        baselines=[name for name in baselines.split(",") if name],
        seeds=seeds,
        device=device,
        out=out,
        on_run=announce,
    )
    table["command"] = _command()
    if out is not None:
        from gist.plots import comparison, save_figure

        write_atomically(out / "table.json", json.dumps(table, indent=1))
        save_figure(comparison(table), out / "comparison.png")
    _write_json(json_file, table)
    if not quiet:
        _console.print(render_comparison(table))
        if lines := differing_settings(table):
            lines = ["settings that differ, as the dataset's card has them:", *lines]
            _console.print("\n  ".join(lines), soft_wrap=True, highlight=False)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Directories of runs or of a comparison.")],
    out: Annotated[
        Path | None, typer.Option(help="Directory for the report; by default the first run's.")
    ] = None,
) -> None:
    """Write curves, the partition heat map and a cost table: PNGs and one self-contained page."""
    from gist.report import write_report

    _console.print(f"Report: {write_report(runs, out)}", soft_wrap=True)


@app.command()
def theory(
    experiment: Annotated[str, typer.Argument(help="contraction, floors or graph.")],
    dataset: Annotated[
        str | None, typer.Argument(help="graph: a dataset whose assumptions are checked.")
    ] = None,
    vary: Annotated[
        str | None,
        typer.Option(
            help="floors: num_subnets, keep, local_steps, width, lr, scale or delay; the first by "
            "default."
        ),
    ] = None,
    values: Annotated[str | None, typer.Option(help="floors: its values, with commas.")] = None,
    width: Annotated[int | None, typer.Option(help="Neurons; not of graph.")] = None,
    rounds: Annotated[int | None, typer.Option(help="contraction: rounds of each run.")] = None,
    repeats: Annotated[int | None, typer.Option(help="contraction: runs of each scheme.")] = None,
    subnets: Annotated[int | None, typer.Option(help="graph: m.")] = None,
    local_steps: Annotated[int | None, typer.Option(help="graph: ζ.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw a figure into this file.")] = None,
    json_file: JsonFile = None,
    seed: Seed = 0,
    threads: Threads = None,
) -> None:
    """Measure what the theory predicts, or check what it assumes of a graph."""
    from gist.plots import save_figure
    from gist.theory.command import run

    _use(threads, "cpu")
    outcome, shown, figure = run(
        experiment,
        dataset,
        vary=vary,
        values=None if values is None else _counts_or_numbers("values", values),
        width=width,
        rounds=rounds,
        repeats=repeats,
        num_subnets=subnets,
        local_steps=local_steps,
        seed=seed,
    )
    if plot is not None:
        if figure is None:
            raise ConfigError("there is no figure of a graph's report", remedy="leave --plot out")
        save_figure(figure, plot)
    _write_json(json_file, {**outcome, "command": _command()})
    if json_file != Path("-"):
        _console.print(shown, highlight=False)


@app.command()
def doctor(json_file: JsonFile = None) -> None:
    """Say what is installed, which kernels will be used, and why not others."""
    from gist.doctor import diagnose, render

    diagnosis = diagnose()
    _write_json(json_file, asdict(diagnosis))
    if json_file != Path("-"):
        _console.print(render(diagnosis))


def _takes_options_of(
    command: Callable[..., None], *, without: tuple[str, ...]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Adds another command's parameters, but for some, to those of a command with ``**settings``.

    So the two cannot drift apart: what one takes, the other takes.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(command, include_extras=True)
        hints |= get_type_hints(function, include_extras=True)
        own = inspect.signature(function).parameters
        parameters = [p for p in own.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        parameters += [
            parameter
            for name, parameter in inspect.signature(command).parameters.items()
            if name not in {*own, *without}
        ]
        parameters = [p.replace(annotation=hints[p.name]) for p in parameters]
        function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        function.__annotations__ = {p.name: p.annotation for p in parameters}
        return function

    return decorate


@app.command()
@_takes_options_of(
    train,
    without=("resume", "max_restarts", "backend", "worker_timeout", *FEDERATED_SETTINGS),
)
def plan(
    dataset: Annotated[
        str | None,
        typer.Argument(help="Name of a dataset, or path of a graph; none where sizes are given."),
    ] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes of the graph.")] = None,
    edges: Annotated[
        int | None, typer.Option(min=0, help="Its directed edges: an undirected one counts twice.")
    ] = None,
    features: Annotated[int | None, typer.Option(min=1, help="Input features.")] = None,
    classes: Annotated[int | None, typer.Option(min=1, help="Outputs per node.")] = None,
    workers: Annotated[
        int, typer.Option(min=1, help="Processes that the subnets are spread over.")
    ] = 1,
    **settings: Any,
) -> None:
    """Say what a run takes in memory, disk, exchange and computation, before it is started."""
    _use(settings["threads"], settings["device"])
    sizes = {"num_nodes": nodes, "num_edges": edges}
    sizes |= {"num_features": features, "num_classes": classes}
    subnets = settings["subnets"]
    costs = plan_run(
        dataset,
        sizes={name: size for name, size in sizes.items() if size is not None},
        method=settings["method"],
        data_options=_pairs(settings["data"]),
        settings={
            **_given(settings, _TRAIN_SETTINGS),
            **({} if subnets is None else {"num_subnets": parse_subnets(subnets)}),
            "deterministic": settings["deterministic"],
            "fast_dev_run": settings["fast_dev_run"],
        },
        seed=settings["seed"],
        device=settings["device"],
        workers=workers,
    )
    json_file = settings["json_file"]
    _write_json(json_file, {**costs.to_json(), "command": _command()})
    if json_file != Path("-"):
        _console.print(render_costs(costs))


@app.command()
def prepare(
    dataset: Annotated[
        str | None, typer.Argument(help="Name of a dataset, or path of a saved graph.")
    ] = None,
    list_datasets: Annotated[bool, typer.Option("--list", help="List the datasets.")] = False,
    clusters: Annotated[
        int | None,
        typer.Option(help="Also cut the graph into so many clusters, and keep it laid out so."),
    ] = None,
    clusters_per_batch: Annotated[
        int, typer.Option(help="Say what batches of so many clusters keep.")
    ] = 1,
    inductive: Annotated[
        bool, typer.Option(help="Cut the subgraph of the training nodes, or the whole graph.")
    ] = False,
    data: DataOption = None,
) -> None:
    """Download, verify and read a dataset, and cut it: the only command that uses the network."""
    if list_datasets or dataset is None:
        _console.print(_cards())
        return
    options = _pairs(data)
    card = find_card(dataset, options)
    place = None if card is None else prepare_dataset(dataset, **options)
    said = f"is {'a saved graph' if card is None else 'generated'}: nothing to download"
    if card is not None and place is not None:
        said = f"is ready in {place}; {sums_known(card, place)}"
    _console.print(f"{dataset} {said}", soft_wrap=True)
    if clusters is None:
        return
    folder = data_folders(None)[-1] / "clusters"
    graph = load_dataset(dataset, **options)
    if not isinstance(graph, GraphData):
        raise ConfigError(
            "only graphs are cut into clusters", got=dataset, remedy="leave --clusters out"
        )
    graph = keep_training_graph(graph, cache=folder) if inductive else graph
    laid_out = keep_layout(graph, clusters, cache=folder)
    recipe = Cluster(num_parts=clusters, parts_per_batch=clusters_per_batch, cache=folder)
    source = recipe.bind(graph)
    sizes = source.parts.bincount()
    _console.print(
        f"{source.num_clusters} clusters of {int(sizes.min()):,} to {int(sizes.max()):,} nodes, "
        f"{100 * source.edges_within:.1f}% of the edges within them; batches of "
        f"{clusters_per_batch} keep {100 * source.kept_edges:.1f}%; "
        + (f"cut kept in {folder}" if laid_out is None else f"graph laid out in {laid_out}"),
        soft_wrap=True,
    )


def main() -> None:
    """Runs the command line; an error that a user can mend is one line, not a traceback."""
    try:
        app()
    except (GistError, OSError) as error:
        who = f" of worker {os.environ['RANK']}" if is_launched() else ""
        _errors.print(f"[bold red]error[/]{who}: {_escape(str(error))}", soft_wrap=True)
        raise SystemExit(2) from None


def parse_subnets(text: str) -> int | SubnetSchedule:
    """``"8"``, or a schedule ``"0.6:8,0.4:1"`` of (share of the budget, m).

    Raises:
        ConfigError: the text is neither.
    """
    try:
        if ":" not in text:
            return int(text)
        return tuple((float(s), int(m)) for s, m in (part.split(":") for part in text.split(",")))
    except ValueError:
        raise ConfigError(
            "cannot read the number of subnets",
            got=repr(text),
            expected="a number such as 8, or shares of the budget such as 0.6:8,0.4:1",
        ) from None


_TRAIN_SETTINGS = (
    "model",
    "hidden",
    "layers",
    "norm",
    "dropout",
    "heads",
    "local_steps",
    "epochs",
    "rounds",
    "optimizer",
    "lr",
    "weight_decay",
    "schedule",
    "optimizer_state",
    "clusters",
    "clusters_per_batch",
    "inductive",
    "evaluation",
    "batch_size",
    "shards",
    "sampled_outputs",
    "stages",
    "min_blocks",
    "warmup_rounds",
    *FEDERATED_SETTINGS,
    "executor",
    "shared_batches",
    "memory_limit",
    "store",
    "keep_best",
    "precision",
    "compile",
    "clip_norm",
    "early_stopping",
    "eval_every",
    "checkpoint_every",
    "backend",
    "worker_timeout",
    "capacities",
    "out",
)


def _given(parameters: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    given = {name: parameters[name] for name in names if parameters.get(name) is not None}
    if given.get("norm") == "none":
        given["norm"] = None
    if "out" in given:
        given["out"] = str(given["out"])
    if "stages" in given:
        given["stages"] = tuple(given["stages"].split(","))
    if "capacity" in given:
        given["capacity"] = _numbers("capacity", given["capacity"])
    if given.get("capacities", "measured") != "measured":
        given["capacities"] = _numbers("capacities", given["capacities"])
    return given


def _numbers(name: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(
            f"cannot read {name}", got=repr(text), expected="numbers such as 1,0.5"
        ) from None


def _counts_or_numbers(name: str, text: str) -> tuple[int | float, ...]:
    return tuple(int(n) if n == int(n) else n for n in _numbers(name, text))


def _pairs(options: list[str] | None) -> dict[str, Any]:
    pairs: dict[str, Any] = {}
    for option in options or []:
        name, found, value = option.partition("=")
        if not found:
            raise ConfigError("a dataset option needs a value", got=option, expected="NAME=VALUE")
        try:
            pairs[name] = json.loads(value)
        except json.JSONDecodeError:
            pairs[name] = value
    return pairs


def _cards() -> Table:
    (name, what, *others), *rows = card_table()
    listed = Table(box=None, pad_edge=False)
    listed.add_column(name, no_wrap=True)
    for count in others[:4]:
        listed.add_column(count, justify="right", no_wrap=True)
    listed.add_column(f"{what}; {'; '.join(others[4:])}", overflow="fold")
    for name, what, *others in rows:
        listed.add_row(name, *others[:4], "\n".join([what, *others[4:]]))
    return listed


def _check_launch(workers: int | None, max_restarts: int) -> None:
    if max_restarts and workers is None:
        raise ConfigError(
            "--max-restarts is of workers that this command starts", remedy="give --workers"
        )
    there = os.environ.get("WORLD_SIZE")
    if is_launched() and workers is not None and str(workers) != there:
        raise ConfigError(
            "the number of workers is torchrun's to say",
            got=f"--workers {workers}, and {there} started",
            remedy="leave --workers out",
        )


def _use(threads: int | None, device: str) -> str:
    """Sets the threads; the device, of several workers the one of this."""
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        if is_launched() and device == "cuda":
            device = str(local_device())
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            "this device cannot be used",
            got=device,
            expected="cpu",
            remedy=f"run `gist doctor`; torch says: {str(error).splitlines()[0]}",
        ) from None
    return device


def _subnets_text(subnets: int | SubnetSchedule) -> str:
    if isinstance(subnets, int):
        return str(subnets)
    return ",".join(f"{share:g}:{m}" for share, m in subnets)


def _command() -> str:
    return shlex.join(["gist", *sys.argv[1:]])


def _write_json(file: Path | None, values: dict[str, Any]) -> None:
    if file == Path("-"):
        typer.echo(json.dumps(values, indent=1))
    elif file is not None:
        write_atomically(file, json.dumps(values, indent=1))


def _escape(text: str) -> str:
    return text.replace("[", r"\[")


if __name__ == "__main__":
    main()
