"""Scores of units: norms of the weights that compute them, and how far their weights moved."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gist.errors import ConfigError, PartitionError
from gist.nn import GAT, MLP, GraphSAGE, preact_resnet20
from gist.partition import scores
from gist.partition.index_map import IndexMap
from gist.partition.residual_wiring import wire_blocks, wire_filters
from gist.partition.samplers import Bernoulli
from gist.partition.scores import ranked, unit_changes, unit_norms
from gist.partition.spec import ParamLayout, PartitionSpec, Slot, UnitGroup, model_tensors
from gist.partition.transfer import Selection, extract, merge
from gist.partition.wiring import partition_spec
from tests.partition.test_extract_merge import entries, specs


@pytest.mark.parametrize("p", [1.0, 2.0, 3.5, math.inf])
def test_a_filter_has_the_norm_of_its_weights(p):
    model = preact_resnet20()
    norms = unit_norms(model, partition_spec(model), p)
    for path, module in model.named_modules():
        if not path.endswith("conv1"):
            continue
        expected = [torch.linalg.vector_norm(w.flatten(), ord=p) for w in module.weight]
        torch.testing.assert_close(norms[path], torch.stack(expected).detach())


def test_a_neuron_has_the_norm_of_its_row():
    model = MLP(5, 7, 3, num_layers=3)
    norms = unit_norms(model, partition_spec(model))
    torch.testing.assert_close(norms["hidden.1"], model.linears[1].weight.norm(dim=1).detach())
    assert torch.equal(
        unit_norms(model_tensors(model), partition_spec(model))["hidden.1"], norms["hidden.1"]
    )


def test_units_of_several_layers_and_positions_have_one_norm():
    model = GraphSAGE(4, 6, 2, num_layers=2)  # two weights compute each unit
    (group,) = partition_spec(model).groups
    conv = model.convs[0]
    both = torch.cat([conv.lin_l.weight, conv.lin_r.weight], dim=1)
    norms = unit_norms(model, partition_spec(model))[group]
    torch.testing.assert_close(norms, both.norm(dim=1).detach())
    heads = GAT(4, 12, 2, num_layers=2, heads=3, units="channels")  # a channel in every head
    (group,) = partition_spec(heads).groups
    rows = heads.convs[0].lin.weight.view(3, 4, 4).transpose(0, 1).flatten(1)
    found = unit_norms(heads, partition_spec(heads))[group]
    torch.testing.assert_close(found, rows.norm(dim=1).detach())


def test_ties_are_broken_by_number():
    assert ranked(torch.tensor([1.0, 3.0, 1.0, 3.0])).tolist() == [1, 3, 0, 2]


def test_what_has_no_norm_is_refused():
    model = preact_resnet20()
    with pytest.raises(PartitionError, match="no norm"):
        unit_norms(model, partition_spec(model, wire_blocks))
    chain = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with pytest.raises(ConfigError, match="p must be 1 or more"):
        unit_norms(chain, partition_spec(chain), 0.5)


def detached(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in model_tensors(model).items()}


def moved(tensors: Mapping[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """The same tensors, each some way off."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: t + torch.randn(t.shape, generator=generator).to(t.dtype)
        for name, t in tensors.items()
    }


def one_by_one(
    now: Mapping[str, Tensor], before: Mapping[str, Tensor], spec: PartitionSpec, p: float = 1.0
) -> dict[str, list[float]]:
    """Every unit's weights, entry by entry: those that any of its slots has."""
    found = {group: [0.0] * size for group, size in spec.sizes.items()}
    for name, layout in spec.layouts.items():
        if len(layout.shape) < 2:
            continue
        for entry in entries(layout.shape):
            owners = {layout.owner} if layout.owner is not None else set()
            for slot in layout.slots:
                for unit in range(spec.sizes[slot.group]):
                    for offset in slot.map.offsets:
                        begin = offset + unit * slot.map.width
                        if begin <= entry[slot.dim] < begin + slot.map.width:
                            owners.add((slot.group, unit))
            for group, unit in owners:
                found[group][unit] += abs(now[name][entry].item() - before[name][entry].item()) ** p
    return found


def compare(found: Mapping[str, Tensor], expected: Mapping[str, list[float]], **tolerance: float):
    assert found.keys() == expected.keys()
    for group, values in expected.items():
        expect = torch.tensor(values, dtype=torch.float64)
        torch.testing.assert_close(found[group], expect, **(tolerance or {"rtol": 1e-9, "atol": 0}))


def test_a_filter_moves_with_its_row_and_the_next_layers_slice():
    model = preact_resnet20(width=8).double()
    spec, before = partition_spec(model, wire_filters), detached(model)
    now = moved(before)
    found = unit_changes(now, before, spec)
    for path in spec.groups:
        block = path.removesuffix(".conv1")
        own, following = (
            (now[f"{block}.{conv}.weight"] - before[f"{block}.{conv}.weight"]).abs()
            for conv in ("conv1", "conv2")
        )
        expected = [float(own[u].sum() + following[:, u].sum()) for u in range(len(own))]
        torch.testing.assert_close(found[path], torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("p", [1.0, 2.0])
@pytest.mark.parametrize(
    "model",
    [
        MLP(3, 6, 2, num_layers=3),
        GraphSAGE(3, 5, 2, num_layers=2),
        GAT(3, 8, 2, num_layers=2, heads=2, units="channels"),
        preact_resnet20(width=2, in_channels=1),
    ],
    ids=["mlp", "sage", "gat", "resnet"],
)
def test_changes_of_models_are_those_of_their_entries(model, p):
    spec, before = partition_spec(model), detached(model.double())
    now = moved(before)
    compare(unit_changes(now, before, spec, p=p), one_by_one(now, before, spec, p))


@given(specs(), st.integers(1, 12))
def test_changes_are_those_of_the_entries_however_many_at_a_time(spec, at_once):
    before = {n: torch.zeros(lay.shape, dtype=torch.float64) for n, lay in spec.layouts.items()}
    now = moved(before)
    follow = {g for lay in spec.layouts.values() if len(lay.shape) > 1 for g in lay.groups}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores, "_ENTRIES_AT_ONCE", at_once)
        if follow != spec.groups.keys():
            with pytest.raises(PartitionError, match="no weight follows"):
                unit_changes(now, before, spec)
        else:
            compare(unit_changes(now, before, spec), one_by_one(now, before, spec))


def test_a_weight_that_a_unit_has_along_two_dims_counts_once():
    slots = (Slot(dim=0, group="g"), Slot(dim=2, group="g", map=IndexMap(width=2)))
    layout = ParamLayout(name="w", shape=(3, 2, 7), slots=slots)
    spec = PartitionSpec(groups={"g": UnitGroup(name="g", size=3)}, layouts={"w": layout})
    before = {"w": torch.zeros(3, 2, 7, dtype=torch.float64)}
    compare(unit_changes({"w": before["w"] + 1}, before, spec), {"g": [2 * (7 + 2 * 2)] * 3})


@given(st.integers(0, 99))
def test_changes_of_a_subnet_are_those_of_the_model_where_nothing_else_moved(seed):
    model = preact_resnet20(width=4, in_channels=1).double()
    spec, before = partition_spec(model, wire_filters), detached(model)
    deal = Bernoulli(keep=0.5)(spec.sizes, 1, seed=seed, round=0)
    selection, start = Selection(spec, deal, 0), extract(before, spec, deal, 0)
    end = moved(start, seed)
    whole = {name: t.clone() for name, t in before.items()}
    merge(whole, spec, deal, [end])
    found = unit_changes(end, start, spec, selection=selection)
    compare(found, {g: t.tolist() for g, t in unit_changes(whole, before, spec).items()})
    some = {n: t for n, t in end.items() if n.startswith("stages.0")}
    partial = unit_changes(some, start, spec, selection=selection)
    for group, changes in partial.items():
        expected = found[group] if group.startswith("stages.0") else torch.zeros_like(changes)
        torch.testing.assert_close(changes, expected)


def test_a_block_moves_with_all_of_its_weights():
    model = preact_resnet20(width=2, in_channels=1).double()
    spec, before = partition_spec(model, wire_blocks), detached(model)
    now = moved(before)
    (group,) = spec.groups
    found = unit_changes(now, before, spec)[group]
    for path, (_, unit) in spec.blocks.items():
        convs = (f"{path}.conv1.weight", f"{path}.conv2.weight")
        expected = sum(float((now[n] - before[n]).abs().sum()) for n in convs)
        assert found[unit].item() == pytest.approx(expected)


def test_halves_are_summed_as_whole_numbers_and_nothing_is_changed():
    model = MLP(300, 40, 3, num_layers=2).bfloat16()
    spec, before = partition_spec(model), detached(model)
    now = {name: t * 1.5 for name, t in before.items()}
    kept = {name: t.clone() for name, t in now.items()}
    found = unit_changes(now, before, spec)["hidden.0"]
    pairs = [(now[n].double() - before[n].double()).abs() for n in now if "linears" in n]
    expected = pairs[0].sum(1) + pairs[2].sum(0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert all(torch.equal(now[name], kept[name]) for name in now)


@pytest.mark.parametrize("p", [0.5, math.nan, math.inf])
def test_sums_of_no_power_are_refused(p):
    model = MLP(3, 4, 2, num_layers=2)
    with pytest.raises(ConfigError, match="p must be a number from 1 on"):
        unit_changes(model_tensors(model), model_tensors(model), partition_spec(model), p=p)
