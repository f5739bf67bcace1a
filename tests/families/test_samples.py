"""Experiments on samples by name: methods, models, settings, plans, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from gist import ISTTrainer, LoFTTrainer, ResISTTrainer, load_dataset
from gist.baselines import SampleDataParallelTrainer
from gist.catalog.cards import load_card
from gist.catalog.records import MethodSettings
from gist.cli import app
from gist.compare import compare
from gist.errors import ConfigError
from gist.experiment import Experiment, plan_run
from gist.families.samples import Samples, build_model
from gist.nn import MLP, VGG, PreActResNet
from gist.samples.outline import SampleShape

DIGITS = load_dataset("digits-images")
SMALL = {"rounds": 1, "local_steps": 2, "batch_size": 16, "progress": False}


def run(method=None, **settings):
    return Experiment(dataset="digits-images", method=method, settings={**SMALL, **settings})


@pytest.mark.parametrize(
    ("settings", "method", "kind"),
    [
        ({"hidden": 8}, "ist", ISTTrainer),
        ({"model": "mlp", "hidden": 8}, "ist", ISTTrainer),
        ({"model": "preact-resnet20", "hidden": 4, "num_subnets": 2}, "resist", ResISTTrainer),
        ({"model": "preact-resnet18", "hidden": 4, "num_subnets": 2}, "loft", LoFTTrainer),
        ({"model": "vgg11", "hidden": 4}, "loft", LoFTTrainer),
    ],
)
def test_the_method_is_the_one_that_the_model_is_made_for(settings, method, kind):
    experiment = run(**settings)
    assert experiment.method == method
    assert type(experiment.trainer(DIGITS)) is kind


@pytest.mark.parametrize("model", ["mlp", "preact-resnet20", "vgg11"])
@pytest.mark.parametrize("method", ["full", "local-sgd", "data-parallel"])
def test_baselines_train_any_model(method, model):
    more = {} if method == "full" else {"num_subnets": 2}
    trainer = run(method, model=model, hidden=4, **more).trainer(DIGITS)
    result = trainer.fit()
    assert isinstance(trainer, SampleDataParallelTrainer) == (method == "data-parallel")
    whole = result.num_parameters
    assert set(result.parameters_per_subnet) == {whole}
    assert trainer.config.phases[0][1] == (1 if method == "full" else 2)


def test_replicas_of_local_sgd_see_batches_of_their_own():
    trainer = run("local-sgd", num_subnets=2).trainer(DIGITS)
    assert trainer.config.shared_batches is False


def test_a_model_is_drawn_from_the_seed_alone():
    one, two = (build_model(DIGITS, hidden=8, seed=s) for s in (3, 3))
    other = build_model(DIGITS, hidden=8, seed=4)
    assert torch.equal(one.linears[0].weight, two.linears[0].weight)
    assert not torch.equal(one.linears[0].weight, other.linears[0].weight)


@pytest.mark.parametrize(
    ("model", "kind"), [("mlp", MLP), ("preact-resnet18", PreActResNet), ("vgg13", VGG)]
)
def test_hidden_is_the_width(model, kind):
    built = build_model(DIGITS, model=model, hidden=4)
    assert isinstance(built, kind)
    first = next(m for m in built.modules() if hasattr(m, "weight") and m.weight.dim() > 1)
    assert first.weight.size(0) == 4
    assert built.eval()(DIGITS.example()).shape == (1, 10)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"model": "lenet"}, "unknown model"),
        ({"hidden": 0}, "hidden must be at least 1"),
        ({"dropout": 1.0}, "dropout must be"),
        ({"model": "vgg11", "layers": 3}, "only an mlp has layers"),
        ({"model": "vgg11", "dropout": 0.5}, "only an mlp has dropout"),
        ({"model": "vgg11", "norm": "layer"}, "a VGG has batch norms"),
        ({"model": "preact-resnet20", "norm": None}, "unknown norm"),
    ],
)
def test_models_that_cannot_be_are_refused(settings, match):
    with pytest.raises(ConfigError, match=match):
        build_model(DIGITS, **settings)


def test_images_are_images():
    vectors = SampleShape(num_samples=9, sample_shape=(64,), num_classes=3)
    with pytest.raises(ConfigError, match="vgg11 takes images"):
        build_model(vectors, model="vgg11")
    bags = replace(vectors, bag_entries=4)
    assert build_model(bags, hidden=4).input == "bag"


@pytest.mark.parametrize(
    ("method", "settings", "match"),
    [
        ("gist", {}, "unknown method"),
        ("ist", {"clusters": 4}, "clusters is a setting of graphs"),
        ("ist", {"heads": 4}, "heads is a setting of graphs"),
        ("ist", {"min_blocks": 2}, "min_blocks is a setting of method 'resist'"),
        ("local-sgd", {"warmup_rounds": 2}, "warmup_rounds is a setting of method 'resist'"),
        ("ist", {"model": "vgg11"}, "'ist' is not made for this model"),
        ("resist", {"model": "mlp"}, "'resist' is not made for this model"),
        ("resist", {"model": "preact-resnet18"}, "not made for.*expected: preact-resnet20 or"),
        ("loft", {"model": "mlp"}, "'loft' is not made for this model"),
        ("ist", {"hiden": 4}, "unknown setting 'hiden'"),
        ("full", {"num_subnets": 2}, "the full model is not split"),
    ],
)
def test_settings_of_other_methods_are_refused(method, settings, match):
    with pytest.raises(ConfigError, match=match):
        run(method, **settings).trainer(DIGITS)


def test_the_card_has_settings_by_method(monkeypatch):
    card = load_card("digits-images")
    settings = MethodSettings(
        defaults={"model": "mlp", "hidden": 12, "layers": 3, "lr": 0.2},
        subnets={4: {"lr": 0.3}},
    )
    given = replace(card, settings={"ist": settings})
    monkeypatch.setattr(Samples, "_card", staticmethod(lambda dataset: given))
    two, four = (run("ist", num_subnets=m).resolved() for m in (2, 4))
    assert (two["hidden"], two["layers"], two["lr"]) == (12, 3, 0.2)
    assert four["lr"] == 0.3
    assert run("full").resolved()["hidden"] == 12
    other = run("local-sgd", model="vgg11", num_subnets=2).resolved()
    assert other["model"] == "vgg11"
    assert not other.keys() & {"hidden", "layers"}


def test_a_plan_needs_no_data(monkeypatch):
    monkeypatch.setenv("GIST_DATA", "/nowhere")
    for method, model in (("ist", "mlp"), ("loft", "preact-resnet20")):
        costs = plan_run(
            "cifar10", method=method, settings={"model": model, "hidden": 8, "num_subnets": 4}
        )
        assert costs.data["samples"] == load_card("cifar10").samples
        assert costs.flops_ratio > 1
    with pytest.raises(ConfigError, match="cannot be planned"):
        plan_run("cifar10", method="data-parallel")
    with pytest.raises(ConfigError, match="sizes of a graph"):
        plan_run("cifar10", sizes={"num_nodes": 3})


def test_methods_are_compared(tmp_path):
    table = compare(
        run("ist", hidden=16), [1, 2], baselines=["local-sgd", "data-parallel"], out=tmp_path
    )
    assert [row["method"] for row in table["rows"]] == [
        "full",
        "ist",
        "ist",
        "local-sgd",
        "data-parallel",
    ]
    assert len({row["num_parameters"] for row in table["rows"]}) == 1
    with pytest.raises(ConfigError, match="unknown baseline"):
        compare(run("ist"), [2], baselines=["ensemble"])


@pytest.mark.parametrize(
    ("method", "own"), [("resist", {"min_blocks": 1, "warmup_rounds": 1}), ("loft", {})]
)
def test_baselines_are_of_the_same_network_and_settings(method, own):
    small = {**SMALL, "rounds": 2, "hidden": 4}
    base = Experiment(dataset="digits-images", method=method, settings={**small, **own})
    table = compare(base, [2], baselines=["local-sgd", "data-parallel"])
    rows = table["rows"]
    assert [row["method"] for row in rows] == ["full", method, "local-sgd", "data-parallel"]
    assert len({row["num_parameters"] for row in rows}) == 1
    assert len({row["settings"]["model"] for row in rows}) == 1
    for name in ("local_steps", "lr", "schedule", "weight_decay"):
        assert len({row["settings"][name] for row in rows}) == 1, name


def test_graphs_have_no_settings_of_samples():
    with pytest.raises(ConfigError, match="batch_size is a setting of independent samples"):
        Experiment(dataset="digits", settings={"batch_size": 4}).resolved()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--method", "ist", "--hidden", "16", "--subnets", "4", "--shards"],
        ["--method", "resist", "--hidden", "4", "--subnets", "2", "--min-blocks", "1"],
        ["--method", "resist", "--hidden", "4", "--subnets", "2", "--stages", "stages.0,stages.1"],
        ["--method", "loft", "--hidden", "4", "--subnets", "2", "--batch-size", "16"],
    ],
)
def test_the_command_trains_by_every_method(arguments, tmp_path):
    out = tmp_path / "run"
    common = ["--rounds", "1", "--local-steps", "2", "--out", str(out), "--json", "-"]
    done = CliRunner().invoke(app, ["train", "digits-images", *arguments, *common])
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout)
    assert summary["method"] == arguments[1]
    assert summary["metric"] == "accuracy"
    usual = 128 if arguments[1] == "ist" else 64  # that of the card
    assert summary["settings"]["batch_size"] == (16 if "--batch-size" in arguments else usual)
    assert (out / "model.safetensors").exists()
    assert json.loads((out / "config.json").read_text())["method"] == arguments[1]
