"""Link metrics against the Open Graph Benchmark's own evaluator, and against loops."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gist.errors import ConfigError, DataError
from gist.graph import link_metrics
from gist.graph.link_metrics import link_loss, link_metric, link_scores, rank_scores
from gist.metrics import loss


def scores(seed: int, *shape: int, ties: bool) -> torch.Tensor:
    """Random numbers; few different ones where ties are wanted."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.round() if ties else values


@pytest.fixture(scope="module")
def evaluator():
    pytest.importorskip("pandas")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("outdated", "dgl"):  # one asks the network, the other takes seconds
            patch.setitem(sys.modules, name, None)
        linkproppred = pytest.importorskip("ogb.linkproppred")
    return linkproppred.Evaluator


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_they_are_those_of_the_open_graph_benchmark(evaluator, seed, ties):
    positive = scores(seed, 83, ties=ties)
    own = scores(seed + 100, 83, 57, ties=ties)
    found = evaluator("ogbl-citation2").eval({"y_pred_pos": positive, "y_pred_neg": own})
    assert link_metric("mrr", positive, own) == float(found["mrr_list"].mean())
    shared = scores(seed + 200, 321, ties=ties)
    for name, k in (("ogbl-ppa", 100), ("ogbl-collab", 50), ("ogbl-ddi", 20)):
        found = evaluator(name).eval({"y_pred_pos": positive, "y_pred_neg": shared})
        assert link_metric(f"hits@{k}", positive, shared) == found[f"hits@{k}"]


@given(seed=st.integers(0, 10_000), k=st.integers(1, 9), ties=st.booleans())
def test_they_are_what_loops_count(seed, k, ties):
    positive, negative = scores(seed, 11, ties=ties), scores(seed + 1, 11, 9, ties=ties)
    total, hits = 0.0, 0
    for own, others in zip(positive.tolist(), negative.tolist(), strict=True):
        above = sum(other > own for other in others)
        equal = sum(other == own for other in others)
        total += 1 / (1 + above + equal / 2)
        hits += sum(other >= own for other in negative[0].tolist()) < k
    assert link_metric("mrr", positive, negative) == pytest.approx(total / 11, rel=1e-6)
    assert link_metric(f"hits@{k}", positive, negative[0]) == hits / 11


def test_scores_are_dot_products_however_many_at_a_time(monkeypatch):
    z, pairs = scores(0, 20, 3, 4, ties=False), torch.randint(20, (2, 5, 7))
    stacked = link_scores(z, pairs.flatten(1))
    assert stacked.shape == (35, 3)
    whole = rank_scores(z[:, 1], pairs)
    assert whole.shape == (5, 7)
    assert torch.equal(whole.flatten(), stacked[:, 1])
    assert float(whole[2, 3]) == pytest.approx(float(z[pairs[0, 2, 3], 1] @ z[pairs[1, 2, 3], 1]))
    monkeypatch.setattr(link_metrics, "_CHUNK_ENTRIES", 9)
    assert torch.equal(rank_scores(z[:, 1], pairs), whole)


def test_lists_and_arrays_have_scores_too():
    z, pairs = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], [[0, 0], [1, 2]]
    assert link_scores(z, pairs).tolist() == [11, 17]
    assert link_scores(torch.tensor(z), np.array(pairs)).tolist() == [11, 17]
    for wrong in ([[0, 1], [0, 2], [1, 2]], [[0.0], [1.0]], [0, 1]):
        with pytest.raises(DataError, match="pairs must hold numbers of nodes"):
            link_scores(z, wrong)


def test_the_loss_is_that_of_training_where_links_and_others_are_as_many():
    positive, negative = scores(0, 9, ties=False), scores(1, 9, ties=False)
    y = torch.cat([torch.ones(9), torch.zeros(9)])
    trained = loss("binary", torch.cat([positive, negative]), y)
    assert link_loss(positive, negative) == pytest.approx(float(trained))


@pytest.mark.parametrize("metric", ["auc", "hits@", "hits@1.5", "hits@-3", "MRR", None])
def test_other_metrics_are_refused(metric):
    with pytest.raises(ConfigError, match="unknown metric of link prediction"):
        link_metric(metric, torch.ones(1), torch.ones(1))
