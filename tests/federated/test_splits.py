"""Splits of samples over clients: what holds of each, and the distributions that they promise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from gist.errors import ConfigError, DataError
from gist.federated.splits import (
    IID,
    SPLITS,
    Dirichlet,
    Given,
    LabelShards,
    Split,
    label_counts,
    make_split,
    owners_of,
)

ALPHAS = st.sampled_from([1e-4, 0.05, 0.5, 5.0, 1e4])


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, int, int]:
    """Labels with gaps between them, a number of clients that can all have samples, and a seed."""
    count = draw(st.integers(1, 60))
    labels = draw(st.lists(st.sampled_from([-1, 0, 2, 7]), min_size=count, max_size=count))
    return torch.tensor(labels), draw(st.integers(1, count)), draw(st.integers(0, 999))


def parts_or_refusal(
    split: Split, labels: Tensor, clients: int, seed: int
) -> tuple[Tensor, ...] | ConfigError:
    try:
        return split.split(labels, clients, seed=seed)
    except ConfigError as error:
        return error


def entropy(counts: Tensor) -> Tensor:
    """Of the classes of every client, in nats."""
    shares = counts.double() / counts.sum(dim=1, keepdim=True)
    return torch.special.entr(shares).sum(dim=1)


# --- what holds of all of them ---


@given(
    problem=problems(),
    alpha=ALPHAS,
    kind=st.sampled_from(["iid", "balanced", "shards"]),
    min_samples=st.integers(1, 3),
)
def test_every_sample_has_one_client_and_every_client_enough(problem, alpha, kind, min_samples):
    labels, clients, seed = problem
    split: Split = {
        "iid": IID(min_samples=min_samples),
        "balanced": Dirichlet(alpha=alpha, min_samples=min_samples),
        "shards": LabelShards(per_client=2, min_samples=min_samples),
    }[kind]
    parts = parts_or_refusal(split, labels, clients, seed)
    if isinstance(parts, ConfigError):
        assert "too few samples" in parts.what
        # two shards of a client have each at least the quotient rounded down
        shards = 2 if kind == "shards" else 1
        assert shards * (len(labels) // (shards * clients)) < min_samples
        return
    check(parts, len(labels), clients, min_samples)
    again = split.split(labels, clients, seed=seed)
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= (2 if kind == "shards" else 1)


def check(parts: tuple[Tensor, ...], samples: int, clients: int, least: int) -> None:
    assert len(parts) == clients
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(samples))
    for part in parts:
        assert part.dtype == torch.int64
        assert len(part) >= least
        assert bool((part.diff() > 0).all())
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 1


@given(problem=problems(), alpha=ALPHAS, least=st.integers(1, 3))
def test_an_unbalanced_split_is_drawn_until_all_have_enough(problem, alpha, least):
    labels, clients, seed = problem
    assume(len(labels) >= clients * least)
    split = Dirichlet(alpha=alpha, balanced=False, min_samples=least)
    parts = parts_or_refusal(split, labels, clients, seed)
    if isinstance(parts, ConfigError):
        assert "100 draws" in parts.what
        assert clients > 1
        return
    check(parts, len(labels), clients, least)


@pytest.mark.parametrize("name", [*SPLITS, "unbalanced"])
def test_a_split_depends_on_its_seed_and_on_no_global_state(name):
    split = SPLITS.get(name, Dirichlet(alpha=5.0, balanced=False))
    labels = torch.arange(400) % 8
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    one, two = (split.split(labels, 10, seed=seed) for seed in (0, 1))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
    assert [p.tolist() for p in one] != [p.tolist() for p in two]


# --- what each promises ---


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    clients=st.integers(1, 8),
    per_client=st.integers(1, 4),
)
def test_label_shards_hold_few_labels(sizes, clients, per_client):
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    shards = clients * per_client
    assume(len(labels) >= shards)
    parts = LabelShards(per_client=per_client).split(labels, clients, seed=2)
    held = (label_counts(labels, parts, len(sizes)) > 0).sum(dim=1)
    # every boundary between two labels lies within one shard
    assert int(held.sum()) <= shards + len(sizes) - 1
    if -(-len(labels) // shards) <= min(sizes):
        assert int(held.max()) <= 2 * per_client


def test_shards_that_divide_the_classes_have_one_label_each():
    labels = torch.arange(6000) % 10  # McMahan et al.: 100 clients, 200 shards
    parts = LabelShards(per_client=2).split(labels, 100, seed=0)
    counts = label_counts(labels, parts, 10)
    assert set(counts.flatten().tolist()) == {0, 30, 60}
    assert int((counts > 0).sum(dim=1).max()) == 2


@pytest.mark.parametrize("seed", range(3))
def test_a_large_alpha_gives_everyone_the_labels_of_all(seed):
    labels, clients = torch.arange(20_000) % 5, 20
    for balanced in (True, False):
        split = Dirichlet(alpha=1e8, balanced=balanced)
        counts = label_counts(labels, split.split(labels, clients, seed=seed), 5)
        # each count is rounded; who chooses last gets what rounding left
        assert int((counts - 200).abs().max()) <= (clients if balanced else 1)
        assert float((counts - 200).abs().double().mean()) < 2


@pytest.mark.parametrize("seed", range(3))
def test_a_small_alpha_gives_everyone_one_label(seed):
    labels = torch.arange(3_000) % 6
    parts = Dirichlet(alpha=1e-6).split(labels, 70, seed=seed)
    counts = label_counts(labels, parts, 6)
    # a client has two labels only where one is used up while it chooses
    assert int(((counts > 0).sum(dim=1) > 1).sum()) <= 6
    # here whole classes go to single clients
    parts = Dirichlet(alpha=1e-6, balanced=False).split(labels, 1, seed=seed)
    assert len(parts[0]) == 3_000
    with pytest.raises(ConfigError, match="100 draws"):
        Dirichlet(alpha=1e-6, balanced=False).split(labels, 70, seed=seed)


def test_in_between_they_are_in_between():
    labels = torch.arange(10_000) % 10
    means = []
    for alpha in (0.01, 0.5, 2.0, 10.0, 1000.0):
        parts = Dirichlet(alpha=alpha).split(labels, 50, seed=0)
        means.append(float(entropy(label_counts(labels, parts, 10)).mean()))
    assert means == sorted(means)
    assert means[0] < 0.3
    assert means[-1] > 2.2


@pytest.mark.parametrize("alpha", [0.1, 0.5, 3.0])
def test_balanced_shares_are_dirichlet_with_the_prior_of_all(alpha):
    # Of the client that chooses first no class is used up: E[q] = p, and
    # E[Σ q²] = (α Σ p² + 1) / (α + 1). Rounding to hundredths adds at most 4/4 · 0.01².
    sizes = torch.tensor([400, 200, 100, 300])
    labels, clients = torch.arange(4).repeat_interleave(sizes), 10
    found = []
    for seed in range(400):
        first = np.random.default_rng(seed).permutation(clients)[0]
        owner = Dirichlet(alpha=alpha).deal(labels, clients, np.random.default_rng(seed))
        found.append(np.bincount(labels.numpy()[owner == first], minlength=4) / 100)
    shares, prior = np.array(found), sizes.numpy() / 1000
    expected = (alpha * (prior**2).sum() + 1) / (alpha + 1)
    each = (shares**2).sum(axis=1)
    assert abs(each.mean() - expected) < 4 * each.std() / 20 + 1e-4
    assert (abs(shares.mean(axis=0) - prior) < 4 * shares.std(axis=0) / 20).all()


@pytest.mark.parametrize("alpha", [0.1, 0.5, 3.0])
def test_shares_of_a_class_are_dirichlet_over_the_clients(alpha):
    # E[Σ_j s_j²] = (α + 1) / (K α + 1)
    classes, each, clients = 300, 200, 8
    labels = torch.arange(classes * each) % classes
    parts = Dirichlet(alpha=alpha, balanced=False).split(labels, clients, seed=0)
    shares = label_counts(labels, parts, classes).double() / each
    moments = (shares**2).sum(dim=0)
    expected = (alpha + 1) / (clients * alpha + 1)
    assert abs(float(moments.mean()) - expected) < 4 * float(moments.std()) / classes**0.5


# --- what is given ---


def test_given_parts_are_kept():
    parts = [[3, 1], np.array([0]), torch.tensor([2, 4])]
    split = Given(parts=parts)
    got = split.split(torch.rand(5, 2), 3, seed=9)
    assert [part.tolist() for part in got] == [[1, 3], [0], [2, 4]]
    assert repr(split) == "Given(3 clients, 5 samples)"


@pytest.mark.parametrize(
    ("parts", "clients", "error", "match"),
    [
        ([[0, 1], [1, 2]], 2, DataError, "1 in several"),
        ([[0], [2]], 2, DataError, "1 in no part"),
        ([[0, 1], [2, 3]], 2, DataError, "1 positions out of range"),
        ([[0, 1], [2, -1]], 2, DataError, "1 positions out of range"),
        ([[0, 1], [2]], 3, ConfigError, "another number of clients"),
        ([[0, 1, 2], []], 2, ConfigError, "too few samples"),
    ],
    ids=["twice", "missing", "beyond", "negative", "count", "empty"],
)
def test_given_parts_that_are_no_split_are_refused(parts, clients, error, match):
    with pytest.raises(error, match=match):
        Given(parts=parts).split(torch.zeros(3), clients, seed=0)


# --- refusals ---


@pytest.mark.parametrize(
    "labels",
    [
        torch.zeros(6, 3),
        torch.zeros(6, 3, dtype=torch.int64),
        torch.tensor([0.0, 1.0, float("nan"), 1.0, 0.0, 0.0]),
    ],
    ids=["columns", "numbers", "nan"],
)
def test_labels_that_are_not_one_each_are_refused(labels):
    for split in (Dirichlet(), Dirichlet(balanced=False), LabelShards()):
        with pytest.raises(DataError, match="only if each has one"):
            split.split(labels, 2, seed=0)
    assert len(IID().split(labels, 2, seed=0)) == 2


def test_sparse_labels_can_be_split_uniformly_alone():
    labels = torch.eye(6).to_sparse_csr()
    with pytest.raises(DataError, match="only if each has one"):
        LabelShards().split(labels, 2, seed=0)
    assert [len(part) for part in IID().split(labels, 2, seed=0)] == [3, 3]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Dirichlet(alpha=0.0), "alpha must be"),
        (lambda: Dirichlet(alpha=float("inf")), "alpha must be"),
        (lambda: Dirichlet(alpha="large"), "alpha must be"),
        (lambda: Dirichlet(balanced=1), "balanced must be"),
        (lambda: LabelShards(per_client=0), "per_client must be"),
        (lambda: IID(min_samples=0), "min_samples must be"),
        (lambda: IID().split(torch.zeros(3), 0, seed=0), "num_clients must be"),
        (lambda: IID().split(torch.zeros(3), 4, seed=0), "too few samples"),
        (lambda: make_split("idd"), "unknown split"),
        (lambda: make_split("iid:3"), "no number.*expected: iid"),
        (lambda: make_split("dirichlet:"), "alpha cannot be read.*expected: dirichlet:NUMBER"),
        (lambda: make_split("dirichlet:-1"), "alpha must be"),
        (lambda: make_split("label-shards:2.5"), "per_client cannot be read"),
    ],
    ids=[
        *("zero", "infinite", "text", "switch", "shards", "least", "none", "many", "name"),
        *("number of none", "empty number", "number below 0", "half a shard"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(make, match):
    with pytest.raises(ConfigError, match=match):
        make()


# --- names and tables ---


@pytest.mark.parametrize("name", SPLITS)
def test_splits_have_names(name):
    split = make_split(name)
    assert make_split(split) is split is SPLITS[name]
    assert len(split.split(torch.arange(40) % 4, 8, seed=0)) == 8


def test_a_number_may_follow_the_name():
    assert make_split("label-shards:5") == LabelShards(per_client=5)
    assert make_split("dirichlet:0.1") == Dirichlet(alpha=0.1)


@given(problem=problems())
def test_owners_and_parts_are_the_same(problem):
    labels, clients, seed = problem
    parts = IID().split(labels, clients, seed=seed)
    owner = owners_of(parts, len(labels))
    assert owner.dtype == torch.int64
    for client, part in enumerate(parts):
        assert torch.equal((owner == client).nonzero()[:, 0], part)


def test_label_counts_are_counts():
    labels = torch.tensor([0, 2, 2, 1, 2, 0])
    parts = (torch.tensor([1, 2, 3]), torch.tensor([0, 1]), torch.tensor([], dtype=torch.int64))
    assert label_counts(labels, parts, 4).tolist() == [[0, 1, 2, 0], [1, 0, 1, 0], [0] * 4]
    for bad in (torch.tensor([0, -1]), torch.tensor([0, 4]), torch.zeros(2, 4)):
        with pytest.raises(DataError, match="no class numbers"):
            label_counts(bad, (torch.tensor([0, 1]),), 4)
