"""Functions of rows in chunks, and norms over all nodes in two passes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch_geometric.nn.models import MLP

from gist.graph.live_bytes import LiveBytes
from gist.graph.rowwise import (
    GraphNorm,
    Moments,
    RowFunction,
    as_graph_norm,
    is_row_wise,
    register_row_wise,
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.booleans(), st.integers(0, 99))
def test_moments_of_chunks_are_those_of_the_whole(sizes, by_column, seed):
    x = random(sum(sizes), 4, seed=seed) + 1000.0  # a mean far from zero costs no digits
    moments = Moments(by_column=by_column)
    for chunk in x.split(sizes):
        moments.add(chunk)
    mean, variance = moments.result(x.dtype)
    wanted = torch.var_mean(x, dim=0 if by_column else None, correction=0)
    assert torch.allclose(variance, wanted[0], rtol=1e-9, atol=1e-12)
    assert torch.allclose(mean, wanted[1], rtol=1e-14)


@given(rows=st.integers(1, 60), work=st.integers(0, 20_000))
def test_chunks_give_what_the_whole_gives_within_their_memory(rows, work):
    steps = [nn.LayerNorm(16).double(), F.gelu, torch.tanh]
    x = random(rows, 16)
    with torch.no_grad():
        expected = torch.tanh(F.gelu(steps[0](x)))
        function = RowFunction(steps, 16, x)
        seen: list[torch.Tensor] = []
        with LiveBytes() as live:
            function.in_place(x, work, lambda part: seen.append(part))
    assert torch.allclose(x, expected, rtol=0, atol=1e-14)
    assert torch.equal(torch.cat(seen), x)
    assert live.peak <= max(work, function.smallest)


def test_no_steps_are_the_identity():
    x = random(5, 3)
    function = RowFunction([], 3, x)
    function.in_place(x, 0, None)
    assert torch.equal(x, random(5, 3))
    assert (function.smallest, function.out_width) == (0, 3)


NORMS = [
    lambda: pyg.LayerNorm(6, affine=True),
    lambda: pyg.LayerNorm(6, affine=False),
    lambda: nn.BatchNorm1d(6, track_running_stats=False),
    lambda: pyg.BatchNorm(6, track_running_stats=False),
    lambda: nn.BatchNorm1d(6, affine=False, track_running_stats=False),
]


@pytest.mark.parametrize("make", NORMS)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=5), st.integers(0, 99))
def test_two_passes_are_the_norm_over_all_nodes(make, sizes, seed):
    norm = make().double().eval()
    for parameter in norm.parameters():
        parameter.data = random(*parameter.shape, seed=seed + 1)
    x = random(sum(sizes), 6, seed=seed)
    two_pass = as_graph_norm(norm)
    assert isinstance(two_pass, GraphNorm)
    assert not is_row_wise(norm)
    moments = two_pass.moments()
    for chunk in x.split(sizes):
        moments.add(chunk)
    with torch.no_grad():
        step = two_pass.step(moments, x.dtype)
        got = torch.cat([step(chunk) for chunk in x.split(sizes)])
        assert torch.allclose(got, norm(x), rtol=1e-9, atol=1e-9)


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.LayerNorm(4), True),
        (pyg.LayerNorm(4, mode="node"), True),
        (pyg.LayerNorm(4, mode="graph"), False),
        (nn.BatchNorm1d(4), True),
        (pyg.BatchNorm(4), True),
        (nn.BatchNorm1d(4, track_running_stats=False), False),
        (pyg.BatchNorm(4, track_running_stats=False), False),
        (pyg.GraphNorm(4), False),
        (pyg.PairNorm(), False),
        (nn.Softmax(dim=0), False),
        (MLP([4, 4, 4]), True),
        (MLP([4, 4, 4], norm="layer_norm"), False),  # PyG's norms over all nodes by default
        (MLP([4, 4, 4], norm="layer_norm", norm_kwargs={"mode": "node"}), True),
        (nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.BatchNorm1d(4)), True),
        (nn.Sequential(nn.Linear(4, 4), Doubled()), False),
        (F.relu, True),
        (None, True),
    ],
)
def test_only_what_is_known_to_treat_nodes_apart_is_taken_for_it(module, expected):
    assert is_row_wise(module) is expected


def test_a_type_of_ones_own_is_declared_exactly():
    class Tripled(Doubled):
        pass

    assert not is_row_wise(Tripled())
    register_row_wise(Tripled)
    assert is_row_wise(nn.Sequential(Tripled()))
    assert not is_row_wise(Doubled())


def test_norms_without_a_two_pass_form_have_none():
    assert as_graph_norm(pyg.GraphNorm(4)) is None
    assert as_graph_norm(pyg.InstanceNorm(4)) is None
