"""Masked training: exact identities, and the engine it stands on (THEORY, tests 3 to 8 and 10)."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gist import Bernoulli, Categorical, DisjointUniform, partition_spec
from gist.errors import ConfigError, DataError, DivergedError
from gist.partition.subnet import build_subnet
from gist.partition.transfer import merge
from gist.theory import (
    MaskedTraining,
    Network,
    Problem,
    Scheme,
    bound_variance,
    copy_variance,
    default_lr,
    merge_subnets,
    sampling_variance,
    single_step,
    train_subnets,
)
from tests.theory.oracle import round_of, subnet_loss

PROBLEM = Problem.sphere()
LR = default_lr(PROBLEM)
KAPPA = PROBLEM.num_samples**-0.5


def network(width: int = 1000, *, problem: Problem = PROBLEM, scale: float = KAPPA) -> Network:
    return Network.draw(width, problem.dim, scale=scale)


@st.composite
def small_problems(draw: st.DrawFn) -> Problem:
    problem = Problem.sphere(draw(st.integers(1, 6)), draw(st.integers(1, 4)), seed=draw(seeds))
    if draw(st.booleans()):
        matrix = problem.x @ problem.x.T + torch.diag(problem.y)
        problem = Problem(x=problem.x, y=problem.y, propagation=matrix)
    return problem


seeds = st.integers(0, 1000)


@given(small_problems(), st.integers(1, 9), seeds)
def test_03_the_gradient_is_that_of_autograd(problem, width, seed):
    net = Network.draw(width, problem.dim, scale=1.0, seed=seed)
    mask = Scheme.dropout(0.6).masks(width, seed=seed, round=0)
    weight = net.weight.clone().requires_grad_()
    loss = subnet_loss(problem, weight, net.signs, mask[0].double())
    (expected,) = torch.autograd.grad(loss, weight)
    gradient = net.weight - single_step(problem, net, mask, lr=1.0).weight
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12 * (1 + loss.item()))


@given(small_problems(), st.integers(1, 9), st.integers(1, 5), st.integers(1, 3), seeds, seeds)
def test_03_fast_rounds_are_the_naive_ones(problem, width, num_subnets, steps, seed, round):
    net = Network.draw(width, problem.dim, scale=1.0, seed=seed)
    for scheme in (
        Scheme.bernoulli(0.4, num_subnets, steps),
        Scheme.bernoulli(1.0, num_subnets, steps),
        Scheme.ist(num_subnets, steps),
    ):
        masks = scheme.masks(width, seed=seed, round=round)
        expected = round_of(problem, net, masks, 0.01, steps)
        held, trained = train_subnets(problem, net, masks, lr=0.01, local_steps=steps)
        found = [merge_subnets(net, held, trained)]
        if steps == 1:
            found.append(single_step(problem, net, masks, lr=0.01))
        for each in found:
            assert (each.weight - expected).abs().max() <= 1e-14 * (1 + expected.abs().max())


def test_03_it_is_what_the_engine_does_to_a_model():
    torch.manual_seed(0)
    problem, width, steps, lr = Problem.sphere(12, 5), 40, 3, 0.05
    layers = nn.Linear(5, width, bias=False), nn.ReLU(), nn.Linear(width, 1, bias=False)
    model = nn.Sequential(*layers).double()
    first, last = (layer.weight.detach().clone() for layer in (model[0], model[2]))
    net = Network(weight=first, signs=last[0] * width**0.5)
    spec = partition_spec(model)
    (group,) = spec.groups
    for sampler in (Bernoulli(0.5), Categorical(), DisjointUniform()):
        deal = sampler(spec.sizes, 3, seed=1, round=2)
        masks = torch.zeros(3, width, dtype=torch.bool)
        parts = []
        for i, units in enumerate(deal.held[group]):
            masks[i, units] = True
            subnet = build_subnet(model, spec, deal, i, width_correction=False)
            optimizer = torch.optim.SGD([subnet[0].weight], lr=lr)
            for _ in range(steps):
                optimizer.zero_grad()
                (0.5 * (subnet(problem.x)[:, 0] - problem.y).square().sum()).backward()
                optimizer.step()
            parts.append({name: tensor.detach() for name, tensor in subnet.named_parameters()})
        merged = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
        merge(merged, spec, deal, parts)
        held, trained = train_subnets(problem, net, masks, lr=lr, local_steps=steps)
        found = merge_subnets(net, held, trained).weight
        torch.testing.assert_close(found, merged["0.weight"], rtol=0, atol=1e-14)


@pytest.mark.parametrize("keep", [0.3, 0.8])
def test_04_the_mean_step_over_all_masks(keep):
    problem, m, p = Problem.sphere(7, 3), 4, 2
    net = Network.draw(m, 3, scale=1.0)
    mean = torch.zeros_like(net.weight)
    for cells in itertools.product([False, True], repeat=m * p):
        masks = torch.tensor(cells).view(p, m)
        chance = keep ** sum(cells) * (1 - keep) ** (m * p - sum(cells))
        mean += chance * (net.weight - single_step(problem, net, masks, lr=1.0).weight)
    weight = net.weight.clone().requires_grad_()
    u = keep * Network(weight=weight, signs=net.signs).outputs(problem)
    (gradient,) = torch.autograd.grad(0.5 * (problem.y - u).square().sum(), weight)
    coverage = 1 - (1 - keep) ** p
    decay = (net.weight @ problem.x.T).relu() @ problem.x / m
    expected = coverage / keep * gradient + coverage * (1 - keep) * decay
    torch.testing.assert_close(mean, expected, rtol=0, atol=1e-12)


@given(small_problems(), st.integers(1, 9), st.integers(1, 4), st.integers(1, 3), seeds)
def test_05_whole_subnets_are_gradient_descent(problem, width, num_subnets, steps, seed):
    net = Network.draw(width, problem.dim, scale=1.0, seed=seed)
    everything = torch.ones(1, width, dtype=torch.bool)
    expected = round_of(problem, net, everything, 0.01, steps)
    for scheme in (Scheme.bernoulli(1.0, num_subnets, steps), Scheme.whole(steps)):
        training = MaskedTraining(problem, net, scheme, lr=0.01)
        training.round()
        error = (training.network.weight - expected).abs().max()
        assert error <= 1e-14 * (1 + expected.abs().max())


@pytest.mark.parametrize("num_subnets", [2, 5])
def test_06_identities_of_categorical_masks(num_subnets):
    scheme = Scheme.ist(num_subnets, 4)
    net = network(60)
    masks = scheme.masks(60, seed=0, round=0)
    held, trained = train_subnets(PROBLEM, net, masks, lr=LR, local_steps=4)
    after = merge_subnets(net, held, trained)
    outputs = torch.stack(
        [
            Network(weight=weight[: len(units)], signs=net.signs[units]).outputs(PROBLEM)
            * (len(units) / 60) ** 0.5
            for units, weight in zip(held, trained, strict=True)
        ]
    )
    u = scheme.keep * after.outputs(PROBLEM)
    torch.testing.assert_close(u, outputs.mean(dim=0), rtol=0, atol=1e-13)
    spread = sum((one - other).square().sum() for one, other in itertools.combinations(outputs, 2))
    losses = (PROBLEM.y - outputs).square().sum(dim=1)
    expected = losses.mean() - spread / num_subnets**2
    torch.testing.assert_close((PROBLEM.y - u).square().sum(), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("keep", [0.25, 0.5, 0.8])
def test_07_variance_of_a_subnets_output(keep):
    net = network(4000)
    scheme = Scheme.multi_sample_dropout(keep, 2000)
    outputs = net.outputs(PROBLEM, scheme.masks(4000, seed=0, round=0))
    measured = (outputs - keep * net.outputs(PROBLEM)).square().sum(dim=1).mean()
    hidden = (net.weight @ PROBLEM.x.T).relu()
    variance = keep * (1 - keep) / 4000 * hidden.square().sum()
    assert sampling_variance(PROBLEM, net, scheme) == pytest.approx(float(variance), rel=1e-12)
    assert float(measured) == pytest.approx(float(variance), rel=0.05)


def test_08_variance_of_copies_of_a_neuron():
    masks = Scheme.multi_sample_dropout(0.5, 4).masks(400_000, seed=0, round=0).double()
    one, other = masks.chunk(2, dim=1)
    holders = one.sum(dim=0)
    share = ((one * other).sum(dim=0) / holders)[holders > 0]
    assert copy_variance(0.5, 4) == pytest.approx(0.1431, abs=5e-5)
    assert float(share.var()) == pytest.approx(copy_variance(0.5, 4), rel=0.02)
    assert bound_variance(0.5, 4) == pytest.approx(0.171875)
    assert bound_variance(0.1, 10) < copy_variance(0.1, 10), "the printed formula is no bound"


@pytest.mark.parametrize("keep", [0.2, 0.5, 1.0])
def test_08_dropout_is_one_of_its_cases(keep):
    assert copy_variance(keep, 1) == pytest.approx(keep * (1 - keep))
    assert bound_variance(keep, 1) == pytest.approx(keep * (1 - keep))


def test_10_the_loss_is_a_sawtooth():
    training = MaskedTraining(PROBLEM, network(), Scheme.ist(4, 10), lr=LR)
    for _ in range(60):
        trace = training.traced_round()
        assert trace.local[0] > trace.before, "rises where subnets are cut out"
        assert len(trace.local) == 11
        assert all(b < a for a, b in itertools.pairwise(trace.local)), "falls in local steps"
        assert trace.after < trace.local[-1], "falls on merging"


def test_tracing_changes_nothing():
    traced, plain = (
        MaskedTraining(PROBLEM, network(200), Scheme.bernoulli(0.5, 3, 2), lr=LR) for _ in range(2)
    )
    residuals = plain.fit(3)
    traces = [traced.traced_round() for _ in range(3)]
    assert torch.equal(traced.network.weight, plain.network.weight)
    losses = residuals.square().sum(dim=1).tolist()
    assert [traces[0].before, *(trace.after for trace in traces)] == pytest.approx(losses)


@pytest.mark.parametrize("sampler", [Bernoulli(0.4), Categorical()], ids=repr)
def test_wide_masks_are_those_of_the_engine(sampler):
    scheme = Scheme(sampler=sampler, num_subnets=4)
    for seed, round in itertools.product(range(3), range(3)):
        masks = scheme.masks(200, seed=seed, round=round)
        deal = sampler({"neurons": 200}, 4, seed=seed, round=round)
        for mask, units in zip(masks, deal.held["neurons"], strict=True):
            assert torch.equal(mask.nonzero()[:, 0], units)


@pytest.mark.parametrize("sampler", [Bernoulli(0.25), Categorical()], ids=repr)
def test_narrow_masks_have_the_exact_law(sampler):
    """Of 2 neurons, where the engine tops up most deals and the theory must not."""
    scheme, rounds = Scheme(sampler=sampler, num_subnets=4), 4000
    masks = torch.stack([scheme.masks(2, seed=0, round=round) for round in range(rounds)])
    error = 5 * (0.25 * 0.75 / rounds) ** 0.5
    assert (masks.double().mean(dim=0) - 0.25).abs().max() < error
    empty = (~masks.any(dim=2)).double().mean(dim=0)
    assert (empty - 0.75**2).abs().max() < error / 0.8
    if scheme.exclusive:
        assert bool((masks.sum(dim=1) == 1).all())


def test_a_round_without_any_neuron_changes_nothing():
    net = network(5)
    nothing = torch.zeros(3, 5, dtype=torch.bool)
    held, trained = train_subnets(PROBLEM, net, nothing, lr=LR, local_steps=2)
    assert torch.equal(merge_subnets(net, held, trained).weight, net.weight)
    assert torch.equal(single_step(PROBLEM, net, nothing, lr=LR).weight, net.weight)


def test_runs_repeat_and_leave_the_random_state_alone():
    state = torch.get_rng_state()
    runs = [
        MaskedTraining(PROBLEM, network(100), Scheme.bernoulli(0.5, 2, 2), lr=LR, seed=seed).fit(3)
        for seed in (0, 0, 1)
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("scheme", "keep", "coverage", "name"),
    [
        (Scheme.dropout(0.5), 0.5, 0.5, "dropout, ξ = 0.5"),
        (Scheme.multi_sample_dropout(0.5, 2), 0.5, 0.75, "multi-sample dropout, ξ = 0.5, p = 2"),
        (Scheme.bernoulli(0.5, 2, 3), 0.5, 0.75, "Bernoulli, ξ = 0.5, p = 2, τ = 3"),
        (Scheme.ist(4, 3), 0.25, 1.0, "IST, p = 4, τ = 3"),
        (Scheme.whole(), 1.0, 1.0, "gradient descent"),
    ],
    ids=str,
)
def test_the_cases_of_the_paper(scheme, keep, coverage, name):
    assert (scheme.keep, scheme.coverage, str(scheme)) == (keep, coverage, name)


@pytest.mark.parametrize(
    "settings",
    [
        {"sampler": DisjointUniform()},
        {"sampler": Categorical((0.5, 0.5)), "num_subnets": 2},
        {"sampler": Bernoulli(0.5), "num_subnets": 0},
        {"sampler": Bernoulli(0.5), "local_steps": 1.5},
    ],
    ids=repr,
)
def test_other_schemes_are_refused(settings):
    with pytest.raises(ConfigError):
        Scheme(**settings)


def training(*, scheme: Scheme | None = None, dim: int = PROBLEM.dim, **settings) -> MaskedTraining:
    net = Network.draw(10, dim, scale=1.0)
    return MaskedTraining(PROBLEM, net, scheme or Scheme.whole(), **{"lr": LR, **settings})


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: training(lr=0.0), "lr must be a positive number"),
        (lambda: training(scheme=Scheme.ist(2, 2), delay=1), "rounds late"),
        (lambda: training(delay=1).traced_round(), "where there is a delay"),
        (lambda: training(dim=9), "as many features.* got: a network of 9; expected: 20"),
        (lambda: training().fit(-1), "rounds must be a whole number from 0 on; got: -1"),
        (lambda: training().fit(1.5), "rounds must be a whole number from 0 on; got: 1.5"),
        (lambda: Network.draw(0, 3, scale=1.0), "scale"),
        (lambda: Scheme.dropout(1.5), "keep must be a probability"),
        (lambda: Problem.sphere(0), "num_samples must be a whole number of at least 1; got: 0"),
        (lambda: Problem.sphere(dim=0), "dim must be a whole number of at least 1; got: 0"),
    ],
    ids=[
        "step",
        "late steps",
        "late trace",
        "dim",
        "rounds below 0",
        "half rounds",
        "neurons",
        "keep",
        "no samples",
        "no features",
    ],
)
def test_what_cannot_be_trained_is_refused(make, said):
    with pytest.raises(ConfigError, match=said):
        make()


def test_steps_that_are_too_large_diverge():
    with pytest.raises(DivergedError, match="lower lr"):
        training(lr=1e6).fit(200)


def test_no_rounds_are_the_residuals_as_they_are():
    still = training()
    assert torch.equal(still.fit(0), still.residual()[None])
    assert still.rounds == 0


X, Y = PROBLEM.x[:4, :3], PROBLEM.y[:4]
BROKEN = torch.tensor([1.0, float("nan"), float("inf"), 0.0])


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"x": X[0]}, r"x must have a row for each sample.* got: shape \(3,\)"),
        ({"x": X[:0], "y": Y[:0]}, r"x must have a row for each sample.* got: shape \(0, 3\)"),
        ({"y": Y[1:]}, r"y must have one target.* got: shape \(3,\); expected: shape \(4,\)"),
        ({"y": Y[:, None]}, r"got: shape \(4, 1\).* remedy: y\[:, 0\]"),
        ({"propagation": torch.eye(3)}, r"propagation must have a row and a column"),
        ({"x": X * BROKEN[:, None]}, "x must hold finite numbers; got: 6 of 12"),
        ({"y": BROKEN}, "y must hold finite numbers; got: 2 of 4"),
        ({"propagation": torch.diag(BROKEN)}, "propagation must hold finite numbers"),
        ({"x": X + 1j}, "x must hold real numbers"),
        ({"x": X.to_sparse()}, "x cannot be read as a dense array of numbers"),
        ({"y": ["a", "b", "c", "d"]}, "y cannot be read as a dense array of numbers"),
    ],
    ids=[
        "one sample",
        "no samples",
        "length",
        "column",
        "matrix",
        "x not finite",
        "y not finite",
        "matrix not finite",
        "complex",
        "sparse",
        "words",
    ],
)
def test_other_problems_are_refused(parts, said):
    with pytest.raises(DataError, match=said):
        Problem(**{"x": X, "y": Y, **parts})


def test_arrays_and_lists_are_taken():
    wanted = Problem(x=X, y=Y, propagation=torch.eye(4))
    for made in (
        Problem(x=X.numpy(), y=Y.numpy(), propagation=np.eye(4)),
        Problem(x=X.tolist(), y=Y.tolist(), propagation=np.eye(4).tolist()),
    ):
        assert all(torch.equal(getattr(made, n), getattr(wanted, n)) for n in vars(wanted))
