"""Tickets and the distance of rankings (LoFT; THEORY, test 15)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gist import FilterRanks, LoFTTrainer, find_ticket, partition_spec, ranking_distance
from gist.errors import ConfigError, PartitionError
from gist.nn import VGG
from gist.partition.scores import unit_norms
from gist.plots import distance_heatmap
from gist.verify import masked_model
from tests.methods.runs import DATA, make, resnet


def permutations(size: st.SearchStrategy[int]) -> st.SearchStrategy[torch.Tensor]:
    return size.flatmap(lambda n: st.permutations(range(n))).map(torch.tensor)


@given(permutations(st.integers(1, 40)))
def test_a_ranking_is_at_no_distance_from_itself(order):
    assert ranking_distance(order, order) == 0.0


@given(permutations(st.integers(2, 40)))
def test_swapping_the_top_two_costs_one_and_a_half_ln_2(order):
    swapped = order.clone()
    swapped[:2] = order[:2].flip(0)
    assert ranking_distance(order, swapped) == pytest.approx(1.5 * math.log(2), abs=1e-12)


@given(permutations(st.integers(1, 30)), st.randoms(use_true_random=False))
def test_it_is_the_sum_of_the_paper(before, random):
    after = before.tolist()
    random.shuffle(after)
    total = sum(
        abs(math.log(rank) - math.log(after.index(unit) + 1)) / rank
        for rank, unit in enumerate(before.tolist(), start=1)
    )
    assert ranking_distance(before, torch.tensor(after)) == pytest.approx(total, abs=1e-12)


def test_it_is_not_symmetric():
    one, other = torch.arange(3), torch.tensor([1, 2, 0])
    assert ranking_distance(one, other) != pytest.approx(ranking_distance(other, one))


@pytest.mark.parametrize(("size", "mean"), [(64, 8.36), (256, 14.7), (512, 18.2)])
def test_random_rankings_are_far_apart(size, mean):
    generator = torch.Generator().manual_seed(0)
    first = torch.arange(size)
    found = [ranking_distance(first, torch.randperm(size, generator=generator)) for _ in range(300)]
    assert sum(found) / len(found) == pytest.approx(mean, rel=0.03)


@pytest.mark.parametrize("other", [[0, 1], [0, 1, 1], [0, 1, 3]])
def test_other_units_are_refused(other):
    with pytest.raises(ConfigError, match="name each of its units once"):
        ranking_distance(torch.arange(3), torch.tensor(other))


@pytest.mark.parametrize("build", [resnet, lambda: VGG(((6,), (9, 7)), in_channels=1)])
@pytest.mark.parametrize("pruned", [0.0, 0.5, 0.8])
def test_a_ticket_is_the_model_without_the_other_filters(build, pruned):
    model = build().double().eval()
    spec = partition_spec(model)
    ticket = find_ticket(model, spec, pruned=pruned)
    small = ticket.cut(model).eval()
    norms = unit_norms(model, spec)
    for group, size in spec.sizes.items():
        kept = ticket.assignment.held[group][0]
        assert len(kept) == max(1, round(size * (1 - pruned)))
        dropped = torch.ones(size, dtype=torch.bool).index_fill(0, kept, False)
        assert not dropped.any() or norms[group][dropped].max() <= norms[group][kept].min()
    x = torch.rand(4, 1, 6, 6, dtype=torch.float64)
    masked = masked_model(model, spec, ticket.assignment, 0).eval()
    torch.testing.assert_close(small(x), masked(x), rtol=1e-12, atol=1e-14)
    fewer = sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    assert fewer == (pruned > 0)


def test_a_ticket_rewinds_to_other_values_of_the_model():
    torch.manual_seed(0)
    first, trained = resnet(), resnet()
    ticket = find_ticket(trained, partition_spec(trained), pruned=0.5)
    group, (kept,) = next(iter(ticket.assignment.held.items()))
    weight = ticket.cut(first).get_submodule(group).weight
    assert torch.equal(weight, first.get_submodule(group).weight[kept])


def test_a_ticket_trains_on():
    trainer = make("loft")
    trainer.fit()
    small = find_ticket(trainer.model, trainer.spec, pruned=0.5).cut(trainer.model)
    tuned = LoFTTrainer(
        small, DATA["pictures"], num_subnets=1, rounds=6, local_steps=3, batch_size=16, lr=0.05
    )
    losses = [record.train_loss for record in tuned.fit().history]
    assert sum(losses[-2:]) < sum(losses[:2])
    for group, size in tuned.spec.sizes.items():
        assert size == trainer.spec.sizes[group] // 2


def test_the_spec_of_another_model_is_refused():
    spec = partition_spec(VGG(((6,), (9, 7)), in_channels=1))
    with pytest.raises(PartitionError, match=r"spec does not fit PreActResNet.*\n.*has no layout"):
        find_ticket(resnet(), spec, pruned=0.5)


@pytest.mark.parametrize("pruned", [1.0, -0.1, float("nan"), "0.5", None])
def test_all_filters_cannot_be_pruned(pruned):
    model = resnet()
    with pytest.raises(ConfigError, match="a share in"):
        find_ticket(model, partition_spec(model), pruned=pruned)


def test_rankings_are_kept_round_by_round():
    ranks = FilterRanks()
    trainer = make("loft", callbacks=ranks)
    result = trainer.fit()
    assert ranks.epochs == [record.epochs for record in result.history]
    assert ranks.rankings.keys() == trainer.spec.groups.keys()
    for group in ranks.rankings:
        distances = ranks.distances(group)
        assert distances[-1] == 0.0
        first = ranks.rankings[group][0]
        assert ranks.distances(group, to=first)[0] == 0.0


def test_distances_are_drawn_group_by_group():
    distances = {"a": [3.0, 1.0, 0.0], "b": [0.5, 2.0, 0.0]}
    figure = distance_heatmap(distances, [2.0, 4.0, 6.0])
    (image,) = figure.axes[0].images
    assert image.get_array().tolist() == list(distances.values())
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["a", "b"]
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["2", "4", "6"]
