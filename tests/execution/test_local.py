"""Local steps: the rate of each step, clipping, losses, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gist.config import TrainConfig
from gist.execution.local import make_optimizer, train_locally
from gist.execution.program import Program


class Quadratic:
    """``loss = batch * w``: the gradient of the only weight is the batch."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return model.weight.sum() * batch


def model() -> nn.Module:
    linear = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        linear.weight.zero_()
    return linear


def plain_sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5)


def run(
    batches: Iterable[Any],
    factors: Iterable[float],
    *,
    net: nn.Module | None = None,
    objective: Any = None,
    optimizer: Callable[[Any], torch.optim.Optimizer] = plain_sgd,
    grouped: int | None = None,
    **settings: Any,
) -> tuple[Program, Tensor]:
    """Trains ``net`` (one weight of 0 by default); ``grouped`` subnets where it is given."""
    config = TrainConfig(optimizer=optimizer, **settings)
    program = Program(net or model(), size=grouped or 1, grouped=grouped is not None, config=config)
    losses = train_locally(program, objective or Quadratic(), batches, factors, config)
    return program, losses


def test_every_step_has_its_own_rate():
    program, losses = run([1.0, 1.0, 1.0], [1.0, 0.1, 0.01])
    assert program.module.weight.item() == pytest.approx(-0.5 * 1.11)
    assert losses.shape == (3, 1)
    assert losses[:, 0].tolist() == pytest.approx([0.0, -0.5, -0.55])
    assert [group["lr"] for group in program.optimizer.param_groups] == [0.5], "as it was before"


def test_rates_multiply_what_the_user_set_per_group():
    net = nn.ModuleDict({"a": model(), "b": model()})

    def factory(parameters: Any) -> torch.optim.Optimizer:
        a, b = parameters
        return torch.optim.SGD([{"params": [a], "lr": 1.0}, {"params": [b], "lr": 0.1}])

    class Both:
        def loss(self, module: nn.Module, batch: float) -> Tensor:
            return module["a"].weight.sum() + module["b"].weight.sum()

    run([1.0, 1.0], [1.0, 0.5], net=net, objective=Both(), optimizer=factory)
    assert net["a"].weight.item() == pytest.approx(-1.5)
    assert net["b"].weight.item() == pytest.approx(-0.15)


def test_gradients_are_clipped():
    program, _ = run([4.0], [1.0], clip_norm=1.0)
    assert program.module.weight.item() == pytest.approx(-0.5)


def test_gradients_do_not_add_up_over_steps_nor_stay_behind():
    program, _ = run([1.0, 1.0], [1.0, 1.0])
    assert program.module.weight.item() == pytest.approx(-1.0)
    assert program.module.weight.grad is None


class Stacked(nn.Module):
    """Two subnets with a weight [2] and a number of their own, and one frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 2))
        self.bias = nn.Parameter(torch.zeros(2))
        self.fixed = nn.Parameter(torch.zeros(2, 3), requires_grad=False)


class Separate:
    """The gradient of each subnet's weight and number is its row of the batch [2, 3]."""

    def loss(self, model: Stacked, batch: Tensor) -> Tensor:
        return (model.weight * batch[:, :2]).sum(1) + model.bias * batch[:, 2]


def test_each_stacked_subnet_is_clipped_by_its_own_norm():
    batch = torch.tensor([[3.0, 0.0, 4.0], [0.3, 0.4, 0.0]])  # norms 5 and 0.5
    program, losses = run(
        [batch], [1.0], net=Stacked(), objective=Separate(), grouped=2, clip_norm=1.0
    )
    net = program.module
    assert net.weight.tolist() == [pytest.approx([-0.3, 0.0]), pytest.approx([-0.15, -0.2])]
    assert net.bias.tolist() == pytest.approx([-0.4, 0.0])
    assert not net.fixed.any()
    assert losses.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_stacked_clipping_is_that_of_a_subnet_on_its_own(scale):
    torch.manual_seed(0)
    batch = scale * torch.randn(2, 3)
    stacked, _ = run([batch], [1.0], net=Stacked(), objective=Separate(), grouped=2, clip_norm=0.7)

    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(()))

    class OneRow:
        def loss(self, model: Alone, batch: Tensor) -> Tensor:
            return (model.weight * batch[:2]).sum() + model.bias * batch[2]

    for i in range(2):
        one, _ = run([batch[i]], [1.0], net=Alone(), objective=OneRow(), clip_norm=0.7)
        assert torch.allclose(stacked.module.weight[i], one.module.weight, rtol=1e-5)
        assert torch.allclose(stacked.module.bias[i], one.module.bias, rtol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_losses_are_given_back_as_they_are(bad):
    """Finite or not: the executor knows which subnet it was."""

    class Bad:
        def loss(self, module: nn.Module, batch: float) -> Tensor:
            return module.weight.sum() * 0 + batch

    _, losses = run([1.0, bad], [1.0, 1.0], objective=Bad())
    assert torch.equal(losses.nan_to_num(7.0), torch.tensor([[1.0], [bad]]).nan_to_num(7.0))
    assert not losses.requires_grad


@pytest.mark.parametrize(("batches", "factors"), [([1.0], [1.0, 1.0]), ([1.0, 1.0], [1.0])])
def test_as_many_batches_as_steps(batches, factors):
    with pytest.raises(ValueError, match=r"shorter|longer"):
        run(batches, factors)


def test_an_error_leaves_rates_and_gradients_as_they_were():
    class Fails:
        def loss(self, module: nn.Module, batch: float) -> Tensor:
            if batch == 0:
                raise ZeroDivisionError
            return module.weight.sum() * batch

    config = TrainConfig(optimizer=plain_sgd)
    program = Program(model(), size=1, grouped=False, config=config)
    with pytest.raises(ZeroDivisionError):
        train_locally(program, Fails(), [1.0, 0], [1.0, 0.1], config)
    assert [group["lr"] for group in program.optimizer.param_groups] == [0.5]
    assert program.module.weight.grad is None


def test_bfloat16_computes_under_autocast_and_keeps_float32_parameters():
    seen = []

    class Seen:
        def loss(self, module: nn.Module, batch: Tensor) -> Tensor:
            seen.append(module(batch).dtype)
            return module(batch).float().sum()

    for precision in ("full", "bfloat16"):
        program, losses = run([torch.ones(1, 1)], [1.0], objective=Seen(), precision=precision)
        assert program.module.weight.dtype == losses.dtype == torch.float32
        assert program.module.weight.item() == -0.5
    assert seen == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)],
)
def test_named_optimisers(name, kind):
    net = nn.Linear(2, 2)
    net.bias.requires_grad_(False)
    made = make_optimizer(TrainConfig(optimizer=name, lr=0.3, weight_decay=0.2), net.parameters())
    assert type(made) is kind
    (group,) = made.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.3, 0.2)
    assert group["params"] == [net.weight]
    assert name != "sgd" or group["momentum"] == 0.9


def test_a_factory_gets_the_trainable_parameters():
    net = nn.Linear(2, 2)
    net.bias.requires_grad_(False)
    made = make_optimizer(TrainConfig(optimizer=torch.optim.Adagrad), net.parameters())
    assert isinstance(made, torch.optim.Adagrad)
    assert made.param_groups[0]["params"] == [net.weight]
