"""The loss over some outputs: what is drawn, the formula, and that its sum is unbiased."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gist.metrics import loss
from gist.samples.batches import SampleBatch
from gist.samples.sampled_outputs import SampledOutputs

WIDTH = 12


def problem(seed: int, sparse: bool) -> tuple[Tensor, SampleBatch, set[int]]:
    """Scores of all outputs, a batch, and its labels."""
    rng = torch.Generator().manual_seed(seed)
    scores = torch.randn(5, WIDTH, generator=rng, dtype=torch.float64)
    if not sparse:
        y = torch.randint(WIDTH, (5,), generator=rng)
        return scores, SampleBatch(x=torch.zeros(5, 1), y=y), set(y.tolist())
    dense = (torch.rand(5, WIDTH, generator=rng) < 0.2).double()
    labels = set(dense.any(0).nonzero()[:, 0].tolist())
    return scores, SampleBatch(x=torch.zeros(5, 1), y=dense.to_sparse_csr()), labels


def task(sparse: bool) -> str:
    return "multilabel" if sparse else "multiclass"


@given(seed=st.integers(0, 200), count=st.integers(0, 15), sparse=st.booleans())
def test_the_labels_and_different_others_are_drawn(seed, count, sparse):
    _, batch, labels = problem(seed, sparse)
    sampled = SampledOutputs(WIDTH, count)
    got = sampled.restrict(batch, seed, 1)
    outputs = got.outputs.tolist()
    assert outputs[: len(labels)] == sorted(labels)
    others = outputs[len(labels) :]
    assert len(set(others)) == len(others) == min(count, WIDTH - len(labels))
    assert set(others).isdisjoint(labels)
    assert set(others) <= set(range(WIDTH))
    assert torch.equal(got.outputs, sampled.restrict(batch, seed, 1).outputs)


@given(seed=st.integers(0, 200), sparse=st.booleans())
def test_with_all_outputs_it_is_the_whole_loss(seed, sparse):
    scores, batch, _ = problem(seed, sparse)
    got = SampledOutputs(WIDTH, WIDTH).restrict(batch, 0)
    restricted = loss(task(sparse), scores[:, got.outputs] + got.correction, got.y)
    assert restricted == pytest.approx(float(loss(task(sparse), scores, batch.y)))


@given(seed=st.integers(0, 100), sparse=st.booleans(), count=st.integers(1, 5))
def test_the_loss_is_the_formula(seed, sparse, count):
    scores, batch, labels = problem(seed, sparse)
    got = SampledOutputs(WIDTH, count).restrict(batch, 3)
    known, drawn = got.outputs[: len(labels)], got.outputs[len(labels) :]
    expected = 0.0
    for z, y in zip(scores, batch.y.to_dense() if sparse else batch.y, strict=True):
        own = y.nonzero()[:, 0] if sparse else y.view(1)
        if len(own):
            weight = (WIDTH - len(labels)) / len(drawn)
            total = z[known].exp().sum() + weight * z[drawn].exp().sum()
            expected += float(total.log() - z[own].mean()) / len(scores)
    restricted = loss(task(sparse), scores[:, got.outputs] + got.correction, got.y)
    assert float(restricted) == pytest.approx(expected, rel=1e-6)


def test_the_sum_in_the_logarithm_is_unbiased_and_all_outputs_come_up():
    scores, batch, labels = problem(3, sparse=True)
    sampled = SampledOutputs(WIDTH, 3)
    total, seen, draws = torch.zeros(5).double(), torch.zeros(WIDTH), 1500
    for key in range(draws):
        got = sampled.restrict(batch, key)
        total += (scores[:, got.outputs] + got.correction).exp().sum(1)
        seen[got.outputs] += 1
    assert torch.allclose(total / draws, scores.exp().sum(1), rtol=0.05)
    share = 3 / (WIDTH - len(labels))
    others = [c for c in range(WIDTH) if c not in labels]
    assert torch.allclose(seen[others] / draws, torch.full((len(others),), share), atol=0.04)


def test_stacked_subnets_have_the_loss_of_each():
    scores, batch, _ = problem(5, sparse=True)
    got = SampledOutputs(WIDTH, 4).restrict(batch, 0)
    stacked = torch.stack([scores, 2 * scores, -scores], dim=1)[..., got.outputs]
    alone = [loss("multilabel", one + got.correction, got.y) for one in stacked.unbind(1)]
    assert torch.allclose(loss("multilabel", stacked + got.correction, got.y), torch.stack(alone))
