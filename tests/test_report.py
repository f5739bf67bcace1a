"""Reports of real runs: complete, self-contained, escaped; damaged runs are refused."""

from __future__ import annotations

import base64
import json
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from gist import (
    Bernoulli,
    DataError,
    DisjointUniform,
    FederatedTrainer,
    GISTTrainer,
    Overlapping,
)
from gist.federated.answers import read_answers
from gist.federated.fleet import Fleet
from gist.graph.generate import csbm
from gist.nn import GCN
from gist.plots import (
    NOBODY,
    SEVERAL,
    comparison,
    cost_plot,
    curves,
    held_units,
    partition_heatmap,
    png,
    row_label,
    subnets_text,
)
from gist.report import settings_of, write_report
from gist.runs import read_comparison, read_history, read_run

VOID = {"meta", "img", "link", "input", "br", "hr"}


class Page(HTMLParser):
    """Tags, attributes, machine-readable numbers and visible text; tags must be nested well."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.numbers: set[float] = set()
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        self.numbers |= {float(value) for name, value in attrs if (tag, name) == ("data", "value")}
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def train(out: Path, **settings) -> GISTTrainer:
    data = csbm(num_nodes=120, num_features=8, num_classes=3, seed=0)
    model = GCN(data.num_features, 12, data.num_classes, num_layers=3, dropout=0.0)
    settings = {"num_subnets": 2, "rounds": 4, "local_steps": 2, "progress": False, **settings}
    trainer = GISTTrainer(model, data, out=str(out), **settings)
    trainer.fit()
    return trainer


def train_clients(out: Path, **settings) -> FederatedTrainer:
    """Six clients of which some do not answer, or answer twice, or answer garbage."""
    data = csbm(num_nodes=120, num_features=8, num_classes=3, seed=0)
    model = GCN(data.num_features, 12, data.num_classes, num_layers=3, dropout=0.0)
    fleet = replace(Fleet.lognormal(6), lost=0.2, repeated=0.2, corrupt=0.2)
    given = {"clients": 6, "in_flight": 3, "split": "iid", "fleet": fleet, "strategy": "fedasync"}
    given |= {"rounds": 12, "local_steps": 2, "progress": False, **settings}
    trainer = FederatedTrainer(model, data, out=str(out), **given)
    trainer.fit()
    return trainer


def edit(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "gist-m2"
    train(out)
    command = "gist train csbm --subnets 2 --out runs/gist-m2"
    edit(out / "config.json", dataset="csbm", method="gist", metric="accuracy", command=command)
    edit(out / "config.json", model_settings={"hidden": 12}, versions={"torch": "9.8.7"})
    return out


@pytest.fixture(scope="module")
def report(run) -> Path:
    return write_report([run], run.parent / "report")


@pytest.fixture(scope="module")
def table(run) -> Path:
    """A comparison of the full model and of two subnets, two seeds each."""
    folder = run.parent / "comparison"
    rows = []
    for method, m in (("full", 1), ("gist", 2)):
        names = [f"runs/{method}-seed{seed}" for seed in range(2)]
        for seed, name in enumerate(names):
            train(folder / name, num_subnets=m, rounds=2, seed=seed)
        numbers = {"val_mean": 0.71, "val_std": 0.02, "test_mean": 0.69, "test_std": 0.03}
        numbers |= {"seconds": 1.5 / m, "speedup": float(m), "peak_memory_bytes": 123456789}
        numbers |= {"num_parameters": 1000, "parameters_per_subnet": 1000 // m, "seeds": 2}
        rows.append({"method": method, "subnets": m, "runs": names, **numbers})
    values = {"dataset": "csbm", "metric": "accuracy", "rows": rows, "command": "gist compare csbm"}
    (folder / "table.json").write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="module")
def clients(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("federated") / "clients"
    train_clients(out)
    return out


@pytest.fixture(scope="module")
def clients_report(clients) -> Path:
    return write_report([clients], clients.parent / "report")


@pytest.fixture
def copy(run, tmp_path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def test_the_page_needs_nothing_but_itself(report):
    page = Page(report)
    assert report.name == "report.html"
    assert not page.tags & {"script", "link", "iframe", "object", "base", "a"}
    loaded = [value for name, value in page.attributes if name in ("src", "href", "srcset")]
    assert len(loaded) == 3
    assert all(value.startswith("data:image/png;base64,") for value in loaded)
    html = report.read_text(encoding="utf-8")
    assert "http://" not in html
    assert "https://" not in html
    assert "url(" not in html
    assert "@import" not in html
    assert "prefers-color-scheme: dark" in html
    assert ("name", "viewport") in page.attributes


def test_the_images_of_the_page_are_the_files_next_to_it(report):
    inlined = [base64.b64decode(v.split(",")[1]) for n, v in Page(report).attributes if n == "src"]
    names = ("curves.png", "partition.png", "cost.png")
    assert sorted(inlined) == sorted((report.parent / name).read_bytes() for name in names)
    assert all(image.startswith(b"\x89PNG") for image in inlined)
    assert {file.name for file in report.parent.iterdir()} == {"report.html", *names}


def test_the_page_holds_every_number_of_the_result(run, report):
    page = Page(report)
    result = json.loads((run / "result.json").read_text())
    result["parameters_per_subnet"] = max(result["parameters_per_subnet"])
    result["best"] = result["best"]["round"] + 1  # shown counted from 1
    assert set(result.values()) <= page.numbers
    assert result["seconds"] - result["repartition_seconds"] in page.numbers
    for text in ("csbm", "GCN", "accuracy", "DisjointUniform()", "local steps", "9.8.7"):
        assert text in page.text
    assert "gist train csbm --subnets 2 --out runs/gist-m2" in page.text


def test_the_report_goes_to_the_first_folder_by_default(copy):
    assert write_report([copy]) == copy / "report.html"
    assert write_report([copy]) == copy / "report.html"  # and may be written again


def test_hostile_names_are_shown_as_they_are(copy, tmp_path):
    evil = "<script>alert('1')</script>\"&amp; $\\frac_$ {{ 7 * 7 }}"
    folder = copy.rename(copy.with_name("<img src=x onerror=alert(1)>"))
    edit(folder / "config.json", dataset=evil, method=evil, model=evil, command=evil, metric=evil)
    edit(folder / "config.json", groups={evil: 12}, versions={evil: evil}, model_settings={evil: 1})
    page = Page(write_report([folder, folder], tmp_path / "out"))
    assert page.text.count(evil) >= 6
    assert "script" not in page.tags
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert "<img src=x onerror=alert(1)>" in page.text


def test_several_runs_share_one_page(run, table, tmp_path):
    other = table / "runs" / "full-seed0"
    page = Page(write_report([run, other], tmp_path))
    for folder in (run, other):
        assert folder.name in page.text
        assert json.loads((folder / "result.json").read_text())["test_metric"] in page.numbers


def test_runs_of_the_same_name_are_told_apart_by_their_path(run, copy, tmp_path):
    twin = Path(shutil.copytree(run, tmp_path / "other" / "run"))
    page = Page(write_report([copy, twin], tmp_path / "out"))
    assert str(copy) in page.text
    assert str(twin) in page.text


def test_a_comparison_brings_its_table_and_its_runs(table, tmp_path):
    page = Page(write_report([table], tmp_path))
    assert (tmp_path / "comparison.png").is_file()
    memory = f"{123_456_789 / 2**20:,.1f} MiB"
    for text in ("full model", "gist, m = 2", "71.00 ± 2.00%", "2.00×", memory, "gist-seed1"):
        assert text in page.text
    assert "gist compare csbm" in page.text


@pytest.mark.parametrize(
    ("change", "why"),
    [({"num_subnets": 1}, "never split"), ({"sampler": "mine"}, "sampler Mine is not one")],
)
def test_a_page_without_a_heat_map_says_why(copy, tmp_path, change, why):
    if "sampler" in change:
        settings = json.loads((copy / "config.json").read_text())["settings"]
        edit(copy / "config.json", settings={**settings, "sampler": {"name": "Mine", "x": 1}})
    else:
        copy = tmp_path / "whole"
        train(copy, **change)
    page = Page(write_report([copy], tmp_path / "out"))
    assert why in page.text
    assert not (tmp_path / "out" / "partition.png").exists()


def test_the_page_of_a_federated_run_holds_what_came_of_its_clients(clients, clients_report):
    page = Page(clients_report)
    report = json.loads((clients / "federated.json").read_text())
    events = report["events"]
    assert min(events[kind] for kind in ("lost", "refused", "repeated")) > 0
    assert set(events.values()) <= page.numbers
    own = report["client_metric"]
    known = {own["mean"], own["worst"], min(report["least_coverage"].values())}
    assert (
        known | {report[k] for k in ("clock", "bytes_down", "bytes_up", "merges")} <= page.numbers
    )
    each, staleness = report["merges_per_client"], report["staleness"]
    late = sum(int(s) * n for s, n in staleness.items()) / sum(staleness.values())
    assert late > 0
    assert late in page.numbers
    assert f"{min(each)} to {max(each)}; {each.count(0)} of 6 clients had none" in page.text
    assert own["measured_on"] in page.text
    for label in ("answers lost", "answers refused", "answers repeated"):
        assert label in page.text
    assert "bytes sent" not in page.text  # once is enough


def test_the_page_of_a_federated_run_shows_no_deal_of_units(clients_report):
    written = {file.name for file in clients_report.parent.iterdir()}
    assert written == {"report.html", "curves.png", "cost.png"}
    assert "Not drawn: a client holds what its server" in Page(clients_report).text


def test_the_settings_of_a_federated_run_are_those_that_play_a_part(clients_report):
    text = Page(clients_report).text
    for label in ("in flight3", "splitiid", "strategyfedasync", "capacity1.0", "rounds12"):
        assert label in text
    assert "fleetFleet(profiles=(ClientProfile(" in text
    assert all(len(line) < 250 for line in text.splitlines())
    for label in ("num subnets", "sampler", "optimizer state", "store", "worker timeout"):
        assert label not in text


def test_a_duration_leaves_no_budget_of_rounds(clients):
    run = read_run(clients)
    config = run.config | {"federated": run.config["federated"] | {"duration": 60.0}}
    config["settings"] = config["settings"] | {"rounds": None}
    settings = settings_of(replace(run, config=config))
    assert settings["duration"] == 60.0
    assert not settings.keys() & {"rounds", "epochs"}


def test_events_tell_what_the_summary_tells(clients, tmp_path):
    folder = Path(shutil.copytree(clients, tmp_path / "run"))
    result = read_run(folder).result
    told = read_answers(folder, result)
    (folder / "federated.json").unlink()
    counted = read_answers(folder, result)
    for name in ("clock", "merges", "bytes_down", "bytes_up", "events", "staleness"):
        assert getattr(counted, name) == getattr(told, name)
    assert counted.mean_staleness == told.mean_staleness
    assert sorted(counted.per_client) == sorted(told.per_client)
    assert counted.worst is None
    (folder / "events.jsonl").unlink()
    assert read_answers(folder, result).mean_staleness is None
    assert "mean staleness–" in Page(write_report([folder])).text


def test_settings_that_a_server_of_messages_has_no_use_for_are_left_out(clients):
    run = read_run(clients)
    settings = settings_of(replace(run, config=run.config | {"executor": "flower"}))
    assert "early_stopping" not in settings
    assert "clip_norm" in settings


def test_federated_runs_are_drawn_against_their_clock(clients, run):
    federated, plain = read_run(clients).result, read_run(run).result
    figure = curves([("a", federated), ("b", plain), ("c", federated)])
    axes = np.array(figure.axes).reshape(2, 3)
    assert [ax.get_xlabel() for ax in axes[1]] == ["round", "training time (s)", "clock (s)"]
    evaluated = [record for record in federated.history if record.val_metric is not None]
    a, b, c = axes[1, 2].lines
    assert a.get_xdata().tolist() == c.get_xdata().tolist() == [r.clock for r in evaluated]
    assert a.get_ydata().tolist() == [100 * record.val_metric for record in evaluated]
    assert np.isnan(b.get_xdata()).all()
    assert png(figure).startswith(b"\x89PNG")
    assert len(curves([("b", plain)]).axes) == 4


def test_changing_numbers_of_answers_are_no_phases(clients):
    result = read_run(clients).result
    uneven = [replace(record, num_subnets=1 + record.round % 2) for record in result.history]
    figure = curves([("a", replace(result, history=tuple(uneven)))])
    assert all(len(ax.lines) == 1 for ax in figure.axes)


def test_runs_with_and_without_a_clock_share_a_page(clients, run, tmp_path):
    page = Page(write_report([clients, run], tmp_path))
    assert (tmp_path / "partition.png").is_file()
    assert "of gist-m2 held which unit" in page.text
    assert "which the federated runs alone have" in page.text
    for label in ("num subnets", "strategy", "bytes sent", "bytes down"):
        assert label in page.text


def test_a_comparison_and_a_federated_run_share_a_page(clients, table, tmp_path):
    folder = Path(shutil.copytree(table, tmp_path / "comparison"))
    (row, _) = json.loads((folder / "table.json").read_text())["rows"]
    edit(folder / "table.json", rows=[row | {"runs": row["runs"][:1]}])
    text = Page(write_report([folder, clients])).text
    assert "never split: every round had one subnet. Federated runs are not drawn" in text
    assert "mean staleness" in text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("federated.json", "{"),
        ("federated.json", "[]"),
        ("federated.json", "{}"),
        ("events.jsonl", "[1]"),
        ("events.jsonl", '{"event": "merged", "client": 1}'),
    ],
    ids=["cut", "list", "empty", "no-event", "no-staleness"],
)
def test_what_is_damaged_of_a_federated_run_is_named(clients, tmp_path, name, content):
    folder = Path(shutil.copytree(clients, tmp_path / "run"))
    (folder / "federated.json").unlink()
    (folder / name).write_text(content)
    with pytest.raises(DataError, match=f"{name} is damaged"):
        write_report([folder], tmp_path / "out")
    assert not (tmp_path / "out").exists()


SCHEDULE = [(0.5, 4), (0.25, 2), (0.25, 1)]


@pytest.mark.parametrize(
    "settings",
    [
        {"sampler": DisjointUniform(), "num_subnets": 3},
        {"sampler": DisjointUniform(), "num_subnets": SCHEDULE},
        {"sampler": Overlapping(min_units=7), "num_subnets": 3, "seed": 5},
        {"sampler": Bernoulli(keep=0.4), "num_subnets": 3},
    ],
)
def test_the_heat_map_draws_the_assignments_of_the_run(tmp_path, settings):
    trainer = train(tmp_path, **settings)
    history = read_history(tmp_path / "history.jsonl")
    seed = settings.get("seed", 0)
    held = held_units(trainer.spec.sizes, settings["sampler"], history, seed=seed)
    assert [entry.group for entry in held] == list(trainer.spec.sizes)
    for entry in held:
        assert entry.holder.shape == (12, 4)
        for column, plan in enumerate(trainer.rounds):
            deal = trainer.assign(plan)
            for unit in range(12):
                holders = deal.holders(entry.group, unit)
                several = SEVERAL if holders else NOBODY
                expected = holders[0] if len(holders) == 1 else several
                assert entry.holder[unit, column] == expected
    assert png(partition_heatmap(held)).startswith(b"\x89PNG")


def test_wide_groups_and_long_runs_are_thinned_out_evenly(run):
    history = read_history(run / "history.jsonl")
    full = held_units({"h": 12}, DisjointUniform(), history, seed=0)[0]
    thin = held_units({"h": 12}, DisjointUniform(), history, seed=0, max_units=5, max_rounds=2)[0]
    assert thin.units.tolist() == [0, 3, 6, 9]
    assert thin.rounds.tolist() == [0, 2]
    assert np.array_equal(thin.holder, full.holder[::3, ::2])
    titles = [ax.get_title(loc="left") for ax in partition_heatmap([thin]).axes]
    assert titles == ["h: 12 units, every 3rd shown"]


def test_many_subnets_have_a_colour_bar(run):
    history = read_history(run / "history.jsonl")
    wide = [replace(record, num_subnets=20) for record in history]
    figure = partition_heatmap(held_units({"h": 40}, DisjointUniform(), wide, seed=0))
    assert figure.axes[-1].get_ylabel() == "subnet"


def test_figures_leave_no_global_state(run, table):
    before = dict(matplotlib.rcParams), list(matplotlib._pylab_helpers.Gcf.figs)
    labelled = [("a", read_run(run).result), ("_b $x", read_run(run).result)]
    for figure in (
        curves(labelled, metric="accuracy"),
        cost_plot(labelled),
        comparison(read_comparison(table)),
    ):
        assert png(figure).startswith(b"\x89PNG")
    assert (dict(matplotlib.rcParams), list(matplotlib._pylab_helpers.Gcf.figs)) == before


def test_runs_with_the_same_label_share_a_colour(run):
    result = read_run(run).result
    figure = curves([("a", result), ("a", result), ("b", result)])
    colours = [line.get_color() for line in figure.axes[0].lines]
    assert colours[0] == colours[1] != colours[2]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


def test_labels_name_method_and_subnets():
    assert row_label({"method": "full", "subnets": 1}) == "full model"
    assert row_label({"method": "local_sgd", "subnets": 4}) == "local sgd, m = 4"
    assert subnets_text([[0.6, 8], [0.4, 1]]) == "8 (60%) → 1 (40%)"
    assert subnets_text([8, 4]) == "8 → 4"


def damage_line(folder: Path, number: int, text: str) -> None:
    lines = (folder / "history.jsonl").read_text().splitlines()
    lines[number - 1] = text
    (folder / "history.jsonl").write_text("\n".join(lines))


def damage_record(folder: Path, number: int, **values) -> None:
    line = (folder / "history.jsonl").read_text().splitlines()[number - 1]
    damage_line(folder, number, json.dumps({**json.loads(line), **values}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), r"no config\.json"),
        (lambda f: (f / "history.jsonl").unlink(), r"no history\.jsonl"),
        (lambda f: (f / "result.json").unlink(), r"no result\.json"),
        (shutil.rmtree, "no such directory"),
        (lambda f: damage_line(f, 3, '{"round": 2, "num_'), r"history\.jsonl, line 3, is damaged"),
        (lambda f: damage_line(f, 2, "[1, 2]"), r"line 2, is damaged"),
        (lambda f: damage_record(f, 2, extra=1), r"line 2, is damaged.*extra"),
        (lambda f: damage_record(f, 4, seconds="long"), r"line 4,: seconds is damaged.*'long'"),
        (lambda f: damage_record(f, 4, round=3.0), r"line 4,: round is damaged"),
        (lambda f: damage_record(f, 1, seconds=float("inf")), r"line 1,: seconds is damaged"),
        (lambda f: damage_record(f, 1, num_subnets=99), "does not fit its config"),
        (lambda f: (f / "history.jsonl").write_text(""), "holds no round"),
        (lambda f: (f / "history.jsonl").write_bytes(b"\xff\xfe"), "line 1, is damaged"),
        (lambda f: (f / "result.json").write_text("{"), r"result\.json is damaged"),
        (lambda f: (f / "result.json").write_text("{}"), r"result\.json is damaged; got: no best"),
        (lambda f: edit(f / "result.json", seconds=None), r"result\.json: seconds is damaged"),
        (lambda f: edit(f / "result.json", best=[]), r"result\.json: best is damaged"),
        (lambda f: edit(f / "result.json", parameters_per_subnet=[]), "parameters_per_subnet"),
        (lambda f: (f / "config.json").write_text("[]"), r"config\.json is damaged; got: list"),
        (lambda f: edit(f / "config.json", groups={"hidden.0": "12"}), "groups: hidden.0"),
        (lambda f: edit(f / "config.json", settings={"seed": 0}), "no num_subnets, sampler"),
        (
            lambda f: edit(
                f / "config.json",
                settings={"seed": 0, "num_subnets": 2, "sampler": {"name": "Bernoulli", "k": 1}},
            ),
            "sampler; got:.*unexpected keyword",
        ),
    ],
)
def test_what_is_no_run_is_refused_before_anything_is_written(copy, tmp_path, damage, message):
    damage(copy)
    with pytest.raises(DataError, match=message):
        write_report([copy], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rows": []}, r"table\.json: rows is damaged"),
        ({"rows": [{"method": "gist"}]}, r"rows\[0\] is damaged; got: no val_mean"),
        ({"seconds": None}, r"rows\[0\]: seconds is damaged; got: None"),
        ({"seeds": "two"}, r"rows\[0\]: seeds is damaged"),
        ({"runs": [3]}, r"rows\[0\]: runs is damaged"),
        ({"runs": ["runs/none"]}, r"runs/none is not the directory of a finished run"),
    ],
)
def test_a_damaged_comparison_is_refused(table, tmp_path, values, message):
    folder = Path(shutil.copytree(table, tmp_path / "comparison"))
    original = json.loads((folder / "table.json").read_text())
    if "rows" not in values:
        values = {"rows": [{**original["rows"][0], **values}]}
    edit(folder / "table.json", **values)
    with pytest.raises(DataError, match=message):
        write_report([folder])


def test_a_report_needs_a_run_and_at_most_one_comparison(table):
    with pytest.raises(DataError, match="at least one run"):
        write_report([])
    with pytest.raises(DataError, match="one comparison at most"):
        write_report([table, table])
