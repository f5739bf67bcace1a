"""From a wiring to a spec: chains, named groups, and every finding in one error."""

from __future__ import annotations

import pytest
import torch
import torch_geometric.nn as pyg
from torch import Tensor, nn

from gist import SpecBuilder, partition_spec
from gist.errors import ConfigError, GistError, PartitionError


class Residual(nn.Module):
    """embed -> h; h + conv1(h); h + conv2(h); head."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Linear(5, width)
        self.conv1, self.norm1 = pyg.GCNConv(width, width), nn.LayerNorm(width)
        self.conv2 = pyg.SAGEConv(width, width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        h = self.embed(x)
        h = h + self.norm1(self.conv1(h, edge_index)).relu()
        h = h + self.conv2(h, edge_index).relu()
        return self.head(h)


WIRING = {
    "hidden": {
        "out": ["embed", "conv1", "conv2"],
        "through": ["norm1"],
        "in": ["conv1", "conv2", "head"],
    }
}


def slots(spec, name):
    return {(s.dim, s.group) for s in spec.layouts[name].slots}


def test_named_groups():
    spec = partition_spec(Residual(), WIRING)
    assert spec.sizes == {"hidden": 8}
    assert slots(spec, "embed.weight") == {(0, "hidden")}
    assert slots(spec, "conv1.lin.weight") == {(0, "hidden"), (1, "hidden")}
    assert slots(spec, "norm1.weight") == {(0, "hidden")}
    assert slots(spec, "head.weight") == {(1, "hidden")}
    assert slots(spec, "head.bias") == set()


def test_chain():
    model = nn.Sequential(
        nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 2)
    )
    spec = partition_spec(model, ["0", "1", "2", "3", "4"])
    assert spec.sizes == {"0": 6, "2": 5}
    assert slots(spec, "2.weight") == {(0, "2"), (1, "0")}
    assert slots(spec, "3.bias") == {(0, "2")}


def test_named_groups_feed_a_concatenation_in_their_order():
    class Cat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(3, 4), nn.Linear(3, 5), nn.Linear(9, 2)

    wiring = {"a": {"out": ["a"], "in": ["head"]}, "b": {"out": ["b"], "in": ["head"]}}
    spec = partition_spec(Cat(), wiring)
    starts = {s.group: s.map.offsets for s in spec.layouts["head.weight"].slots}
    assert starts == {"a": (0,), "b": (4,)}


def test_named_groups_with_heads_as_units():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = pyg.GATConv(5, 3, heads=4), nn.Linear(12, 2)

    wiring = {"h": {"out": ["conv"], "in": ["head"], "units": "heads"}}
    assert partition_spec(Net(), wiring).sizes == {"h": 4}


def test_a_layer_that_no_group_names_is_refused_by_name():
    class Net(Residual):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(3, 3)

    with pytest.raises(PartitionError, match=r"last\.weight: no layer of the wiring declares it"):
        partition_spec(Net(), WIRING)


def test_every_finding_is_raised_at_once():
    model = nn.ModuleDict(
        {
            "a": nn.Linear(4, 6),
            "odd": nn.Softmax(-1),
            "narrow": nn.LayerNorm(5),
            "lazy": nn.LazyLinear(3),
            "forgotten": nn.Linear(2, 2),
        }
    )
    with pytest.raises(PartitionError) as caught:
        partition_spec(model, ["a", "odd", "ghost", "a", "narrow", "lazy"])
    text = str(caught.value)
    for part in ("Softmax", "ghost: no such module", "lazy", "forgotten.weight", "forgotten.bias"):
        assert part in text, text


def test_findings_about_widths_name_the_layer():
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(5), nn.Linear(7, 2))
    with pytest.raises(PartitionError) as caught:
        partition_spec(model, ["0", "1", "2"])
    assert "1: takes 5 input features, but the wiring brings 6" in str(caught.value)


def test_layers_of_different_width_cannot_share_a_group():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(3, 4), nn.Linear(3, 5), nn.Linear(4, 2)

    with pytest.raises(PartitionError, match="'h' is shared by layers of different width"):
        partition_spec(Net(), {"h": {"out": ["a", "b"], "in": ["head"]}})


def test_a_forgotten_parameter_of_the_model_itself():
    class Net(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(3, 4), nn.Linear(4, 2))
            self.scale = nn.Parameter(torch.ones(4))
            self.register_buffer("mask", torch.ones(4))

    with pytest.raises(PartitionError) as caught:
        partition_spec(Net(), ["0", "1"])
    assert "scale: no layer of the wiring declares it" in str(caught.value)
    assert "mask: no layer of the wiring declares it" in str(caught.value)


def test_an_unknown_model_asks_for_a_wiring():
    with pytest.raises(
        PartitionError, match=r"wiring of Residual is not known.*wiring=\[\.\.\.\].*conv1"
    ):
        partition_spec(Residual())


def test_a_model_may_declare_its_own():
    class Own(Residual):
        def declare_wiring(self, builder: SpecBuilder) -> None:
            axis = builder.layer("embed", None, produces="h")
            for name in ("conv1", "norm1", "conv2"):
                axis = builder.layer(name, axis, produces="h" if "conv" in name else None)
            builder.layer("head", axis)

    wired = partition_spec(Residual(), {"h": WIRING["hidden"]})
    assert partition_spec(Own()).layouts == wired.layouts


@pytest.mark.parametrize(
    "wiring",
    [
        "conv1",
        7,
        {"h": {"in": ["head"]}},
        {"h": {"out": []}},
        {"h": {"out": ["embed"], "into": ["head"]}},
        {"h": ["embed"]},
        [1, 2],
        [("embed", "heads", "more")],
        {},
        [],
        {"h": {"out": ["norm1"], "in": ["head"]}},
        {"h": {"out": ["nowhere"], "in": ["head"]}},
        {"h": {"out": "embed", "in": ["head"]}},
    ],
    ids=repr,
)
def test_malformed_wirings_are_refused_in_words(wiring):
    with pytest.raises(GistError) as caught:
        partition_spec(Residual(), wiring)
    assert isinstance(caught.value, ConfigError | PartitionError)


def test_a_layer_used_twice_with_different_units_is_refused():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = (
                nn.Linear(4, 4),
                nn.Linear(4, 4),
                nn.LayerNorm(4, elementwise_affine=False),
            )
            self.head = nn.Linear(4, 2)

    with pytest.raises(PartitionError, match="used twice"):
        partition_spec(Shared(), ["a", "norm", "b", "norm", "head"])


def test_activations_may_be_used_twice():
    model = nn.ModuleDict(
        {"a": nn.Linear(4, 6), "act": nn.ReLU(), "b": nn.Linear(6, 5), "c": nn.Linear(5, 2)}
    )
    assert partition_spec(model, ["a", "act", "b", "act", "c"]).sizes == {"a": 6, "b": 5}
