"""Norms of units: those of the rows of the weights that compute them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from gist.errors import ConfigError, PartitionError
from gist.nn import GAT, MLP, GraphSAGE, preact_resnet20
from gist.partition.residual_wiring import wire_blocks
from gist.partition.scores import ranked, unit_norms
from gist.partition.wiring import partition_spec


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
