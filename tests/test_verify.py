"""The checks that users can call: what they accept, what they refuse, and what they say."""

from __future__ import annotations

import pytest
import torch
import torch_geometric.nn as pyg
from torch import Tensor, nn
from torch_geometric.nn.models import GCN

from gist import partition_spec
from gist.errors import PartitionError
from gist.partition.samplers import DisjointUniform
from gist.partition.spec import model_tensors
from gist.verify import masked_model, subnet_difference, verify_identity, verify_wiring


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
    monkeypatch.setattr("gist.verify._LARGE_MODEL_ENTRIES", 100)
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
