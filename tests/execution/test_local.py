"""Local steps: the rate of each step, clipping, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gist.config import TrainConfig
from gist.errors import DivergedError
from gist.execution.local import make_optimizer, train_locally


class Quadratic:
    """``loss = batch * w``: the gradient of the only weight is the batch."""

    def loss(self, model: nn.Module, batch: float) -> Tensor:
        return model.weight.sum() * batch


def model() -> nn.Module:
    linear = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        linear.weight.zero_()
    return linear


def plain_sgd(parameters) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5)


def run(batches, factors, clip=None, optimizer=plain_sgd) -> tuple[nn.Module, float]:
    net = model()
    loss = train_locally(net, optimizer(net.parameters()), Quadratic(), batches, factors, clip)
    return net, loss


def test_every_step_has_its_own_rate():
    net, loss = run([1.0, 1.0, 1.0], [1.0, 0.1, 0.01])
    assert net.weight.item() == pytest.approx(-0.5 * 1.11)
    assert loss == pytest.approx((0 - 0.5 - 0.55) / 3)


def test_rates_multiply_what_the_user_set_per_group():
    net = nn.ModuleDict({"a": model(), "b": model()})
    optimizer = torch.optim.SGD(
        [{"params": net["a"].parameters(), "lr": 1.0}, {"params": net["b"].parameters(), "lr": 0.1}]
    )

    class Both:
        def loss(self, module: nn.Module, batch: float) -> Tensor:
            return module["a"].weight.sum() + module["b"].weight.sum()

    train_locally(net, optimizer, Both(), [1.0, 1.0], [1.0, 0.5], None)
    assert net["a"].weight.item() == pytest.approx(-1.5)
    assert net["b"].weight.item() == pytest.approx(-0.15)


def test_gradients_are_clipped():
    net, _ = run([4.0], [1.0], clip=1.0)
    assert net.weight.item() == pytest.approx(-0.5)


def test_gradients_do_not_add_up_over_steps():
    net, _ = run([1.0, 1.0], [1.0, 1.0])
    assert net.weight.item() == pytest.approx(-1.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_losses_that_are_not_finite_stop_the_run(bad):
    class Bad:
        def loss(self, module: nn.Module, batch: float) -> Tensor:
            return module.weight.sum() * 0 + batch

    net = model()
    with pytest.raises(DivergedError, match="no longer finite"):
        train_locally(net, plain_sgd(net.parameters()), Bad(), [1.0, bad], [1.0, 1.0], None)


def test_as_many_batches_as_steps():
    with pytest.raises(ValueError, match=r"shorter|longer"):
        run([1.0], [1.0, 1.0])


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
