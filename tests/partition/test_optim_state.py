"""Optimiser state that travels with its parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gist import partition_spec
from gist.errors import ConfigError
from gist.partition.assignment import Assignment
from gist.partition.optim_state import CarriedState
from gist.partition.samplers import Overlapping
from gist.partition.spec import model_tensors
from gist.partition.subnet import build_subnet
from gist.partition.transfer import merge

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.05),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.05, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.05, momentum=0.9),
    "plain sgd": lambda p: torch.optim.SGD(p, lr=0.05),
}


def deal(*held: list[int]) -> Assignment:
    units = tuple(torch.tensor(h) for h in held)
    return Assignment(round=0, sizes={"0": 4}, held={"0": units})


class Run:
    """A two-layer net whose subnets are trained with carried state."""

    def __init__(self, optimizer: str) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
        self.spec = partition_spec(self.model, ["0", "1"])
        self.make = OPTIMIZERS[optimizer]
        self.carried = CarriedState(
            self.spec, dict(self.model.named_parameters()), torch.device("cpu")
        )
        self.x = torch.randn(7, 3, dtype=torch.float64)
        self.y = torch.randn(7, 2, dtype=torch.float64)

    def round(self, assignment: Assignment, steps: int = 2) -> list[dict]:
        parts, states = [], []
        self.carried.open(assignment)
        for i in range(assignment.num_subnets):
            subnet = build_subnet(self.model, self.spec, assignment, i)
            parameters = dict(subnet.named_parameters())
            optimizer = self.make(subnet.parameters())
            for name, entry in self.carried.cut(i).items():
                optimizer.state[parameters[name]] = entry
            for _ in range(steps):
                optimizer.zero_grad()
                (subnet(self.x) - self.y).square().sum().backward()
                optimizer.step()
            parts.append({n: t.detach() for n, t in model_tensors(subnet).items()})
            states.append({n: dict(optimizer.state[p]) for n, p in parameters.items()})
        merge(model_tensors(self.model), self.spec, assignment, parts)
        self.carried.merge(states)
        return states


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_subnet_carries_everything_as_one_optimiser_would(optimizer):
    run = Run(optimizer)
    plain = Run(optimizer)
    whole = plain.make(plain.model.parameters())
    for _ in range(3):
        run.round(deal([0, 1, 2, 3]))
        for _ in range(2):
            whole.zero_grad()
            (plain.model(plain.x) - plain.y).square().sum().backward()
            whole.step()
    for got, expected in zip(run.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "amsgrad", "rmsprop"])
def test_state_of_disjoint_entries_follows_its_parameters(optimizer):
    run = Run(optimizer)
    held = [[0, 3], [1, 2]]
    states = run.round(deal(*held))
    keys = [k for k in states[0]["0.weight"] if k != "step"]
    assert keys
    for key in keys:
        tensors = run.carried.tensors
        moment = {
            name: tensors[f"{key}/{name}"] for name in ("0.weight", "0.bias", "1.weight", "1.bias")
        }
        for i, units in enumerate(held):
            assert torch.equal(moment["0.weight"][units], states[i]["0.weight"][key])
            assert torch.equal(moment["0.bias"][units], states[i]["0.bias"][key])
            assert torch.equal(moment["1.weight"][:, units], states[i]["1.weight"][key])
        both = [s["1.bias"][key] for s in states]
        assert torch.allclose(moment["1.bias"], sum(both) / 2, rtol=0, atol=1e-15)

    other = deal([0, 1], [2, 3])
    run.carried.open(other)
    for i in range(2):
        cut = run.carried.cut(i)
        for key in keys:
            units = other.held["0"][i]
            assert torch.equal(cut["0.weight"][key], run.carried.tensors[f"{key}/0.weight"][units])


def test_what_was_cut_shares_nothing_with_the_global_state():
    run = Run("adam")
    assignment = deal([0, 1], [2, 3])
    run.round(assignment)
    before = {n: t.clone() for n, t in run.carried.state_dict().items()}
    run.carried.open(assignment)
    for entry in run.carried.cut(0).values():
        for tensor in entry.values():
            tensor.fill_(123.0)
    assert all(torch.equal(t, before[n]) for n, t in run.carried.state_dict().items())


def test_idle_entries_keep_their_state():
    run = Run("adam")
    run.round(deal([0, 1, 2, 3]))
    before = run.carried.tensors["exp_avg_sq/0.weight"].clone()
    run.round(deal([0], [2]))
    after = run.carried.tensors["exp_avg_sq/0.weight"]
    assert torch.equal(after[[1, 3]], before[[1, 3]])
    assert not torch.equal(after[[0, 2]], before[[0, 2]])


def test_fresh_entries_start_from_the_mean_second_moment():
    run = Run("adam")
    run.round(deal([0], [2]))
    moments = run.carried.tensors["exp_avg_sq/0.weight"]
    run.carried.open(deal([0, 1], [2, 3]))
    cut = run.carried.cut(0)["0.weight"]
    assert torch.equal(cut["exp_avg_sq"][0], moments[0])
    expected = moments[0].mean()  # of those that the subnet holds and that have one
    assert torch.allclose(cut["exp_avg_sq"][1], expected.expand(3))
    assert cut["exp_avg"][1].tolist() == [0.0] * 3
    assert float(cut["step"]) == 2.0


def test_step_counts_go_on():
    run = Run("adam")
    run.round(deal([0, 1], [2, 3]), steps=2)
    run.round(deal([0], [2]), steps=3)
    steps = {name: t for name, t in run.carried.tensors.items() if name.startswith("step/")}
    assert len(steps) == 4
    assert {float(step) for step in steps.values()} == {5.0}


def test_overlapping_subnets_average_their_moments():
    run = Run("adam")
    assignment = Overlapping(min_units=3)({"0": 4}, 2, seed=0, round=0)
    states = run.round(assignment)
    for unit in range(4):
        held = [
            states[i]["0.bias"]["exp_avg"][assignment.held["0"][i].tolist().index(unit)]
            for i in assignment.holders("0", unit)
        ]
        got = run.carried.tensors["exp_avg/0.bias"][unit]
        assert torch.allclose(got, torch.stack(held).mean(), rtol=1e-12)


def test_frozen_parameters_have_no_state():
    run = Run("adam")
    run.model[0].weight.requires_grad_(False)
    run.make = lambda p: torch.optim.Adam([q for q in p if q.requires_grad], lr=0.05)
    for _ in range(2):
        run.round(deal([0, 1], [2, 3]))
    assert "exp_avg/0.weight" not in run.carried.tensors
    run.carried.open(deal([0, 1], [2, 3]))
    assert "0.weight" not in run.carried.cut(0)


def test_a_saved_state_is_the_same_state():
    run = Run("adam")
    run.round(deal([0], [2]))
    other = CarriedState(run.spec, run.carried.parameters, torch.device("cpu"))
    other.room_for(run.carried.state_dict())
    for name, tensor in run.carried.state_dict().items():
        other.tensors[name].copy_(tensor)
    for state in (run.carried, other):
        state.open(deal([0, 1], [2, 3]))
    for i in range(2):
        ours, theirs = run.carried.cut(i), other.cut(i)
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert all(torch.equal(ours[name][k], theirs[name][k]) for k in ours[name])


def test_state_that_is_no_tensor_is_refused():
    run = Run("adam")
    with pytest.raises(ConfigError, match=r"cannot carry 'history'.*optimizer_state='reset'"):
        run.carried.merge([{"0.weight": {"history": [1]}}] * 2)


def test_state_of_another_shape_is_refused():
    run = Run("adam")
    odd = [{"0.weight": {"row": torch.zeros(2)}}] * 2  # a factored second moment, as Adafactor's
    with pytest.raises(ConfigError, match="row"):
        run.carried.merge(odd)
