"""Dataset cards: where a dataset comes from, what is in it, and how to train on it.

A card is a YAML file in ``datasets/`` of the source tree, installed as ``gist/_cards/``. It is of a
graph, unless its ``kind`` is ``samples``.
``python -m gist.catalog.cards`` writes ``datasets/README.md``, a table of all cards.
"""

from __future__ import annotations

import difflib
import os
import types
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from gist.catalog.records import Card, GraphCard, SampleCard, SampleSettings, TrainingSettings
from gist.errors import ConfigError, DataError
from gist.metrics import METRICS

_PACKAGE = Path(__file__).resolve().parents[1]
_PLACES = (_PACKAGE / "_cards", _PACKAGE.parent / "datasets")  # a wheel, a source tree
_Record = TypeVar("_Record")

_KINDS: dict[str, type[Card]] = {"graph": GraphCard, "samples": SampleCard}

SAMPLE_METHODS = ("ist", "resist", "loft")
"""Methods that the card of samples may have settings for."""


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
    _require(isinstance(raw, dict), path.name, type(raw).__name__, "a mapping with keys and values")
    kind = raw.pop("kind", "graph")
    _require(kind in list(_KINDS), f"{path.name}: kind", repr(kind), " or ".join(_KINDS))
    card = _record(_KINDS[kind], raw, path.name)
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
    for form, sums in card.forms.items():
        _require(bool(sums), f"{path.name}: forms.{form}", "no file", "at least one")
    if isinstance(card, GraphCard):
        _check_graph(card, path.name)
    elif isinstance(card, SampleCard):
        _check_samples(card, path.name)
    return card


def _check_graph(card: GraphCard, file: str) -> None:
    _check_phases(card.settings.defaults.num_subnets, f"{file}: settings.defaults.num_subnets")
    for m, changes in card.settings.subnets.items():
        _require("num_subnets" not in changes, f"{file}: settings.subnets.{m}", changes, "no m")
        # a change is sound if the settings with it are
        changed = vars(card.settings.defaults) | changes
        _record(TrainingSettings, changed, f"{file}: settings.subnets.{m}")


def _check_samples(card: SampleCard, file: str) -> None:
    fits = len(card.shape) in (1, 3) and min(card.shape) >= 1
    _require(fits, f"{file}: shape", card.shape, "[features] or [channels, height, width]")
    split = [card.split.train, card.split.val, card.split.test]
    adds_up = sum(n or 0 for n in split) == card.samples and None not in split
    _require(adds_up, f"{file}: split", split, f"{card.samples:,} samples in all")
    for method, settings in card.settings.items():
        where = f"{file}: settings.{method}"
        _require(method in SAMPLE_METHODS, f"{file}: settings", method, " or ".join(SAMPLE_METHODS))
        _record(SampleSettings, settings.defaults, f"{where}.defaults")
        for m, changes in settings.subnets.items():
            _record(SampleSettings, settings.defaults | changes, f"{where}.subnets.{m}")


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
    head = ["name", "what", "size", "edges", "features", "classes", "task and metric"]
    rows = [[*head, "train / val / test", "licence", "source"]]
    for card in map(load_card, list_cards()):
        counts = [*_sizes(card), f"{card.classes:,}"]
        split = [card.split.train, card.split.val, card.split.test]
        task = f"{card.task}, {card.metric}"
        parts = " / ".join("?" if n is None else f"{n:,}" for n in split)
        rows.append([card.name, card.title, *counts, task, parts, card.licence, card.source])
    return rows


def _sizes(card: Card) -> list[str]:
    """Nodes or samples, edges, and features or the shape of an image."""
    if isinstance(card, GraphCard):
        return [f"{n:,}" for n in (card.nodes, card.edges, card.features)]
    assert isinstance(card, SampleCard)
    return [f"{card.samples:,}", "–", " x ".join(f"{n:,}" for n in card.shape)]


def readme() -> str:
    """The text of ``datasets/README.md``: one row for each card."""
    head, *rows = table()
    rows = [head, ["---"] * len(head), *([f"`{name}`", *rest] for name, *rest in rows)]
    lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return (
        "# Dataset cards\n\n"
        "One YAML file per dataset: source, licence, statistics, checksums of the raw files, the\n"
        "GIST paper's results and our settings. The size is a number of nodes, or of samples\n"
        "where there are no edges. Edges are directed edges as stored: an undirected edge counts\n"
        "twice. What is not known is a `?`. This table is written by\n"
        "`python -m gist.catalog.cards`.\n\n"
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
