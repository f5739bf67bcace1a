"""The checks that users can call: what they accept, what they refuse, and what they say."""

from __future__ import annotations

import re

import pytest
import torch
import torch_geometric.nn as pyg
from torch import Tensor, nn
from torch_geometric.nn.models import GCN

import gist.nn
from gist import partition_spec
from gist.errors import PartitionError
from gist.partition.grouped.grouping import NotGroupableError
from gist.partition.samplers import DisjointUniform
from gist.partition.spec import model_tensors
from gist.verify import (
    masked_model,
    subnet_difference,
    verify_grouping,
    verify_identity,
    verify_wiring,
)


def sample(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 5, generator=generator).to(dtype)
    return x, torch.randint(12, (2, 40), generator=generator)


class Net(nn.Module):
    """conv1 -> norm -> conv2 -> conv3, with something done to the features in between."""

    def __init__(self, between=lambda h: h.relu(), width: int = 8) -> None:
        super().__init__()
        self.conv1, self.norm1 = pyg.GCNConv(5, width), nn.LayerNorm(width)
        self.conv2 = pyg.SAGEConv(width, width)
        self.conv3 = pyg.GCNConv(width, 3)
        self.between = between

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        x = self.between(self.norm1(self.conv1(x, edges)))
        return self.conv3(self.between(self.conv2(x, edges)), edges)


CHAIN = ["conv1", "norm1", "conv2", "conv3"]


class Residual(Net):
    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x, edges)).relu()
        return self.conv3(x + self.conv2(x, edges).relu(), edges)


TOGETHER = {"h": {"out": ["conv1", "conv2"], "through": ["norm1"], "in": ["conv2", "conv3"]}}
APART = {
    "a": {"out": ["conv1"], "through": ["norm1"], "in": ["conv2"]},
    "b": {"out": ["conv2"], "in": ["conv3"]},
}


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.float64, 1e-11)])
@pytest.mark.parametrize(
    ("model", "wiring"),
    [(Net(), CHAIN), (Net(), APART), (Residual(), TOGETHER), (Net(), TOGETHER)],
    ids=["chain", "groups", "residual", "plain net in one group"],
)
def test_right_wirings_are_accepted(model, wiring, dtype, bound):
    assert verify_wiring(model.to(dtype), sample(dtype), wiring=wiring) < bound


def refused(model: nn.Module, wiring, *args: Tensor) -> str:
    with pytest.raises(PartitionError) as caught:
        verify_wiring(model.double(), args or sample(torch.float64), wiring=wiring)
    return str(caught.value)


def test_a_residual_connection_between_separate_groups_is_refused():
    text = refused(Residual(), APART)
    assert "Residual" in text
    assert "wiring" in text


def test_a_residual_connection_as_a_chain_is_refused():
    refused(Residual(), CHAIN)


@pytest.mark.parametrize(
    "between",
    [
        lambda h: h.flip(-1),
        lambda h: h.roll(1, -1),
        lambda h: h[:, torch.tensor([1, 0, 3, 2, 5, 4, 7, 6])],
        lambda h: h.softmax(-1),
        lambda h: h - h.mean(-1, keepdim=True),
        lambda h: h.view(-1, 2, h.size(1) // 2).transpose(1, 2).reshape(len(h), -1),
        lambda h: h * torch.arange(h.size(1)),
        lambda h: torch.cat([h[:, ::2], h[:, 1::2]], dim=1),
    ],
    ids=["flip", "roll", "permute", "softmax", "centre", "transpose", "position", "evens"],
)
def test_models_that_mix_or_move_features_are_refused(between):
    text = refused(Net(between), CHAIN)
    assert "wir" in text
    assert "got: " in text


def test_the_error_says_by_how_much_and_which_group():
    class Half(Net):
        def forward(self, x: Tensor, edges: Tensor) -> Tensor:
            x = self.norm1(self.conv1(x, edges)).relu()
            return self.conv3(self.conv2(x, edges).flip(-1), edges)

    text = refused(Half(), CHAIN)
    assert "relative difference" in text
    assert "group 'conv2' differs" in text
    assert "'conv1'" not in text


def test_layers_in_the_wrong_order_are_refused():
    refused(Net(), ["conv2", "norm1", "conv1", "conv3"])
    square = Net()
    square.conv1 = pyg.GCNConv(8, 8)
    x, edges = sample(torch.float64)
    wide = torch.cat([x, x[:, :3]], dim=1)
    refused(square, ["conv2", "norm1", "conv1", "conv3"], wide, edges)


@pytest.mark.parametrize("missing", CHAIN)
def test_a_missing_layer_is_named(missing):
    text = refused(Net(), [name for name in CHAIN if name != missing])
    assert missing in text


def test_a_partitioned_output_is_refused():
    wiring = {**APART, "out": {"out": ["conv3"]}}
    text = refused(Net(), wiring)
    assert "output of the last layer whole" in text


def test_hand_made_concatenations_are_not_mistaken_for_flattening():
    class Concat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(5, 8), nn.Linear(16, 3)

        def forward(self, x: Tensor, edges: Tensor) -> Tensor:
            h = self.one(x).relu()
            return self.two(torch.cat([h, h.square()], dim=-1))

    refused(Concat(), ["one", "two"])


def test_zero_parameters_hide_nothing():
    model = Residual().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    refused(model, APART)


def test_nan_is_a_difference():
    refused(Net(lambda h: h * float("nan")), CHAIN)


def test_the_model_and_the_random_state_are_left_as_they_are():
    model = Net().train()
    model.conv2.eval()
    torch.manual_seed(3)
    before = {n: t.clone() for n, t in model_tensors(model).items()}
    modes = {n: m.training for n, m in model.named_modules()}
    state = torch.get_rng_state()
    verify_wiring(model, sample(), wiring=CHAIN)
    assert torch.equal(torch.get_rng_state(), state)
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert all(torch.equal(t, before[n]) for n, t in model_tensors(model).items())


def test_a_model_that_ran_before_with_a_cache_is_fine():
    model = GCN(5, 8, 2, 3, cached=True)
    generator = torch.Generator().manual_seed(1)
    model(torch.randn(30, 5), torch.randint(30, (2, 90), generator=generator))
    assert verify_wiring(model, sample()) < 1e-4
    assert model.convs[0]._cached_edge_index[0].max() >= 12, "the cache is the caller's"


def test_a_model_without_units_is_fine():
    assert verify_wiring(GCN(5, 8, 1, 3), sample()) < 1e-6


def test_large_models_are_verified_on_a_narrow_copy(monkeypatch):
    monkeypatch.setattr("gist.verify.LARGE_MODEL_ENTRIES", 100)
    assert verify_wiring(Net(width=64), sample(), wiring=CHAIN) < 1e-4
    with pytest.raises(PartitionError):
        verify_wiring(Residual(width=64), sample(), wiring=APART)


def test_masked_model_is_zero_where_the_subnet_holds_nothing():
    model = Net()
    spec = partition_spec(model, CHAIN)
    assignment = DisjointUniform()(spec.sizes, 2, seed=0, round=0)
    masked = masked_model(model, spec, assignment, 0)
    rows, columns = assignment.held["conv2"][0], assignment.held["conv1"][0]
    held = torch.zeros(8, 8, dtype=torch.bool)
    held[rows[:, None], columns] = True
    weight = masked.conv2.lin_l.weight
    assert torch.equal(weight[held], model.conv2.lin_l.weight[held])
    assert not weight[~held].any()
    assert model.conv2.lin_l.weight.all(), "the model itself is not masked"


def test_subnet_difference_notices_a_single_wrong_entry(monkeypatch):
    torch.manual_seed(0)  # with other weights, the unit behind that entry may be off everywhere
    model = Net().double()
    spec = partition_spec(model, CHAIN)
    assignment = DisjointUniform()(spec.sizes, 2, seed=0, round=0)
    assert subnet_difference(model, spec, assignment, 0, sample(torch.float64)) < 1e-12
    from gist import verify

    def off_by_one(*args, **kwargs):
        subnet = verify_build(*args, **kwargs)
        with torch.no_grad():
            subnet.conv3.lin.weight[0, 0] += 1e-6
        return subnet

    verify_build = verify.build_subnet
    monkeypatch.setattr(verify, "build_subnet", off_by_one)
    assert subnet_difference(model, spec, assignment, 0, sample(torch.float64)) > 1e-9


def test_verify_identity_names_what_changed(monkeypatch):
    model = Net()
    spec = partition_spec(model, CHAIN)
    assignment = DisjointUniform()(spec.sizes, 2, seed=0, round=0)
    verify_identity(model, spec, assignment)

    def forgetful(tensors, *args):
        tensors["conv2.lin_l.weight"].zero_()

    monkeypatch.setattr("gist.verify.merge", forgetful)
    with pytest.raises(PartitionError, match=r"conv2\.lin_l\.weight"):
        verify_identity(model, spec, assignment)


def given(dtype: torch.dtype = torch.float32):
    return lambda model: (sample(dtype), {})


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.float64, 1e-11)])
@pytest.mark.parametrize(
    ("model", "wiring"),
    [
        (Net(), CHAIN),
        (Residual(), TOGETHER),
        (GCN(5, 8, 3, 3, jk="cat", norm="batch_norm"), None),
        (pyg.GAT(5, 24, 2, 3, heads=2, v2=True, dropout=0.5), None),
        (pyg.GIN(5, 1, 2, 3, train_eps=True), None),
        (gist.nn.GraphSAGE(5, 300, 3, concat=True), None),
    ],
    ids=["chain", "residual", "jumping, batch norm", "attention, dropout", "one unit", "wide"],
)
def test_models_that_keep_subnets_apart_are_accepted(model, wiring, dtype, bound):
    assert verify_grouping(model.to(dtype), given(dtype), wiring=wiring) < bound


def not_groupable(model: nn.Module, **kwargs) -> str:
    with pytest.raises(NotGroupableError) as caught:
        verify_grouping(model.double(), given(torch.float64), **{"wiring": CHAIN, **kwargs})
    assert "serial" in str(caught.value)
    return str(caught.value)


def failing(h: Tensor) -> Tensor:
    if h.dim() != 2:
        raise AssertionError  # without a message
    return h


@pytest.mark.parametrize(
    ("between", "message"),
    [
        (lambda h: h.view(len(h), -1), r"cannot run on features \[n, m, k\]"),
        (lambda h: h.t().t(), r"Net cannot run|does not compute side by side"),
        (failing, "cannot run.*got: AssertionError"),
        (lambda h: h / (1 + h.square().sum(1, keepdim=True)), "does not compute side by side"),
        (lambda h: nn.functional.normalize(h), "Net does not compute side by side.*difference"),
        (lambda h: h.detach() * float("inf") * 0 if h.dim() == 3 else h, "difference nan"),
    ],
    ids=["flattened", "transposed", "asserted", "scaled", "normalised", "nan"],
)
def test_models_that_see_subnets_as_one_are_refused(between, message):
    assert verify_wiring(Net(between).double(), sample(torch.float64), wiring=CHAIN) < 1e-9
    text = not_groupable(Net(between))
    assert re.search(message, text), text


def test_an_output_of_another_shape_is_refused():
    class Summed(Net):
        def forward(self, x: Tensor, edges: Tensor) -> Tensor:
            out = super().forward(x, edges)
            return out if out.dim() == 2 else out.sum(1)

    text = not_groupable(Summed())
    assert re.search(r"shape \(12, 3\).*expected: \(12, 2, 3\)", text), text


def test_training_is_compared_too_where_nothing_is_random():
    class InTraining(Net):
        def forward(self, x: Tensor, edges: Tensor) -> Tensor:
            out = super().forward(x, edges)
            return out.log_softmax(1) if self.training else out

    assert "does not compute side by side" in not_groupable(InTraining())


def test_a_grouped_model_that_cannot_be_trained_is_refused():
    class Overwritten(Net):
        def forward(self, x: Tensor, edges: Tensor) -> Tensor:
            out = super().forward(x, edges).exp()
            return out.mul_(2) if out.dim() == 3 else out.mul(2)  # exp needs what it put out

    assert "cannot run" in not_groupable(Overwritten())


def test_samples_may_be_drawn_at_random():
    def drawn(model: nn.Module):
        return (torch.randn(12, 5), sample()[1]), {}

    assert verify_grouping(Net(), drawn, wiring=CHAIN) < 1e-4


def mean_of_squares(model: nn.Module) -> Tensor:
    scores = model(*sample())
    return scores.square().mean((0, 2)) if scores.dim() == 3 else scores.square().mean()


def test_a_loss_for_each_subnet_is_accepted():
    assert verify_grouping(Net(), given(), loss=mean_of_squares, wiring=CHAIN) < 1e-4
    batch_norm = GCN(5, 8, 3, 3, norm="batch_norm", cached=True)
    assert verify_grouping(batch_norm, given(), loss=mean_of_squares) < 1e-4


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda model: model(*sample()).square().mean(), "is not one for each"),
        (lambda model: model(*sample()).square().sum((0, -1)) / len(model(*sample())[0]),
         "is not one for each.*relative difference"),
        (lambda model: nn.functional.cross_entropy(model(*sample()), torch.zeros(12).long()),
         "is not made for scores"),
    ],
    ids=["one for all", "wrong scale", "an error"],
)  # fmt: skip
def test_a_loss_that_is_not_one_for_each_subnet_is_refused(loss, message):
    with pytest.raises(NotGroupableError, match=message):
        verify_grouping(Net(), given(), loss=loss, wiring=CHAIN)


def test_grouping_is_verified_on_a_copy():
    model = GCN(5, 8, 3, 3, norm="batch_norm", dropout=0.5, cached=True)
    model(torch.randn(30, 5), torch.randint(30, (2, 90)))
    model.convs[1].eval()
    before = {n: t.clone() for n, t in model_tensors(model).items()}
    modes = {n: m.training for n, m in model.named_modules()}
    state, kept = torch.get_rng_state(), model.convs[0]._cached_edge_index
    verify_grouping(model, given(), loss=mean_of_squares)
    assert torch.equal(torch.get_rng_state(), state)
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert all(torch.equal(t, before[n]) for n, t in model_tensors(model).items())
    assert all(p.grad is None for p in model.parameters())
    assert model.convs[0]._cached_edge_index is kept


def test_grouping_is_verified_on_few_units(monkeypatch):
    """Whatever the width: what is computed costs next to nothing."""
    widths = []
    forward = nn.Linear.forward
    monkeypatch.setattr(
        nn.Linear,
        "forward",
        lambda self, x: (widths.append(self.weight.shape), forward(self, x))[1],
    )
    model = nn.Sequential(nn.Linear(5, 4096), nn.ReLU(), nn.Linear(4096, 3))
    assert verify_grouping(model, lambda model: ((sample()[0],), {}), wiring=["0", "2"]) < 1e-4
    assert widths
    assert max(max(shape) for shape in widths) <= 8
