"""What is counted without memory is what real tensors take, and what products compute."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gist.costs.tally import Tally, without_memory
from gist.graph.live_bytes import LiveBytes

SIZES = st.integers(1, 40)


def network(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(7, width), nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, 3))


def step(model: nn.Module, x: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    model(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@given(rows=SIZES, width=SIZES)
def test_without_memory_a_step_counts_as_with_memory(rows, width):
    def peaks(counter: LiveBytes) -> list[int]:
        model, x = network(width), torch.zeros(rows, 7)
        optimizer = torch.optim.Adam(model.parameters(), fused=True)
        found = []
        for _ in range(3):
            counter.peak = counter.bytes
            step(model, x, optimizer)
            found += [counter.peak, counter.bytes]
        return found

    with LiveBytes() as real:
        expected = peaks(real)
    with without_memory(), Tally() as counted:
        assert peaks(counted) == expected
    assert expected[2] > expected[0] > expected[1], "the second step has the optimiser's state"


def test_nothing_is_allocated():
    with without_memory(), Tally() as tally:
        x = torch.zeros(10**7, 10**6)
        assert (x @ x[:3].t()).shape == (10**7, 3)
    assert tally.bytes == 4 * 10**13
    del x
    assert tally.bytes == 0


@pytest.mark.parametrize(
    "product",
    [
        lambda a, b, out: a @ b,
        lambda a, b, out: torch.mm(a, b, out=out),
        lambda a, b, out: torch.addmm(out, a, b),
        lambda a, b, out: out.addmm_(a, b),
        lambda a, b, out: torch.nn.functional.linear(a, b.t(), out[0]),
        lambda a, b, out: torch.bmm(a[None], b[None]),
        lambda a, b, out: torch.bmm(a[None], b[None], out=out[None]),
    ],
)
@pytest.mark.parametrize("memory", [True, False])
def test_dense_products_are_counted(product, memory):
    def count() -> int:
        a, b, out = torch.ones(5, 6), torch.ones(6, 7), torch.ones(5, 7)
        with Tally() as tally:
            product(a, b, out)
        return tally.flops

    if memory:
        assert count() == 2 * 5 * 6 * 7
        return
    with without_memory():
        assert count() == 2 * 5 * 6 * 7


def test_messages_are_counted_as_products_with_the_graph():
    with without_memory(), Tally() as tally:
        x = torch.zeros(10, 4, requires_grad=True)
        sources, targets = torch.zeros(2, 30, dtype=torch.long)
        messages = x.index_select(0, sources)
        out = torch.zeros(10, 4).index_add(0, targets, messages)
        assert tally.flops == 2 * 30 * 4
        out.sum().backward()
    assert tally.flops == 2 * (2 * 30 * 4), "the gradient goes back along the edges"


def test_a_mask_chooses_the_most_that_it_can():
    with without_memory(), Tally():
        x, mask = torch.zeros(5, 3), torch.zeros(5, dtype=torch.bool)
        assert x[mask].shape == (5, 3)
        assert x[mask, 1].shape == (5,)
        assert x[x > 0].shape == (15,)
        assert mask.nonzero().shape == (5, 1)
        assert mask.nonzero().dtype == torch.int64
        assert torch.masked_select(x, x > 0).shape == (15,)
        x[mask] = torch.ones(5, 3)


def test_masks_with_memory_choose_what_they_choose():
    with Tally():
        x = torch.arange(6.0)
        assert x[x > 3].tolist() == [4, 5]
        assert (x > 3).nonzero()[:, 0].tolist() == [4, 5]


def test_conditions_without_memory_are_refused_unless_decided():
    with without_memory(), Tally() as tally:
        x = torch.zeros(3)
        with pytest.raises(RuntimeError):
            bool(x.sum() > 0)
        tally.decides = False
        assert bool((x > 0).all()) is False


def test_a_view_is_no_memory_and_a_copy_is():
    with without_memory(), Tally() as tally:
        x = torch.zeros(10, 10)
        views = [x.t(), x[2:], x.view(-1), x.detach()]
        assert tally.bytes == 400
        views.append(x[0].clone())
        assert tally.bytes == 440
