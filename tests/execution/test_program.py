"""Programs that are refilled, not rebuilt: they compute what new models and optimisers compute.

The reference builds a narrow model and an optimiser for every subnet of every round, with nothing
but extract, build and merge; serial execution must give the same bits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gist.nn
from gist import load_dataset
from gist.config import TrainConfig
from gist.errors import ConfigError
from gist.execution.program import Program
from gist.execution.rounds import RoundExecutor
from gist.execution.serial import SerialExecutor
from gist.execution.stacked import StackedExecutor
from gist.graph.objective import GraphObjective
from gist.partition.optim_state import CarriedState
from gist.partition.rules.registry import _RULES, Rule, register_rule
from gist.partition.samplers import Overlapping
from gist.partition.spec import model_tensors
from gist.partition.streams import seeded
from gist.partition.subnet import build_subnet
from gist.partition.transfer import merge
from gist.partition.wiring import partition_spec
from gist.plan import plan_rounds

DATA = load_dataset(
    "csbm", num_nodes=60, num_features=6, num_classes=3, homophily=0.8, average_degree=6
)
OBJECTIVE = GraphObjective(DATA, torch.device("cpu"))
EXECUTORS = {"serial": SerialExecutor, "stacked": StackedExecutor}


class Gauge(nn.Module):
    """Puts a new buffer in place of the old one at every step, as many layers do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.5 * self.mean + 0.5 * x.detach().mean(0)
        return x - self.mean


class GaugeRule(Rule):
    def connect(self, layer: Any) -> Any:
        layer.follow("mean", (0, layer.input))
        return layer.input


@pytest.fixture(autouse=True)
def _gauge():
    register_rule(Gauge)(GaugeRule)
    yield
    del _RULES[Gauge]


def gcn(norm: Any = "layer") -> nn.Module:
    torch.manual_seed(0)
    return gist.nn.GCN(6, 12, 3, 3, dropout=0.4, norm=norm)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "layer norm": gcn,
    "no norm": lambda: gcn(None),
    "batch norm": lambda: gcn("batch"),
    "gauge": lambda: gcn(Gauge(12)),
}


def config(**settings: Any) -> TrainConfig:
    given = {"num_subnets": 3, "local_steps": 2, "rounds": 4, "lr": 0.02, "seed": 5} | settings
    return TrainConfig(shared_batches=True, **given)


def fresh_optimizer(config: TrainConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    wanted = [p for p in parameters if p.requires_grad]
    if callable(config.optimizer):
        return config.optimizer(wanted)
    usual = {"lr": config.lr, "weight_decay": config.weight_decay, "fused": True}
    if config.optimizer == "sgd":
        return torch.optim.SGD(wanted, momentum=0.9, **usual)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer](wanted, **usual)


def train_naively(
    model: nn.Module, config: TrainConfig, between: Callable[[nn.Module, int], None]
) -> None:
    """Algorithm 1 with a new model and a new optimiser for every subnet of every round."""
    spec = partition_spec(model)
    carried = CarriedState(spec, dict(model.named_parameters()))
    for plan in plan_rounds(config, 1):
        deal = config.sampler(spec.sizes, plan.num_subnets, seed=config.seed, round=plan.index)
        parts, states = [], []
        carried.open(deal)
        for i in range(plan.num_subnets):
            subnet = build_subnet(model, spec, deal, i).train()
            optimizer = fresh_optimizer(config, list(subnet.parameters()))
            named = dict(subnet.named_parameters())
            if config.optimizer_state == "carry":
                for name, entry in carried.cut(i).items():
                    optimizer.state[named[name]] = entry
            base = [group["lr"] for group in optimizer.param_groups]
            (batch,) = OBJECTIVE.batches(seed=config.seed, round=plan.index, subnet=0, steps=1)
            with seeded("train", config.seed, plan.index, i):
                for factor in plan.rate_factors:
                    for group, rate in zip(optimizer.param_groups, base, strict=True):
                        group["lr"] = rate * factor
                    optimizer.zero_grad()
                    OBJECTIVE.loss(subnet, batch).backward()
                    if config.clip_norm is not None:
                        nn.utils.clip_grad_norm_(subnet.parameters(), config.clip_norm)
                    optimizer.step()
            parts.append({name: t.detach() for name, t in model_tensors(subnet).items()})
            states.append({name: dict(optimizer.state[p]) for name, p in named.items()})
        merge(model_tensors(model), spec, deal, parts)
        if config.optimizer_state == "carry":
            carried.merge(states)
        between(model, plan.index)


def nothing(model: nn.Module, round: int) -> None: ...


def toggle(model: nn.Module, round: int) -> None:
    model.convs[1].lin.weight.requires_grad_(round % 2 == 1)


def train(
    executor: RoundExecutor,
    between: Callable[[nn.Module, int], None] = nothing,
    rounds: slice = slice(None),
) -> nn.Module:
    settings, spec = executor.config, executor.spec
    for plan in plan_rounds(settings, 1)[rounds]:
        deal = settings.sampler(spec.sizes, plan.num_subnets, seed=settings.seed, round=plan.index)
        executor.run_round(plan, deal)
        between(executor.model, plan.index)
    return executor.model


def make(name: str, model: nn.Module, settings: TrainConfig) -> RoundExecutor:
    return EXECUTORS[name](model, partition_spec(model), OBJECTIVE, settings)


def assert_same_bits(one: nn.Module, other: nn.Module) -> None:
    theirs = model_tensors(other)
    for name, tensor in model_tensors(one).items():
        assert torch.equal(tensor, theirs[name]), name


def adagrad(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adagrad(parameters, lr=0.02, initial_accumulator_value=0.1)


SETTINGS: dict[str, dict[str, Any]] = {
    "adam": {},
    "adamw": {"optimizer": "adamw", "weight_decay": 0.1},
    "sgd": {"optimizer": "sgd"},
    "adagrad": {"optimizer": adagrad},
    "clipped": {"clip_norm": 0.1},
    "uneven": {"num_subnets": 5},
    "annealed": {"num_subnets": [(0.5, 4), (0.25, 2), (0.25, 1)]},
    "overlapping": {"sampler": Overlapping(min_units=6)},
}


@pytest.mark.parametrize("state", ["reset", "carry"])
@pytest.mark.parametrize("name", SETTINGS)
def test_serial_execution_is_the_reference_bit_for_bit(name, state):
    settings = config(**SETTINGS[name], optimizer_state=state, executor="serial")
    model = gcn()
    reference = copy.deepcopy(model)
    train_naively(reference, settings, nothing)
    assert_same_bits(train(make("serial", model, settings)), reference)


@pytest.mark.parametrize("between", [nothing, toggle], ids=["all free", "frozen in turns"])
@pytest.mark.parametrize("state", ["reset", "carry"])
@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_is_refilled_bit_for_bit(name, state, between):
    settings = config(optimizer_state=state, executor="serial")
    model = MODELS[name]()
    reference = copy.deepcopy(model)
    train_naively(reference, settings, between)
    assert_same_bits(train(make("serial", model, settings), between), reference)
    if name == "gauge":
        assert model.norms[0].mean.all(), "buffers that are put in place anew come back as well"


@pytest.mark.parametrize("between", [nothing, toggle], ids=["all free", "frozen in turns"])
@pytest.mark.parametrize("state", ["reset", "carry"])
@pytest.mark.parametrize("name", SETTINGS)
def test_stacked_programs_that_are_kept_equal_new_ones_bit_for_bit(name, state, between):
    settings = config(**SETTINGS[name], optimizer_state=state, executor="stacked")
    model = gcn("batch")
    again = copy.deepcopy(model)
    rebuilding = make("stacked", again, settings)

    def and_forget(model: nn.Module, round: int) -> None:
        between(model, round)
        rebuilding.release()

    train(rebuilding, and_forget)
    assert_same_bits(train(make("stacked", model, settings), between), again)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("name", EXECUTORS)
def test_nothing_is_rebuilt_between_rounds(name, optimizer):
    settings = config(num_subnets=5, optimizer=optimizer, rounds=6, executor=name)
    executor = make(name, gcn("batch"), settings)
    built: list[range] = []
    build = executor.build

    def counted(assignment: Any, subnets: range) -> Program:
        built.append(subnets)
        return build(assignment, subnets)

    executor.build = counted

    def addresses() -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        for shape, program in executor._programs.items():
            found[shape] = (program, program.module, program.optimizer)
            tensors = model_tensors(program.module)
            found |= {(shape, name): t.data_ptr() for name, t in tensors.items()}
            for parameter, entry in program.optimizer.state.items():
                for key, value in entry.items():
                    if isinstance(value, Tensor):
                        found[shape, id(parameter), key] = value.data_ptr()
        return found

    train(executor, rounds=slice(0, 2))
    before, count = addresses(), len(built)
    assert count == len(executor._programs) > 1
    assert len(before) > 20
    train(executor, rounds=slice(2, None))
    assert len(built) == count
    assert addresses() == before


def test_an_optimiser_is_rebuilt_only_where_it_must_be():
    for optimizer, kept in [("adam", True), (adagrad, False)]:
        executor = make("stacked", gcn(), config(optimizer=optimizer, executor="stacked"))
        train(executor, rounds=slice(0, 1))
        (program,) = executor._programs.values()
        before = program.optimizer
        train(executor, rounds=slice(1, 2))
        assert (program.optimizer is before) == kept
        executor.model.convs[0].bias.requires_grad_(False)
        train(executor, rounds=slice(2, 3))
        assert program.optimizer is not before
        wanted = {id(p) for group in program.optimizer.param_groups for p in group["params"]}
        assert id(program.module.convs[0].bias) not in wanted
        assert program.module.convs[0].bias.grad is None


def test_a_factory_sees_parameters_shaped_as_those_of_one_subnet():
    shapes: list[list[tuple[int, ...]]] = []

    def factory(parameters: Any) -> torch.optim.Optimizer:
        parameters = list(parameters)
        shapes.append([tuple(p.shape) for p in parameters])
        first, *rest = parameters
        return torch.optim.SGD([{"params": [first], "lr": 0.5}, {"params": rest}], lr=0.1)

    for name in EXECUTORS:
        train(make(name, gcn(), config(optimizer=factory, rounds=1, executor=name)))
    assert all(each == shapes[0] for each in shapes)
    executor = make("stacked", gcn(), config(optimizer=factory, rounds=1, executor="stacked"))
    train(executor)
    (program,) = executor._programs.values()
    groups = program.optimizer.param_groups
    assert [group["lr"] for group in groups] == [0.5, 0.1]
    assert [p for group in groups for p in group["params"]] == list(program.parameters.values())


class Half(nn.Module):
    """A module with parameters as two subnets hold them: a matrix and a number each."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.number = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(2))


def test_states_go_in_and_come_out_subnet_by_subnet():
    program = Program(Half(), size=2, grouped=True, config=config())
    states = [
        {
            "matrix": {"step": torch.tensor(3.0), "exp_avg": torch.full((3,), float(i))},
            "number": {"step": torch.tensor(3.0), "exp_avg": torch.tensor(10.0 + i)},
        }
        for i in range(2)
    ]
    program.restart(program.parameters, states)
    for i in range(2):
        state = program.state(i)
        assert {n: {k: v.tolist() for k, v in entry.items()} for n, entry in state.items()} == {
            "matrix": {"step": 3.0, "exp_avg": [float(i)] * 3},
            "number": {"step": 3.0, "exp_avg": 10.0 + i},
        }
        state["matrix"]["exp_avg"].fill_(99.0)  # a copy
        assert program.state(i)["matrix"]["exp_avg"].max() < 2
    program.restart(program.parameters, None)
    assert all(not v.any() for i in range(2) for e in program.state(i).values() for v in e.values())


def test_parts_are_views_of_what_trains():
    program = Program(gcn("batch"), size=1, grouped=False, config=config())
    part = program.parts()[0]
    assert part.keys() == model_tensors(program.module).keys()
    with torch.no_grad():
        program.module.convs[0].bias.fill_(7.0)
    assert part["convs.0.bias"].eq(7).all()
    assert not any(tensor.requires_grad for tensor in part.values())


@pytest.mark.parametrize("name", EXECUTORS)
def test_state_that_cannot_be_carried_is_refused(name):
    """NAdam keeps a product of its own for each parameter."""
    settings = config(optimizer=torch.optim.NAdam, optimizer_state="carry", executor=name)
    with pytest.raises(ConfigError, match=r"cannot carry 'mu_product'.*optimizer_state='reset'"):
        train(make(name, gcn(), settings))


@pytest.mark.parametrize("state", ["reset", "carry"])
@pytest.mark.parametrize("name", EXECUTORS)
def test_a_round_that_fails_leaves_everything_usable(name, state):
    calls = iter([False, True] if name == "stacked" else [False, False, True])

    class Fails(GraphObjective):
        """In the last step of all subnets together, or in the first of the second subnet."""

        def loss(self, model: nn.Module, batch: Any) -> Tensor:
            if next(calls):
                raise MemoryError
            return super().loss(model, batch)

    settings = config(executor=name, num_subnets=2, optimizer_state=state)
    model = gcn("batch")
    untouched = train(make(name, copy.deepcopy(model), settings))
    executor = make(name, model, settings)
    train(executor, rounds=slice(0, 1))
    before = {n: t.detach().clone() for n, t in model_tensors(model).items()}
    random_state = torch.get_rng_state()
    executor.objective = Fails(DATA, torch.device("cpu"))
    with pytest.raises(MemoryError):
        train(executor, rounds=slice(1, 2))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.isfinite(t).all() for t in model_tensors(model).values())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())

    executor.objective = OBJECTIVE
    with torch.no_grad():
        for tensor_name, tensor in model_tensors(model).items():
            tensor.copy_(before[tensor_name])
    train(executor, rounds=slice(1, None))
    assert_same_bits(model, untouched)
