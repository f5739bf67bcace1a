"""Dataset cards: where a dataset comes from, what is in it, and how to train on it.

A card is a YAML file in ``datasets/`` of the source tree, installed as ``gist/_cards/``.
``python -m gist.graph.cards`` writes ``datasets/README.md``, a table of all cards.
"""

from __future__ import annotations

import difflib
import os
import types
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from gist.errors import ConfigError, DataError
from gist.metrics import METRICS, Metric, Task

_PACKAGE = Path(__file__).resolve().parents[1]
_PLACES = (_PACKAGE / "_cards", _PACKAGE.parent / "datasets")  # a wheel, a source tree
_Record = TypeVar("_Record")


@dataclass(frozen=True, kw_only=True)
class Split:
    """Number of nodes in each split; None where it is not known."""

    train: int | None
    val: int | None
    test: int | None


@dataclass(frozen=True, kw_only=True)
class PaperResult:
    """One row of a table of the GIST paper (Wolfe et al., arXiv 2102.10424).

    Attributes:
        table: Number of the table.
        model: Name of the reference model.
        layers: Number of layers.
        hidden: Width of each hidden layer.
        accuracy: Test accuracy or F1 in percent for each number of subnets; 1 is the full model.
    """

    table: int
    model: str
    layers: int
    hidden: int
    accuracy: dict[int, float]


@dataclass(frozen=True, kw_only=True)
class Paper:
    """Settings and results of the GIST paper; None for a setting that it does not give.

    Attributes:
        epochs: Total budget.
        local_steps: Steps between two merges.
        clusters: Parts the graph was cut into; None for full batches.
        clusters_per_batch: Clusters of a batch.
        lr: Learning rate.
        dropout: Share of activations dropped.
        results: Rows of its tables.
    """

    epochs: int
    local_steps: int
    clusters: int | None = None
    clusters_per_batch: int | None = None
    lr: float | None = None
    dropout: float | None = None
    results: list[PaperResult]


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Settings to start from, by the names of model and trainer options.

    Attributes:
        model: Name of the reference model.
        hidden: Width of each hidden layer.
        layers: Number of layers.
        norm: Normalisation after each hidden layer; None for none.
        dropout: Share of activations dropped.
        lr: Learning rate.
        weight_decay: Weight decay.
        schedule: Name of the learning-rate schedule.
        epochs: Total budget, split over the subnets.
        local_steps: Steps between two merges.
        clusters: Parts to cut the graph into; None trains on the whole graph.
        clusters_per_batch: Clusters of a batch.
        inductive: Whether to train on the subgraph of the training nodes alone.
        num_subnets: What to train with these settings where no number of subnets is asked for, as
            ``[share, m]`` of each phase; None leaves it to :class:`~gist.config.TrainConfig`.
    """

    model: str
    hidden: int
    layers: int
    norm: str | None
    dropout: float
    lr: float
    weight_decay: float
    schedule: str
    epochs: int
    local_steps: int
    clusters: int | None = None
    clusters_per_batch: int = 1
    inductive: bool = False
    num_subnets: list[list[float]] | None = None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Recommended settings, and what changes from so many subnets on."""

    defaults: TrainingSettings
    subnets: dict[int, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Card:
    """What is known of one dataset.

    Attributes:
        name: As :func:`gist.load_dataset` takes it; also the name of the file.
        title: One line.
        source: Where the data comes from.
        licence: Under what terms.
        citation: Whom to cite.
        nodes: Number of nodes.
        edges: Number of directed edges as stored: an undirected edge counts twice.
        features: Number of features.
        classes: Number of output columns.
        task: Kind of labels.
        metric: What is reported.
        split: Nodes in each split.
        checksums: Raw files, as paths below the dataset's folder, with their SHA-256; None where
            it is not known. Empty for generated data.
        paper: The GIST paper's settings and results, None where it has none.
        settings: Where to start training from.
        note: Anything else worth knowing.
        folders: Names that the dataset's folder may have below a data folder; downloads go to the
            first.
        edge_features: Number of features of an edge.
        urls: What to download, by where it goes below the dataset's folder: a file; or, where that
            ends in ``/``, an archive to unpack there. A URL that ends in ``/`` as well stands for
            all raw files there.
    """

    name: str
    title: str
    source: str
    licence: str
    citation: str
    nodes: int
    edges: int
    features: int
    classes: int
    task: Task
    metric: Metric
    split: Split
    checksums: dict[str, str | None]
    paper: Paper | None
    settings: Settings
    note: str
    folders: list[str] = field(default_factory=list)
    urls: dict[str, str] = field(default_factory=dict)
    edge_features: int = 0

    @property
    def files(self) -> list[str]:
        """Raw files, as paths below a data folder; none for generated data."""
        return [f"{self.folders[0]}/{file}" for file in self.checksums]

    def settings_for(self, num_subnets: int) -> dict[str, Any]:
        """Recommended settings for m subnets: the defaults, changed as the card says.

        Changes apply from their number of subnets up to the next one listed: with changes for 2
        and 8, four subnets take those for 2 and sixteen those for 8.

        Args:
            num_subnets: m.

        Returns:
            Values by setting name.
        """
        settings = dict(vars(self.settings.defaults))
        del settings["num_subnets"]  # what this is asked for is known
        listed = [m for m in self.settings.subnets if m <= num_subnets]
        return settings | (self.settings.subnets[max(listed)] if listed else {})


def list_cards() -> list[str]:
    """Names of all known datasets, sorted.

    Raises:
        DataError: the folder of cards is missing from the installation.
    """
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def load_card(name: str) -> Card:
    """The card of one dataset.

    Args:
        name: Its name, in any case.

    Raises:
        ConfigError: no such dataset; lists the known ones.
        DataError: the card is damaged: names the file and the key.
    """
    known = list_cards()
    if name.lower() not in known:
        close = difflib.get_close_matches(name.lower(), known, n=1)
        raise ConfigError(
            "unknown dataset",
            got=repr(name),
            expected=" or ".join(known),
            remedy=f"did you mean {close[0]!r}?" if close else None,
        )
    return read_card(_folder() / f"{name.lower()}.yaml")


@cache
def read_card(path: Path) -> Card:
    """Reads and checks one YAML file.

    Raises:
        DataError: it is no YAML, a key is missing or unknown, or a value has the wrong type.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise DataError(f"{path.name} is not valid YAML", got=error) from error
    card = _record(Card, raw, path.name)
    _require(card.name == path.stem, f"{path.name}: name", card.name, path.stem)
    _require(card.task in METRICS, f"{path.name}: task", card.task, " or ".join(METRICS))
    metrics = METRICS[card.task]
    _require(card.metric in metrics, f"{path.name}: metric", card.metric, " or ".join(metrics))
    _require(
        not card.checksums or bool(card.folders and card.urls),
        f"{path.name}: raw files without a place or a source",
        f"folders {card.folders}, urls {card.urls}",
        "at least one of each",
    )
    _check_phases(card.settings.defaults.num_subnets, f"{path.name}: settings.defaults.num_subnets")
    for m, changes in card.settings.subnets.items():
        _require(
            "num_subnets" not in changes, f"{path.name}: settings.subnets.{m}", changes, "no m"
        )
        # a change is sound if the settings with it are
        changed = vars(card.settings.defaults) | changes
        _record(TrainingSettings, changed, f"{path.name}: settings.subnets.{m}")
    return card


def _record(cls: type[_Record], raw: Any, where: str) -> _Record:
    """A dataclass from a mapping with its fields; those with a default may be left out."""
    types_ = get_type_hints(cls)
    names = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    _require(isinstance(raw, dict), where, type(raw).__name__, f"a mapping with {', '.join(names)}")
    if unknown := [str(key) for key in raw if key not in names]:
        close = difflib.get_close_matches(unknown[0], names, n=1)
        raise DataError(
            f"{where}: unknown key",
            got=", ".join(unknown),
            expected=", ".join(names),
            remedy=f"did you mean {close[0]!r}?" if close else None,
        )
    needed = [f.name for f in fields(cls) if f.default is f.default_factory is MISSING]  # type: ignore[arg-type]
    missing = [name for name in needed if name not in raw]
    _require(not missing, f"{where}: missing key", ", ".join(missing), ", ".join(names))
    return cls(**{name: _value(types_[name], raw[name], f"{where}: {name}") for name in raw})


def _value(kind: Any, raw: Any, where: str) -> Any:
    """``raw`` as a ``kind``: a dataclass, dict, list, optional or plain type."""
    origin, inner = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return _record(kind, raw, where)  # type: ignore[arg-type]
    if origin in (Union, types.UnionType):
        return None if raw is None else _value(inner[0], raw, where)
    if origin is dict:
        _require(isinstance(raw, dict), where, repr(raw), "a mapping")
        return {
            _value(inner[0], key, where): _value(inner[1], value, f"{where}.{key}")
            for key, value in raw.items()
        }
    if origin is list:
        _require(isinstance(raw, list), where, repr(raw), "a list")
        return [_value(inner[0], value, f"{where}.{i}") for i, value in enumerate(raw)]
    if kind is Any:
        return raw
    plain = kind if isinstance(kind, type) else str  # a Literal of strings
    accepted = (int, float) if plain is float else plain
    fits = isinstance(raw, accepted) and (plain is bool or not isinstance(raw, bool))
    _require(fits, where, repr(raw), plain.__name__)
    return raw


def _check_phases(phases: list[list[float]] | None, where: str) -> None:
    for phase in phases or []:
        fits = len(phase) == 2 and phase[0] > 0 and isinstance(phase[1], int) and phase[1] >= 1
        _require(fits, where, phase, "[share of the budget, m]")
    if phases is not None:
        total = sum(share for share, _ in phases)
        _require(abs(total - 1) < 1e-6, where, phases, "shares that sum to 1")


def _require(ok: bool, what: str, got: Any, expected: Any) -> None:
    if not ok:
        raise DataError(f"damaged dataset card: {what}", got=got, expected=expected)


def _folder() -> Path:
    for place in _PLACES:
        if any(place.glob("*.yaml")):
            return place
    raise DataError(
        "the dataset cards are missing from this installation",
        got=f"no *.yaml in {' or '.join(map(str, _PLACES))}",
        remedy="install the package again",
    )


def table() -> list[list[str]]:
    """A head, then one row for each card."""
    head = ["name", "what", "nodes", "edges", "features", "classes", "task and metric"]
    rows = [[*head, "train / val / test", "licence", "source"]]
    for card in map(load_card, list_cards()):
        split = [card.split.train, card.split.val, card.split.test]
        counts = (f"{n:,}" for n in (card.nodes, card.edges, card.features, card.classes))
        task = f"{card.task}, {card.metric}"
        parts = " / ".join("?" if n is None else f"{n:,}" for n in split)
        rows.append([card.name, card.title, *counts, task, parts, card.licence, card.source])
    return rows


def readme() -> str:
    """The text of ``datasets/README.md``: one row for each card."""
    head, *rows = table()
    rows = [head, ["---"] * len(head), *([f"`{name}`", *rest] for name, *rest in rows)]
    lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return (
        "# Dataset cards\n\n"
        "One YAML file per dataset: source, licence, statistics, checksums of the raw files, the\n"
        "GIST paper's results and our settings. Edges are directed edges as stored: an undirected\n"
        "edge counts twice. What is not known is a `?`. This table is written by\n"
        "`python -m gist.graph.cards`.\n\n"
        f"{lines}\n"
    )


def main() -> None:
    """Rewrites the table next to the cards."""
    target = _folder() / "README.md"
    partial = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    partial.write_text(readme(), encoding="utf-8")
    partial.replace(target)


if __name__ == "__main__":
    main()
