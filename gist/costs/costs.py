"""What a run takes: the result of an estimate, as numbers and as tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.table import Table

from gist.costs.exchange import Exchange


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a run takes in memory, on disk, between workers and in operations.

    Attributes:
        data: Sizes. Of a graph ``nodes``, ``edges``, ``features``, ``classes``, and those of one
            training step: ``batch_nodes``, ``batch_edges``; of samples ``samples``,
            ``batch_samples``, ``outputs``, and those of one sample: ``features``; or ``channels``,
            ``height`` and ``width``; ``bag_entries`` where it is a bag.
        num_parameters: Entries of the whole model's parameters.
        parameters_per_subnet: Trainable entries of the largest subnet.
        num_subnets: m, or a schedule of ``(share, m)``.
        workers: W.
        executor: Where subnets run; ``"auto"`` where that is left to measurement.
        stacked_at_once: Subnets that run side by side at most.
        evaluation: How the model is evaluated: ``"full"``, ``"layerwise"`` or ``"clusters"``; on
            samples ``"batched"``.
        memory: For each phase of the run what is alive at its peak, in bytes by item.
        memory_limit: Bytes that the run may take: as set, or what is in use and free.
        disk: Bytes of the files in the run's directory.
        exchange: Bytes that workers exchange in a round, by scheme.
        flops: Floating-point operations: of the first ``round``; of the ``run``, by the budget
            rule; of one ``evaluation``; of the ``full_round``, the whole model on as many batches
            as all subnets of the round together; of the ``full_run``, the whole model for the whole
            budget.
        full_model_bytes: Peak memory of training the whole model, as with one subnet.
        remedies: What to change where it does not fit.
        notes: What was taken for granted.
    """

    data: Mapping[str, int]
    num_parameters: int
    parameters_per_subnet: int
    num_subnets: int | tuple[tuple[float, int], ...]
    workers: int
    executor: str
    stacked_at_once: int
    evaluation: str
    memory: Mapping[str, Mapping[str, int]]
    memory_limit: int
    disk: Mapping[str, int]
    exchange: Mapping[str, Exchange]
    flops: Mapping[str, int]
    full_model_bytes: int
    remedies: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def peak_phase(self) -> str:
        """The phase that takes most memory."""
        return max(self.memory, key=lambda phase: sum(self.memory[phase].values()))

    @property
    def peak_memory_bytes(self) -> int:
        """Most bytes that one worker takes: of its process on the CPU, of the device on CUDA."""
        return sum(self.memory[self.peak_phase].values())

    @property
    def fits(self) -> bool:
        """Whether the peak stays within the limit."""
        return self.peak_memory_bytes <= self.memory_limit

    @property
    def flops_ratio(self) -> float:
        """Operations of the whole model's run over those of this run."""
        return self.flops["full_run"] / self.flops["run"]

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        derived = ("peak_phase", "peak_memory_bytes", "fits", "flops_ratio")
        return {**asdict(self), **{name: getattr(self, name) for name in derived}}


def render(costs: Costs) -> RenderableType:
    """The costs as tables for a terminal."""
    how = f"{costs.executor} execution"
    if costs.stacked_at_once > 1:
        how += f", {costs.stacked_at_once} side by side"
    model = (
        f"{costs.num_parameters:,} parameters, {costs.parameters_per_subnet:,} of them in a subnet "
        f"(m = {_subnets(costs.num_subnets)}); {how}; {costs.evaluation} evaluation"
    )
    fits = "fits" if costs.fits else "[bold red]does not fit[/]"
    memory = (
        f"[bold]{decimal(costs.peak_memory_bytes)}[/] at the peak, in {_words(costs.peak_phase)}: "
        f"{fits} into {decimal(costs.memory_limit)}. The whole model at once: "
        f"{decimal(costs.full_model_bytes)}"
    )
    disk = ", ".join(f"{name} {decimal(size)}" for name, size in costs.disk.items())
    if costs.remedies:
        memory += f"\nto change: {'; '.join(costs.remedies)}"
    return Group(
        _graph(costs.data) if "nodes" in costs.data else _samples(costs.data),
        model,
        "",
        _memory_table(costs),
        memory,
        "",
        _work_table(costs),
        "",
        _exchange_table(costs),
        "",
        f"on disk: {disk}",
        *(f"[dim]- {note}[/]" for note in costs.notes),
    )


def _graph(sizes: Mapping[str, int]) -> str:
    head = (
        f"{sizes['nodes']:,} nodes, {sizes['edges']:,} edges, {sizes['features']:,} features, "
        f"{sizes['classes']:,} outputs"
    )
    if sizes["batch_nodes"] != sizes["nodes"]:
        head += f"; a step sees {sizes['batch_nodes']:,} nodes, {sizes['batch_edges']:,} edges"
    return head


def _samples(sizes: Mapping[str, int]) -> str:
    known = ("samples", "batch_samples", "outputs", "bag_entries")
    shape = " x ".join(f"{size:,}" for name, size in sizes.items() if name not in known)
    if "features" in sizes:
        shape += " features"
    if "bag_entries" in sizes:
        shape += f", {sizes['bag_entries']:,} of them in each"
    return (
        f"{sizes['samples']:,} samples of {shape}, {sizes['outputs']:,} outputs; a step sees "
        f"{sizes['batch_samples']:,} samples"
    )


def _memory_table(costs: Costs) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), title="memory of a worker", title_justify="left")
    table.add_column("")
    for phase in costs.memory:
        style = "bold" if phase == costs.peak_phase else None
        table.add_column(_words(phase), justify="right", style=style)
    items = dict.fromkeys(item for phase in costs.memory.values() for item in phase)
    for item in items:
        sizes = (phase.get(item) for phase in costs.memory.values())
        table.add_row(_words(item), *("" if size is None else decimal(size) for size in sizes))
    table.add_row("together", *(decimal(sum(phase.values())) for phase in costs.memory.values()))
    return table


def _work_table(costs: Costs) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), title="work", title_justify="left")
    for name in ("", "operations", "of the whole model", "ratio"):
        table.add_column(name, justify="right" if name else "left")
    for name, what in (("round", "a round"), ("run", "the run")):
        ours, whole = costs.flops[name], costs.flops[f"full_{name}"]
        table.add_row(what, _flops(ours), _flops(whole), f"{whole / ours:.1f}")
    table.add_row("an evaluation", _flops(costs.flops["evaluation"]), "", "")
    return table


def _exchange_table(costs: Costs) -> Table:
    workers = f"{costs.workers} worker{'s' * (costs.workers > 1)}"
    title = f"exchange of {workers} in a round"
    table = Table(box=None, padding=(0, 1, 0, 0), title=title, title_justify="left")
    for name in ("", "all together", "busiest worker", "what"):
        table.add_column(name, justify="left" if name in ("", "what") else "right")
    for name, exchange in costs.exchange.items():
        sizes = (decimal(exchange.total), decimal(exchange.busiest))
        table.add_row(_SCHEMES.get(name, _words(name)), *sizes, exchange.formula)
    return table


_SCHEMES = {"gist": "subnet training"}
"""Words for schemes of exchange that are not their name."""


def _words(name: str) -> str:
    return name.replace("_", " ")


def _flops(count: int) -> str:
    return decimal(count).replace("bytes", "FLOP").replace("B", "FLOP")


def _subnets(subnets: int | tuple[tuple[float, int], ...]) -> str:
    if isinstance(subnets, int):
        return str(subnets)
    return ", ".join(f"{m} for {share:g}" for share, m in subnets)
