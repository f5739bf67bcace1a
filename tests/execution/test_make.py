"""Which executor a run gets, and what is said where subnets cannot be stacked."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg
from torch import Tensor, nn

import gist.nn
from gist import GISTTrainer, SubnetTrainer, load_dataset
from gist.partition.rules.registry import _RULES, Rule, register_rule

DATA = load_dataset(
    "csbm", num_nodes=60, num_features=6, num_classes=3, homophily=0.8, average_degree=6
)
CHAIN = ["one", "two", "three"]


class Net(nn.Module):
    """Three layers, with something between them that a user thought of for [n, k]."""

    def __init__(self, between: Any, last: Any = lambda scores: scores) -> None:
        super().__init__()
        self.one, self.two = pyg.GCNConv(6, 8), pyg.SAGEConv(8, 8)
        self.three = pyg.GCNConv(8, 3)
        self.between, self.last = between, last

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        x = self.between(self.one(x, edge_index).relu())
        return self.last(self.three(self.two(x, edge_index).relu(), edge_index))


def trainer(model: nn.Module | None = None, **settings: Any) -> GISTTrainer:
    model = gist.nn.GCN(6, 12, 3, 3) if model is None else model
    settings = {"num_subnets": 2, "local_steps": 2, "rounds": 2} | settings
    wiring = CHAIN if isinstance(model, Net) else None
    return GISTTrainer(model, DATA, wiring=wiring, **settings)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"executor": "serial"}, "serial"),
        ({"executor": "stacked"}, "stacked"),
        ({"executor": "auto"}, "auto"),
        ({}, "auto"),
        ({"num_subnets": 1}, "serial"),
        ({"num_subnets": 1, "executor": "stacked"}, "serial"),
        ({"num_subnets": [(0.5, 4), (0.5, 1)], "executor": "stacked"}, "stacked"),
        ({"shared_batches": True}, "auto"),
        ({"shared_batches": False}, "serial"),
        ({"shared_batches": False, "executor": "serial"}, "serial"),
    ],
    ids=str,
)
def test_the_setting_decides(settings, name):
    assert trainer(**settings).executor.name == name


def said(model: nn.Module | None, capsys: Any, executor: str, **settings: Any) -> str:
    """What a run that falls back says, once: a warning where it was told to stack, else a line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = trainer(model, executor=executor, **settings)
        assert run.executor.name == "serial"
        run.fit()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("gist:")]
    texts = [str(w.message) for w in caught if "stacked" in str(w.message)]
    if executor == "stacked":
        assert not lines
        assert len(texts) == 1
        assert texts[0].startswith("subnets run one after the other, because they cannot be stack")
        return texts[0]
    assert not texts
    assert len(lines) == 1
    assert lines[0].startswith("gist: serial execution (")
    return lines[0]


class Bare(nn.Module):
    """A layer whose rule has no grouped form."""

    def forward(self, x: Tensor) -> Tensor:
        return x.tanh()


@pytest.fixture
def _bare():
    @register_rule(Bare)
    class BareRule(Rule):
        def connect(self, layer: Any) -> Any:
            return layer.input

    yield
    del _RULES[Bare]


@pytest.mark.usefixtures("_bare")
@pytest.mark.parametrize("executor", ["stacked", "auto"])
def test_a_layer_without_a_grouped_form(executor, capsys):
    model = pyg.GCN(6, 12, 3, 3, norm=Bare())
    assert "layer type Bare has no grouped form" in said(model, capsys, executor)


# Each of these treats the features of one subnet, [n, k], as it should.
MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "flattened": lambda h: h.view(len(h), -1),
    "normalised over dim 1": lambda h: F.normalize(h),
    "sizes unpacked": lambda h: h * (torch.ones(h.shape[0], 1) if len(h.shape) == 2 else None),
    "transposed": lambda h: h.t().contiguous().t(),
    "dims asserted": lambda h: (_assert_two_dims(h), h)[1],
    "scaled by its sum": lambda h: h / (1 + h.sum(dim=1))[:, None],
}


def _assert_two_dims(h: Tensor) -> None:
    assert h.dim() == 2  # without a message


@pytest.mark.parametrize("executor", ["stacked", "auto"])
@pytest.mark.parametrize("name", MIXING)
def test_forward_code_that_was_written_for_one_subnet(name, executor, capsys):
    text = said(Net(MIXING[name]), capsys, executor)
    assert "cannot run on features [n, m, k]" in text or "does not compute side by side" in text


@pytest.mark.parametrize("executor", ["stacked", "auto"])
def test_a_softmax_over_what_becomes_the_subnets(executor, capsys):
    """``log_softmax(dim=1)`` at the end, as in many examples: no error, and wrong."""
    text = said(Net(lambda h: h, last=lambda scores: scores.log_softmax(dim=1)), capsys, executor)
    assert "does not compute side by side what its subnets compute alone" in text


class OnlyInTraining(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x) if self.training else x


@pytest.mark.parametrize("executor", ["stacked", "auto"])
def test_what_goes_wrong_in_training_alone(executor, capsys):
    model = Net(lambda h: h)
    model.between = OnlyInTraining()
    assert "does not compute side by side" in said(model, capsys, executor)


class Watched(torch.optim.SGD):
    """A subclass may do anything."""


@pytest.mark.parametrize("executor", ["stacked", "auto"])
@pytest.mark.parametrize("optimizer", [Watched, torch.optim.Adafactor])
def test_optimisers_that_may_see_stacked_subnets_as_one(optimizer, executor, capsys):
    text = said(None, capsys, executor, optimizer=lambda ps: optimizer(ps, lr=0.01))
    assert f"{optimizer.__name__} is not known to update every entry on its own" in text


class Rows:
    """An objective without a graph, made for scores [n, C] of one model."""

    steps_per_epoch = 1

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(12, 6, generator=generator)
        self.y = torch.arange(12) % 3
        self._loss = loss

    def batches(self, *, seed: int, round: int, subnet: int, steps: int) -> list[int]:
        return [0] * steps

    def loss(self, model: nn.Module, batch: int) -> Tensor:
        return self._loss(model(self.x), self.y)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"val_metric": 0.0, "test_metric": 0.0, "val_loss": 0.0}

    def sample_inputs(self, model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (self.x,), {}

    def check(self, model: nn.Module) -> None: ...

    def fingerprint(self) -> str:
        return "rows"


def one_hot(y: Tensor) -> Tensor:
    return F.one_hot(y, 3).float()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross entropy": F.cross_entropy,  # fails on scores [n, m, C]
    "mean of squares": lambda s, y: (s.flatten(1)[:, :3] - one_hot(y)).square().mean(),  # scalar
    "over dim 1": lambda s, y: s.logsumexp(1).mean(0).mean() - s.mean(),
    "one per node": lambda s, y: s.square().sum(-1).mean(-1) if s.dim() == 3 else s.square().mean(),
}


@pytest.mark.parametrize("executor", ["stacked", "auto"])
@pytest.mark.parametrize("name", LOSSES)
def test_objectives_that_know_one_model_only(name, executor, capsys):
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    settings = {"num_subnets": 2, "local_steps": 2, "rounds": 2, "executor": executor}

    def make() -> SubnetTrainer:
        return SubnetTrainer(model, Rows(LOSSES[name]), wiring=["0", "2"], **settings)

    if executor == "stacked":
        with pytest.warns(UserWarning, match="the loss is not .* m subnets"):
            run = make()
    else:
        run = make()
        assert "serial execution (the loss is not" in capsys.readouterr().err
    run.fit()
    assert run.executor.name == "serial"


@pytest.mark.parametrize("executor", ["stacked", "auto"])
def test_a_run_may_be_silent(executor, capsys):
    model = Net(MIXING["flattened"])
    if executor == "auto":
        trainer(model, executor=executor, progress=False).fit()
    else:
        with pytest.warns(UserWarning, match="one after the other"):
            trainer(model, executor=executor, progress=False).fit()
    assert capsys.readouterr().err == ""
