"""Dataset cards: what they may say, how they are read, and the table of all of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from gist.catalog import cards
from gist.catalog.cards import list_cards, load_card, read_card, readme, table
from gist.catalog.records import MAIN, Card, GraphCard, MethodSettings, SampleCard
from gist.errors import ConfigError, DataError
from gist.families.graphs import Graphs
from gist.families.samples import Samples

REPOSITORY = Path(__file__).resolve().parents[2]
GRAPHS = [name for name in list_cards() if isinstance(load_card(name), GraphCard)]
SAMPLES = [name for name in list_cards() if isinstance(load_card(name), SampleCard)]


def test_all_cards_are_listed_and_sound():
    for name in list_cards():
        card = load_card(name)
        assert isinstance(card, Card)
        assert card.name == name
        assert all(file in card.checksums or file.endswith("/") for file in card.urls)
    assert load_card("Cora") == load_card("cora")


@pytest.mark.parametrize("name", GRAPHS)
def test_settings_of_a_graph_make_a_run(name):
    card = load_card(name)
    for m in (1, 2, 4, 8):
        chosen = card.settings_for(m) | {"num_subnets": m}
        assert chosen["model"] in Graphs.models
        assert Graphs().training_config("gist", chosen).num_subnets == m


def test_settings_apply_from_their_number_of_subnets_on():
    card = load_card("digits")
    changes = {2: {"lr": 0.02}, 8: {"local_steps": 5}}
    card = dataclasses.replace(card, settings=dataclasses.replace(card.settings, subnets=changes))
    plain = card.settings_for(1)
    assert plain | {"num_subnets": None} == dataclasses.asdict(card.settings.defaults)
    assert card.settings_for(2) == card.settings_for(7) == plain | {"lr": 0.02}
    assert card.settings_for(8) == card.settings_for(16) == plain | {"local_steps": 5}


@pytest.mark.parametrize("name", ["cora", "citeseer", "pubmed"])
def test_planetoid_cards_hold_the_papers_table(name):
    paper = load_card(name).paper
    assert (paper.epochs, paper.local_steps, paper.clusters) == (400, 20, None)
    (result,) = paper.results
    assert (result.table, result.model, result.layers, result.hidden) == (1, "gcn", 3, 256)
    assert set(result.accuracy) == {1, 2, 4, 8}


def test_the_card_of_amazon2m_holds_the_papers_tables():
    card, products = load_card("amazon2m"), load_card("ogbn-products")
    assert (card.nodes, card.edges, card.files) == (products.nodes, products.edges, products.files)
    assert card.split.train == 1_709_997
    assert card.split.val + card.split.test == 739_032
    by_table = {table: [r for r in card.paper.results if r.table == table] for table in (2, 3)}
    assert {(r.layers, r.hidden) for r in by_table[2]} == {
        (2, 400), (4, 400), (2, 4096), (3, 4096), (4, 4096),
    }  # fmt: skip
    assert all(1 not in r.accuracy for r in by_table[3] if r.hidden > 4096), "out of memory"


def test_unknown_cards_list_the_known_ones():
    with pytest.raises(ConfigError, match=r"'coar'; expected: .*citeseer or cora or.*mean 'cora'"):
        load_card("coar")
    with pytest.raises(ConfigError, match=r"unknown dataset; got: 'zzz'; expected: [^;]*$"):
        load_card("zzz")


@pytest.mark.parametrize(
    ("match", "change"),
    [
        ("unknown key; got: licenze.*did you mean 'licence'", lambda raw: raw.update(licenze="")),
        ("missing key; got: task, nodes", lambda raw: (raw.pop("nodes"), raw.pop("task"))),
        ("nodes; got: '7'; expected: int", lambda raw: raw.update(nodes="7")),
        ("nodes; got: True", lambda raw: raw.update(nodes=True)),
        ("task; got: regression", lambda raw: raw.update(task="regression")),
        ("metric; got: roc_auc; expected: accuracy", lambda raw: raw.update(metric="roc_auc")),
        ("name; got: other; expected: digits", lambda raw: raw.update(name="other")),
        ("split: missing key; got: val", lambda raw: raw["split"].pop("val")),
        ("checksums; got: None; expected: a mapping", lambda raw: raw.update(checksums=None)),
        ("checksums.a; got: 1; expected: str", lambda raw: raw.update(checksums={"a": 1})),
        (
            "defaults: unknown key; got: width",
            lambda raw: raw["settings"]["defaults"].update(width=1),
        ),
        (
            "defaults: num_subnets.0.1; got: '8'; expected: float",
            lambda raw: raw["settings"]["defaults"].update(num_subnets=[[1, "8"]]),
        ),
        (
            "defaults.num_subnets; got: .*; expected: .share of the budget, m.",
            lambda raw: raw["settings"]["defaults"].update(num_subnets=[[1.0, 8.5]]),
        ),
        (
            "defaults.num_subnets; got: .*; expected: shares that sum to 1",
            lambda raw: raw["settings"]["defaults"].update(num_subnets=[[0.6, 8]]),
        ),
        (
            "subnets.2; got: .*; expected: no m",
            lambda raw: raw["settings"]["subnets"].update({2: {"num_subnets": [[1.0, 2]]}}),
        ),
        ("defaults: lr; got: '5e-4'", lambda raw: raw["settings"]["defaults"].update(lr="5e-4")),
        (
            "subnets.2: unknown key; got: x",
            lambda raw: raw["settings"]["subnets"].update({2: {"x": 1}}),
        ),
        (
            "subnets.4: epochs; got: 1.5; expected: int",
            lambda raw: raw["settings"]["subnets"].update({4: {"epochs": 1.5}}),
        ),
        (
            "subnets; got: 'two'; expected: int",
            lambda raw: raw["settings"].update(subnets={"two": {}}),
        ),
    ],
)
def test_damaged_cards_are_refused(tmp_path, match, change):
    raw = yaml.safe_load((REPOSITORY / "datasets" / "digits.yaml").read_text())
    change(raw)
    path = tmp_path / "digits.yaml"
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(DataError, match=match):
        read_card(path)


@pytest.mark.parametrize(("text", "match"), [("a: [", "not valid YAML"), ("- 1", "a mapping with")])
def test_files_that_are_no_cards_are_refused(tmp_path, text, match):
    path = tmp_path / "digits.yaml"
    path.write_text(text)
    with pytest.raises(DataError, match=match):
        read_card(path)


def test_cards_of_an_installed_package_come_first(monkeypatch, tmp_path):
    source = REPOSITORY / "datasets" / "digits.yaml"
    (tmp_path / "digits.yaml").write_text(source.read_text())
    monkeypatch.setattr(cards, "_PLACES", (tmp_path, *cards._PLACES))
    assert list_cards() == ["digits"]
    monkeypatch.setattr(cards, "_PLACES", (tmp_path / "none",))
    with pytest.raises(DataError, match="cards are missing from this installation"):
        list_cards()


def test_the_table_of_cards_is_up_to_date():
    written = (REPOSITORY / "datasets" / "README.md").read_text(encoding="utf-8")
    assert written == readme(), "run: python -m gist.catalog.cards"


def test_the_table_is_rewritten_whole(monkeypatch, tmp_path):
    source = REPOSITORY / "datasets" / "digits.yaml"
    (tmp_path / "digits.yaml").write_text(source.read_text())
    monkeypatch.setattr(cards, "_PLACES", (tmp_path,))
    cards.main()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "digits.yaml"]
    assert (tmp_path / "README.md").read_text() == readme()


# --- of samples ------------------------------------------------------------------------------


def test_cards_are_of_graphs_or_of_samples():
    assert {"digits", "cora", "ogbn-arxiv"} <= set(GRAPHS)
    assert {"digits-images", "mnist", "cifar10", "speech-commands"} <= set(SAMPLES)
    assert sorted(GRAPHS + SAMPLES) == list_cards()


@pytest.mark.parametrize("name", SAMPLES)
def test_settings_of_samples_are_known_to_a_run(name):
    card = load_card(name)
    for method in card.settings:
        for m in (1, 2, 4, 8):
            chosen = card.settings_for(method, m) | {"num_subnets": m}
            assert chosen["model"] in Samples.models
            assert Samples().training_config(method, chosen).num_subnets == m


def test_settings_of_samples_are_by_method():
    given = MethodSettings(
        defaults={"model": "mlp", "lr": 0.1}, subnets={2: {"lr": 0.2}, 8: {"local_steps": 5}}
    )
    card = dataclasses.replace(load_card("mnist"), settings={"ist": given})
    assert card.settings_for("ist", 1) == {"model": "mlp", "lr": 0.1}
    assert card.settings_for("ist", 7) == {"model": "mlp", "lr": 0.2}
    assert card.settings_for("ist", 8) == {"model": "mlp", "lr": 0.1, "local_steps": 5}
    assert card.settings_for("loft", 8) == {}


def test_a_card_is_known_in_each_form_of_its_raw_files():
    card = load_card("cifar10")
    forms = card.in_forms()
    assert list(forms) == [MAIN, "batches", "zips"]
    assert forms[MAIN].checksums == card.checksums
    assert list(forms["zips"].checksums) == ["cifar10_train.zip", "cifar10_test.zip"]
    assert all(alone.in_forms() == {MAIN: alone} for alone in forms.values())
    assert list(load_card("cora").in_forms()) == [MAIN]


def test_the_part_of_mnist_has_the_checksums_of_the_whole():
    card = load_card("mnist")
    assert card.forms["t10k"].items() <= card.checksums.items()


def with_settings(**changes):
    defaults = {"model": "mlp", "hidden": 64, "lr": 0.1}
    return {"ist": {"defaults": defaults, "subnets": {2: {"lr": 0.2}}} | changes}


@pytest.mark.parametrize(
    ("match", "change"),
    [
        ("unknown key; got: nodes", {"nodes": 3}),
        ("kind; got: 'images'; expected: graph or samples", {"kind": "images"}),
        (r"kind; got: \[\]; expected", {"kind": []}),
        ("unknown key; got: samples, shape", {"kind": "graph"}),
        (r"shape; got: \[28, 28\]; expected: \[features\] or", {"shape": [28, 28]}),
        (r"shape; got: \[0\]", {"shape": [0]}),
        ("shape.0; got: '1'; expected: int", {"shape": ["1", 28, 28]}),
        ("split; got: .*; expected: 69,999 samples in all", {"samples": 69_999}),
        ("split; got: .*None", {"split": {"train": 60_000, "val": None, "test": 10_000}}),
        ("forms.none; got: no file", {"forms": {"none": {}}}),
        ("forms.one.a; got: 1; expected: str", {"forms": {"one": {"a": 1}}}),
        ("metric; got: micro_f1; expected: accuracy", {"metric": "micro_f1"}),
        (
            "settings; got: gist; expected: ist or resist or loft",
            {"settings": {"gist": with_settings()["ist"]}},
        ),
        ("settings.ist: missing key; got: defaults", {"settings": {"ist": {}}}),
        (
            "settings.ist.defaults: missing key; got: model",
            {"settings": with_settings(defaults={})},
        ),
        (
            "settings.ist.defaults: unknown key; got: width.*",
            {"settings": with_settings(defaults={"model": "mlp", "width": 3})},
        ),
        (
            "settings.ist.defaults: hidden; got: 1.5; expected: int",
            {"settings": with_settings(defaults={"model": "mlp", "hidden": 1.5})},
        ),
        (
            "settings.ist.subnets.4: lr; got: '1e-3'; expected: float",
            {"settings": with_settings(subnets={4: {"lr": "1e-3"}})},
        ),
    ],
)
def test_damaged_cards_of_samples_are_refused(tmp_path, match, change):
    raw = yaml.safe_load((REPOSITORY / "datasets" / "mnist.yaml").read_text())
    path = tmp_path / "mnist.yaml"
    path.write_text(yaml.safe_dump(raw | {"settings": with_settings()}))
    assert read_card(path).settings_for("ist", 2)["lr"] == 0.2
    other = tmp_path / "other" / "mnist.yaml"
    other.parent.mkdir()
    other.write_text(yaml.safe_dump(raw | change))
    with pytest.raises(DataError, match=match):
        read_card(other)


def test_the_table_shows_samples_beside_graphs():
    head, *rows = table()
    of = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    assert all(len(row) == len(head) for row in rows)
    assert list(of) == list_cards()
    assert (of["cora"]["size"], of["cora"]["edges"], of["cora"]["features"]) == (
        "2,708", "10,556", "1,433",
    )  # fmt: skip
    assert (of["mnist"]["size"], of["mnist"]["edges"], of["mnist"]["features"]) == (
        "70,000", "–", "1 x 28 x 28",
    )  # fmt: skip
    assert of["mnist"]["train / val / test"] == "55,000 / 5,000 / 10,000"
