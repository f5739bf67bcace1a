"""Rules for ``torch.nn``: a subnet computes what the whole model does with the other units off."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gist import Layer, Rule, partition_spec, register_rule
from gist.errors import PartitionError
from gist.partition.rules.registry import rule_of
from gist.partition.samplers import DisjointUniform, Overlapping
from gist.partition.spec import Axis
from gist.verify import _perturb, subnet_difference, verify_identity


def chain(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_children()]


def largest_difference(model: nn.Module, x: Tensor, wiring: list[str] | None = None) -> float:
    torch.manual_seed(0)
    model = model.double()
    _perturb(model)
    spec = partition_spec(model, wiring or chain(model))
    worst = 0.0
    most = min(spec.sizes.values())
    for m, sampler in [(2, DisjointUniform()), (min(3, most), Overlapping(min_units=2))]:
        assignment = sampler(spec.sizes, m, seed=m, round=0)
        verify_identity(model, spec, assignment)
        for i in range(m):
            worst = max(worst, subnet_difference(model, spec, assignment, i, (x,)))
    return worst


def inputs(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def images() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 5, 3, bias=False),
        nn.Dropout2d(0.3),
        nn.Flatten(),
        nn.Linear(5 * 4, 7),
        nn.BatchNorm1d(7),
        nn.Linear(7, 3),
    )


STACKS = {
    "plain": lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Linear(6, 3)),
    "no bias": lambda: nn.Sequential(nn.Linear(5, 7, bias=False), nn.ReLU(), nn.Linear(7, 3)),
    "layer norm": lambda: nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3)),
    "layer norm, not affine": lambda: nn.Sequential(
        nn.Linear(5, 7), nn.LayerNorm(7, elementwise_affine=False), nn.Linear(7, 3)
    ),
    "layer norm without bias": lambda: nn.Sequential(
        nn.Linear(5, 7), nn.LayerNorm(7, bias=False), nn.Linear(7, 3)
    ),
    "batch norm": lambda: nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3)),
    "batch norm, not affine": lambda: nn.Sequential(
        nn.Linear(5, 7), nn.BatchNorm1d(7, affine=False), nn.Linear(7, 3)
    ),
    "batch norm, untracked": lambda: nn.Sequential(
        nn.Linear(5, 7), nn.BatchNorm1d(7, track_running_stats=False), nn.Linear(7, 3)
    ),
    "batch norm, then layer norm": lambda: nn.Sequential(
        nn.Linear(5, 7), nn.BatchNorm1d(7, affine=False), nn.LayerNorm(7), nn.Linear(7, 3)
    ),
    "norm of the input": lambda: nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 7), nn.Linear(7, 3)),
    "norm of the output": lambda: nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3), nn.LayerNorm(3)),
    "prelu": lambda: nn.Sequential(nn.Linear(5, 7), nn.PReLU(), nn.Linear(7, 3)),
    "prelu per feature": lambda: nn.Sequential(nn.Linear(5, 7), nn.PReLU(7), nn.Linear(7, 3)),
    "sigmoid": lambda: nn.Sequential(nn.Linear(5, 7), nn.Sigmoid(), nn.Linear(7, 3)),
    "sigmoid, then layer norm": lambda: nn.Sequential(
        nn.Linear(5, 7), nn.Sigmoid(), nn.LayerNorm(7), nn.Softplus(), nn.Linear(7, 3)
    ),
    "nested": lambda: nn.Sequential(
        nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 7), nn.LayerNorm(7)),
        nn.ReLU(),
        nn.Sequential(nn.Dropout(0.5), nn.Linear(7, 3)),
    ),
}


@pytest.mark.parametrize("make", STACKS.values(), ids=STACKS)
def test_stacks(make):
    assert largest_difference(make(), inputs(9, 5)) < 1e-12


def test_images():
    assert largest_difference(images(), inputs(4, 2, 8, 8)) < 1e-12


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("groups", ["one", "each alone"])
def test_group_norms(groups, affine):
    def norm(channels: int) -> nn.Module:
        return nn.GroupNorm(1 if groups == "one" else channels, channels, affine=affine)

    model = nn.Sequential(
        *(nn.Conv2d(2, 6, 3), norm(6), nn.ReLU(), nn.Conv2d(6, 5, 3), norm(5), nn.Sigmoid()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(20, 3)),
    )
    assert largest_difference(model, inputs(4, 2, 8, 8)) < 1e-12


def test_a_group_norm_of_what_stays_whole_may_have_any_groups():
    model = nn.Sequential(nn.GroupNorm(2, 4), nn.Conv2d(4, 6, 1), nn.ReLU(), nn.Conv2d(6, 2, 1))
    assert largest_difference(model, inputs(4, 4, 8, 8)) < 1e-12


def test_a_pooled_image_model_without_flattened_pixels():
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)
    )
    assert largest_difference(model, inputs(4, 2, 8, 8)) < 1e-12


@settings(max_examples=15)
@given(
    st.lists(st.integers(2, 6), min_size=1, max_size=3), st.sampled_from([None, "layer", "batch"])
)
def test_any_depth_and_width(widths, norm):
    layers: list[nn.Module] = []
    before = 4
    for width in widths:
        layers.append(nn.Linear(before, width))
        if norm is not None:
            layers.append(nn.LayerNorm(width) if norm == "layer" else nn.BatchNorm1d(width))
        layers.append(nn.ELU())
        before = width
    assert largest_difference(nn.Sequential(*layers, nn.Linear(before, 3)), inputs(5, 4)) < 1e-12


def test_layouts_are_the_expected_ones():
    spec = partition_spec(images(), chain(images()))
    assert spec.sizes == {"0": 6, "4": 5, "7": 7}
    dims = {
        name: [(s.dim, s.group, s.map.width) for s in layout.slots]
        for name, layout in spec.layouts.items()
    }
    assert dims["0.weight"] == [(0, "0", 1)]
    assert dims["1.running_var"] == [(0, "0", 1)]
    assert dims["1.num_batches_tracked"] == []
    assert dims["4.weight"] == [(0, "4", 1), (1, "0", 1)]
    assert dims["7.weight"] == [(0, "7", 1), (1, "4", 4)]
    assert dims["9.weight"] == [(1, "7", 1)]
    assert dims["9.bias"] == []


def test_embedding():
    model = nn.Sequential(nn.Embedding(11, 6, padding_idx=0), nn.LayerNorm(6), nn.Linear(6, 3))
    tokens = torch.randint(11, (7,), generator=torch.Generator().manual_seed(0))
    assert largest_difference(model, tokens) < 1e-12
    spec = partition_spec(model, chain(model))
    assert [(s.dim, s.group) for s in spec.layouts["0.weight"].slots] == [(1, "0")]


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (nn.Conv2d(6, 6, 3, groups=3), "groups=3"),
        (nn.Conv2d(5, 6, 3), "takes 5 input features, but the wiring brings 6"),
        (nn.BatchNorm2d(5), "takes 5 input features, but the wiring brings 6"),
        (nn.LayerNorm([6, 4, 4]), "only the last dim"),
        (nn.PReLU(4), "takes 4 input features"),
        (nn.Linear(7, 2), "takes 7 input features, but the wiring brings 6"),
        (nn.Softmax(dim=1), "no partition rule for layer type"),
        (nn.GroupNorm(2, 6), "normalises 2 groups of 6 channels; only one group"),
        (nn.GroupNorm(1, 5), "takes 5 input features, but the wiring brings 6"),
        (nn.Bilinear(6, 6, 6), "no partition rule for layer type"),
        (nn.utils.spectral_norm(nn.Linear(6, 6)), "1"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)), "no partition rule"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_refusals(layer, why):
    model = nn.Sequential(nn.Conv2d(2, 6, 3), layer, nn.Conv2d(6, 2, 1))
    with pytest.raises(PartitionError, match=why) as caught:
        partition_spec(model, ["0", "1", "2"])
    assert "1: " in str(caught.value) or "1." in str(caught.value), "names the layer"


def test_embeddings_that_rescale_rows_are_refused():
    model = nn.Sequential(nn.Embedding(9, 6, max_norm=1.0), nn.Linear(6, 3))
    with pytest.raises(PartitionError, match="max_norm"):
        partition_spec(model, ["0", "1"])


def test_lazy_layers_are_refused_by_name():
    model = nn.Sequential(nn.LazyLinear(6), nn.Linear(6, 3))
    with pytest.raises(PartitionError) as caught:
        partition_spec(model, ["0", "1"])
    text = str(caught.value)
    assert "0" in text
    assert "1.weight" not in text, "only the lazy layer is to blame"


def test_an_unknown_type_lists_the_known_ones_and_the_remedy():
    class Strange(nn.Module):
        """Has no rule."""

    with pytest.raises(PartitionError) as caught:
        rule_of(Strange())
    text = str(caught.value)
    for part in ("Strange", "Linear", "GCNConv", "BatchNorm1d", "register_rule"):
        assert part in text


def test_subclasses_of_known_types_are_not_meant():
    class Louder(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).roll(1, -1)

    with pytest.raises(PartitionError, match=r"no partition rule for layer type .*Louder"):
        rule_of(Louder(2, 2))


class Scale(nn.Module):
    """One factor per feature, registered below as a user would."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.rand(width))
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        assert x.size(-1) == self.width
        return x * self.factor


@register_rule(Scale)
class ScaleRule(Rule):
    def connect(self, layer: Layer) -> Axis | None:
        layer.follow("factor", (0, layer.expect_input(layer.module.width)))
        return layer.input

    def resize(self, module: nn.Module, input: int | None, output: int | None) -> None:
        if input is not None:
            module.width = input


def test_a_registered_rule_is_used():
    model = nn.Sequential(nn.Linear(5, 6), Scale(6), nn.Linear(6, 3))
    assert largest_difference(model, inputs(7, 5)) < 1e-12


def test_a_second_rule_for_a_type_is_refused_unless_it_replaces():
    with pytest.raises(PartitionError, match=r"Scale has a rule already.*ScaleRule.*replace=True"):

        @register_rule(Scale)
        class Again(Rule):
            pass

    assert isinstance(rule_of(Scale(1)), ScaleRule)

    @register_rule(Scale, replace=True)
    class Other(ScaleRule):
        pass

    assert isinstance(rule_of(Scale(1)), Other)
    register_rule(Scale, replace=True)(ScaleRule)


def test_a_refused_registration_registers_none_of_its_types():
    class New(nn.Module):
        """Has no rule."""

    with pytest.raises(PartitionError, match="has a rule already"):
        register_rule(New, nn.Linear)(ScaleRule)
    with pytest.raises(PartitionError, match="no partition rule"):
        rule_of(New())


def test_a_rule_that_declares_nothing_is_noticed():
    class Forgetful(Scale):
        pass

    @register_rule(Forgetful)
    class ForgetfulRule(Rule):
        def connect(self, layer: Layer) -> Axis | None:
            return layer.input

    model = nn.Sequential(nn.Linear(5, 6), Forgetful(6), nn.Linear(6, 3))
    with pytest.raises(PartitionError, match=r"1\.factor: no layer of the wiring declares it"):
        partition_spec(model, ["0", "1", "2"])
