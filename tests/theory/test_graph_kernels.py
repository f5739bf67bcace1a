"""GIST-K: kernels, sampling error and bound on graphs (THEORY, test 14), and its assumptions."""

from __future__ import annotations

import dataclasses
import itertools
import math

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch_geometric.data import Data

from gist import ConfigError, DataError, GraphData, load_dataset
from gist.graph.adjacency import Adjacency
from gist.graph.generate import csbm
from gist.theory import (
    MaskedTraining,
    Network,
    Problem,
    Scheme,
    Spectrum,
    gist_gamma,
    gist_gap,
    gist_radius,
    gist_step,
    graph_problem,
    graph_report,
    propagation_matrix,
    propagation_norm,
    sampling_variance,
)

NODES, DIM, SUBNETS = 60, 20, 2


def adjacency(graph: nx.Graph) -> Adjacency:
    edges = torch.tensor(list(graph.to_directed().edges), dtype=torch.int64).reshape(-1, 2).T
    return Adjacency(edges, graph.number_of_nodes())


def circulant_with_random_edges() -> nx.Graph:
    graph = nx.circulant_graph(NODES, [1, 2])
    drawn = np.random.default_rng(0).integers(NODES, size=(NODES, 2))
    graph.add_edges_from((int(a), int(b)) for a, b in drawn if a != b)
    return graph


GRAPH = adjacency(circulant_with_random_edges())
SAMPLES = Problem.sphere(NODES, DIM)
PROBLEM = graph_problem(GRAPH, SAMPLES.x, SAMPLES.y)


def network(width: int, seed: int = 0) -> Network:
    return Network.draw(width, DIM, scale=NODES**-0.5, seed=seed)


def test_14_kernels_of_sub_gcns_approach_the_infinite_one():
    infinite, means = PROBLEM.kernel(1 / SUBNETS), []
    for width in (4000, 16_000, 64_000):
        errors = []
        for seed in range(4):
            mask = Scheme.ist(SUBNETS, 1).masks(width, seed=seed, round=0)[0]
            difference = PROBLEM.finite_kernel(network(width, seed), mask) - infinite
            errors.append(float(difference.norm() / infinite.norm()))
        means.append(sum(errors) / len(errors))
    assert means[0] < 0.04
    assert means[0] > means[1] > means[2]


@pytest.mark.parametrize("num_subnets", [2, 3])
def test_14_the_sampling_error_is_exact(num_subnets):
    """Over all deals of a few neurons."""
    width = 5
    net, scheme = network(width), Scheme.ist(num_subnets, 1)
    mean = scheme.keep * net.outputs(PROBLEM)
    owners = torch.tensor(list(itertools.product(range(num_subnets), repeat=width)))
    deviations = net.outputs(PROBLEM, owners == 0) - mean
    error = float(deviations.square().sum(dim=1).mean())
    hidden = PROBLEM.propagation @ (PROBLEM.x @ net.weight.T).relu()
    formula = (num_subnets - 1) / (num_subnets**2 * width) * float(hidden.square().sum())
    assert error == pytest.approx(formula, rel=1e-12)
    assert sampling_variance(PROBLEM, net, scheme) == pytest.approx(formula, rel=1e-12)


@pytest.mark.parametrize("local_steps", [1, 10])
def test_14_a_round_takes_off_what_the_bound_promises(local_steps):
    spectrum = Spectrum.of(PROBLEM.kernel(1 / SUBNETS))
    for lr in (gist_step(PROBLEM.propagation, spectrum.smallest), 0.1 / spectrum.largest):
        training = MaskedTraining(PROBLEM, network(4000), Scheme.ist(SUBNETS, local_steps), lr=lr)
        losses = training.fit(8).square().sum(dim=1)
        gap = gist_gap(SUBNETS, local_steps, lr=lr, smallest=spectrum.smallest)
        assert gap > 0
        assert float((losses[1:] / losses[:-1]).max()) <= 1 - gap


def test_the_kernel_of_a_graph_is_that_of_the_gradients():
    net = network(30)
    weight = net.weight.clone().requires_grad_()
    mask = Scheme.ist(SUBNETS, 1).masks(30, seed=0, round=0)[0]
    outputs = Network(weight=weight, signs=net.signs).outputs(PROBLEM, mask[None])[0]
    rows = [
        torch.autograd.grad(output, weight, retain_graph=True)[0].flatten() for output in outputs
    ]
    jacobian = torch.stack(rows)
    torch.testing.assert_close(PROBLEM.finite_kernel(net, mask), jacobian @ jacobian.T)


@given(st.integers(2, 12), st.floats(0.1, 0.9), st.integers(0, 100))
def test_the_propagation_matrix_is_the_formula(nodes, density, seed):
    graph = nx.gnp_random_graph(nodes, density, seed=seed)
    dense = torch.from_numpy(nx.to_numpy_array(graph))
    scale = torch.where(dense.sum(1) > 0, dense.sum(1), torch.inf).rsqrt()
    expected = torch.eye(nodes, dtype=torch.float64) + scale[:, None] * dense * scale
    found = propagation_matrix(adjacency(graph))
    torch.testing.assert_close(found, expected)
    values = torch.linalg.eigvalsh(found)
    assert -1e-12 < float(values[0]) <= float(values[-1]) < 2 + 1e-12
    assert propagation_norm(found) == pytest.approx(float((found @ found).sum()))


@pytest.mark.parametrize(
    ("graph", "bipartite"),
    [
        (nx.cycle_graph(8), True),
        (nx.cycle_graph(9), False),
        (nx.star_graph(5), True),
        (nx.complete_graph(4), False),
    ],
    ids=["even cycle", "odd cycle", "star", "complete"],
)
def test_bipartite_components_make_it_singular(graph, bipartite):
    report = graph_report(data_of(graph))
    assert report.is_bipartite == bipartite
    smallest = float(torch.linalg.eigvalsh(propagation_matrix(adjacency(graph)))[0])
    assert (smallest < 1e-12) == bipartite
    assert (report.smallest == 0.0) == bipartite
    assert ("numerically zero" in str(report)) == bipartite


def data_of(graph: nx.Graph, x: torch.Tensor | None = None) -> GraphData:
    n = graph.number_of_nodes()
    x = Problem.sphere(n, 30).x if x is None else x
    splits = {"train": [0], "val": [1], "test": [2]}
    return GraphData.from_networkx(graph, x=x, y=[0, 1] * (n // 2) + [0] * (n % 2), **splits)


def test_the_largest_component_is_reported():
    parts = nx.disjoint_union(nx.cycle_graph(4), nx.disjoint_union(nx.cycle_graph(9), nx.Graph()))
    x = Problem.sphere(13, 30).x
    report, alone = graph_report(data_of(parts, x)), graph_report(data_of(nx.cycle_graph(9), x[4:]))
    assert (report.num_nodes, report.num_components, report.num_kept) == (13, 2, 9)
    assert report.smallest == pytest.approx(alone.smallest)
    assert "2 components" in str(report)
    assert report.degree_spread == 0.0


def test_the_degree_spread_is_the_least():
    report = graph_report(data_of(nx.star_graph(9)))
    epsilon = report.degree_spread
    middle = 1 / (1 - epsilon) ** 2
    assert (1 + epsilon) ** 2 * middle == pytest.approx(9.0)


def test_parallel_rows_are_counted():
    graph = nx.complete_graph(7)
    graph.add_edge(0, 7)
    graph.add_edge(7, 8)
    same = torch.ones(9, 3, dtype=torch.float64)
    report = graph_report(data_of(graph, same))
    assert report.parallel_rows == 9
    assert report.vacuous == "λ0 of G∞ is numerically zero"
    assert "parallel" in str(report)
    assert graph_report(data_of(graph)).parallel_rows == 0


def test_a_small_gap_keeps_its_digits():
    gap = gist_gap(4, 7, lr=1e-9, smallest=1e-9)
    expected = (1 - gist_gamma(4)) * 7 * 0.5e-18
    assert gap == pytest.approx(expected, rel=1e-9)
    rate = gist_gamma(4) + (1 - gist_gamma(4)) * (1 - 0.05) ** 7
    assert 1 - gist_gap(4, 7, lr=1.0, smallest=0.1) == pytest.approx(rate)


def test_one_subnet_is_gradient_descent():
    assert gist_gamma(1) == 0.0
    assert 1 - gist_gap(1, 3, lr=1.0, smallest=0.1) == pytest.approx(0.95**3)
    assert gist_radius(1, dim=3, scale=1.0, smallest=0.0, largest=1.0, norm=5.0) == 0.0


def test_the_radius_is_the_corrected_one():
    gamma = gist_gamma(4)
    radius = gist_radius(4, dim=3, scale=0.5, smallest=0.1, largest=2.0, norm=7.0)
    assert radius == pytest.approx(gamma**2 * 3 * 0.25 * 400 * 7 / (4 * (1 - gamma)))
    assert gist_radius(4, dim=3, scale=0.5, smallest=0.0, largest=2.0, norm=7.0) == math.inf


def test_the_sampling_error_falls_as_one_over_subnets():
    """At the same network (p - 1) / p², not 1 / p²."""
    net = network(100)
    errors = [sampling_variance(PROBLEM, net, Scheme.ist(p, 1)) for p in (8, 16, 32)]
    assert [errors[0] / e for e in errors] == pytest.approx([1.0, 28 / 15, 112 / 31])


def test_a_step_that_is_too_large_has_no_bound():
    with pytest.raises(ConfigError, match="lower lr"):
        gist_gap(2, 1, lr=100.0, smallest=0.1)


def test_large_and_directed_graphs_are_refused():
    with pytest.raises(ConfigError, match="at most 20"):
        graph_report(data_of(nx.cycle_graph(21)), max_nodes=20)
    one_way = Adjacency(torch.tensor([[0, 1], [1, 2]]), 3)
    with pytest.raises(DataError, match="symmetrize"):
        propagation_matrix(one_way)
    negative = Adjacency(torch.tensor([[0, 1], [1, 0]]), 2, torch.tensor([-1.0, -1.0]))
    with pytest.raises(DataError, match="negative"):
        propagation_matrix(negative)


def test_other_data_than_a_graph_are_refused():
    with pytest.raises(DataError, match=r"no graph.* got: SampleData; expected: a GraphData"):
        graph_report(load_dataset("digits-images"))


def test_a_graph_of_pyg_is_taken():
    data = data_of(nx.complete_graph(7))
    other = Data(x=data.x, edge_index=data.edge_index, y=data.y)
    for split in ("train_mask", "val_mask", "test_mask"):
        other[split] = getattr(data, split)
    reports = [graph_report(each) for each in (data, other)]
    assert reports[1] == dataclasses.replace(reports[0], name=reports[1].name)


DATA = csbm(num_nodes=200, num_features=300, num_classes=4, average_degree=8)


def test_the_report_of_a_random_graph():
    report = graph_report(DATA, num_subnets=4)
    assert report.num_kept <= 200
    assert 0 < report.smallest < report.largest
    assert "m = 4" in str(report)


def test_a_bound_is_vacuous_for_three_reasons():
    report = graph_report(DATA, scale=1e-6)
    assert report.vacuous is None
    assert "vacuous" not in str(report)
    wide = graph_report(DATA)
    assert wide.radius == pytest.approx(report.radius * 1e12 / wide.num_kept)
    assert wide.vacuous == "the radius exceeds the loss of targets of size 1"
    assert graph_report(DATA, scale=1e-6, lr=1e-30).vacuous == "ρ rounds to 1"
    assert dataclasses.replace(report, smallest=0.0).vacuous == "λ0 of G∞ is numerically zero"


def test_zeros_of_a_sparse_graph_change_nothing():
    problem = graph_problem(DATA.adjacency, DATA.x, DATA.y)
    propagation = problem.propagation
    assert int(propagation.count_nonzero()) < propagation.numel() / 20
    expected = propagation @ Problem(x=problem.x, y=problem.y).kernel(0.5) @ propagation
    torch.testing.assert_close(problem.kernel(0.5), expected)


@pytest.mark.slow
@pytest.mark.realdata
@pytest.mark.parametrize("name", ["cora", "citeseer"])
def test_on_citation_graphs_the_bound_is_vacuous(name, real_data_root):
    report = graph_report(load_dataset(name, root=real_data_root))
    assert report.smallest == 0.0
    assert report.vacuous == "λ0 of G∞ is numerically zero"
