"""Building a subnet: what it keeps, what it drops, and that the model stays as it is."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch_geometric.nn as pyg
from torch import Tensor, nn
from torch_geometric.nn.models import GAT, GCN, GIN, MLP, GraphSAGE

import gist.nn
from gist import SpecBuilder, partition_spec
from gist.errors import PartitionError
from gist.partition.assignment import Assignment
from gist.partition.samplers import DisjointUniform
from gist.partition.spec import PartitionSpec, model_tensors
from gist.partition.subnet import build_subnet
from gist.partition.transfer import extract

NODES = 12


def graph(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    edges = torch.randint(NODES, (2, 40), generator=generator)
    return torch.randn(NODES, 6, generator=generator), torch.cat([edges, edges.flip(0)], dim=1)


def deal(spec: PartitionSpec, m: int = 2) -> Assignment:
    return DisjointUniform()(spec.sizes, m, seed=0, round=0)


MODELS = {
    "GCN": lambda: GCN(6, 8, 3, 4, norm="batch_norm"),
    "SAGE": lambda: GraphSAGE(6, 8, 3, 4, jk="cat"),
    "GIN": lambda: GIN(6, 8, 3, 4, norm="layer_norm"),
    "GAT": lambda: GAT(6, 8, 3, 4, heads=2, v2=True, norm="batch_norm"),
    "gist GCN": lambda: gist.nn.GCN(6, 8, 4, 3),
    "gist SAGE": lambda: gist.nn.GraphSAGE(6, 8, 4, 3, concat=True, norm="batch"),
    "gist GAT": lambda: gist.nn.GAT(6, 8, 4, 3, heads=4, units="heads"),
}
each = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def fingerprint(model: nn.Module) -> list[object]:
    """Everything about a model that a build could change."""
    return [
        {
            n: (t.clone(), t.requires_grad, id(t), t._version)
            for n, t in model_tensors(model).items()
        },
        {n: m.training for n, m in model.named_modules()},
        {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()},
        repr(model),
    ]


def unchanged(model: nn.Module, before: list[object]) -> None:
    tensors, *rest = fingerprint(model)
    assert rest == before[1:]
    for name, (value, *flags) in tensors.items():
        assert torch.equal(value, before[0][name][0])
        assert flags == list(before[0][name][1:])


@each
def test_the_model_is_left_as_it_is(make):
    model = make()
    model.eval()
    model.convs[0].train()
    spec = partition_spec(model)
    before, state = fingerprint(model), torch.get_rng_state()
    subnet = build_subnet(model, spec, deal(spec), 1, width_correction=True)
    subnet.train()(*graph()).sum().backward()
    unchanged(model, before)
    assert all(p.grad is None for p in model.parameters())
    torch.set_rng_state(state)
    build_subnet(model, spec, deal(spec), 0)
    assert torch.equal(torch.get_rng_state(), state), "building draws no random numbers"


@each
def test_a_subnet_holds_what_extract_gives_and_shares_no_storage(make):
    model = make()
    spec = partition_spec(model)
    assignment = deal(spec, 3)
    ours = {t.untyped_storage().data_ptr() for t in model_tensors(model).values()}
    for i in range(3):
        subnet = build_subnet(model, spec, assignment, i)
        parts = extract(model_tensors(model), spec, assignment, i)
        tensors = model_tensors(subnet)
        assert list(tensors) == list(model_tensors(model))
        for name, tensor in tensors.items():
            assert torch.equal(tensor, parts[name]), name
            assert tensor.untyped_storage().data_ptr() not in ours, name


@each
def test_an_undivided_subnet_is_the_model(make):
    model = make().eval()
    spec = partition_spec(model)
    subnet = build_subnet(model, spec, deal(spec, 1), 0, width_correction=True)
    assert repr(subnet) == repr(model)
    assert torch.equal(subnet(*graph()), model(*graph()))


@each
def test_modes_are_kept(make):
    model = make().eval()
    model.convs[1].train()
    spec = partition_spec(model)
    subnet = build_subnet(model, spec, deal(spec), 0)
    modes = {n: m.training for n, m in model.named_modules()}
    assert {n: m.training for n, m in subnet.named_modules()} == modes


@each
def test_frozen_parameters_stay_frozen(make):
    model = make()
    for flag, parameter in zip(itertools.cycle([True, False]), model.parameters()):
        parameter.requires_grad_(flag)
    spec = partition_spec(model)
    subnet = build_subnet(model, spec, deal(spec), 0)
    wanted = {n: p.requires_grad for n, p in model.named_parameters()}
    assert {n: p.requires_grad for n, p in subnet.named_parameters()} == wanted
    assert all(isinstance(p, nn.Parameter) for p in subnet.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_is_kept(dtype):
    model = GCN(6, 8, 2, 4, norm="batch_norm").to(dtype)
    spec = partition_spec(model)
    subnet = build_subnet(model, spec, deal(spec), 0)
    kinds = {n: t.dtype for n, t in model_tensors(model).items()}
    assert {n: t.dtype for n, t in model_tensors(subnet).items()} == kinds


def test_device_is_kept():
    model = GCN(6, 8, 2, 4).to("meta")
    spec = partition_spec(model)
    subnet = build_subnet(model, spec, deal(spec), 0)
    assert {t.device.type for t in subnet.parameters()} == {"meta"}


class Tied(nn.Module):
    """Embeds tokens and scores them with the same table."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 8)
        self.head = nn.Linear(8, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(x)))


def test_tied_weights_stay_tied():
    model = Tied()
    spec = partition_spec(model, ["embed", "head"])
    assert len(spec.layouts) == 1
    subnet = build_subnet(model, spec, deal(spec), 0)
    assert subnet.head.weight is subnet.embed.weight
    assert subnet.head.weight.shape == (5, 4)
    assert len(list(subnet.parameters())) == 1


def test_layers_tied_to_different_units_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with pytest.raises(PartitionError, match=r"1\.weight: tied to 0\.weight"):
        partition_spec(model, ["0", "1", "2"])


@pytest.mark.parametrize("layers", [2, 3])
def test_caches_are_not_copied(layers):
    model = GCN(6, 8, layers, 4, cached=True)
    x, edges = graph()
    model(x, edges)
    assert model.convs[0]._cached_edge_index is not None
    spec = partition_spec(model)
    subnet = build_subnet(model, spec, deal(spec), 0)
    assert all(conv._cached_edge_index is None for conv in subnet.convs)
    assert all(conv._cached_edge_index is not None for conv in model.convs)
    other = graph(1)[1]
    fresh = copy.deepcopy(subnet)
    for conv in fresh.convs:
        conv.cached = False
    assert torch.equal(subnet.eval()(x, other), fresh.eval()(x, other))


def test_gradients_are_not_copied():
    model = GCN(6, 8, 2, 4)
    model(*graph()).sum().backward()
    spec = partition_spec(model)
    subnet = build_subnet(model, spec, deal(spec), 0)
    assert all(p.grad is None for p in subnet.parameters())
    assert all(p.grad is not None for p in model.parameters())


def test_users_hooks_are_kept():
    model = GCN(6, 8, 2, 4)
    seen = []
    model.convs[0].lin.register_forward_hook(
        lambda module, args, out: seen.append(tuple(out.shape))
    )
    spec = partition_spec(model)
    build_subnet(model, spec, deal(spec), 0)(*graph())
    assert seen == [(NODES, 4)]


class Blocks(nn.Module):
    """Residual blocks over a graph; a block is a unit."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 5)
        self.blocks = nn.ModuleList(pyg.SAGEConv(5, 5) for _ in range(depth))
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, edge_index)
        return self.head(x)

    def declare_wiring(self, builder: SpecBuilder) -> None:
        builder.layer("embed", None)
        for unit in range(len(self.blocks)):
            builder.block(f"blocks.{unit}", "depth", unit, size=len(self.blocks))
        builder.layer("head", None)


def test_absent_blocks_become_the_identity():
    model = Blocks()
    spec = partition_spec(model)
    assignment = deal(spec)
    for i in range(2):
        subnet = build_subnet(model, spec, assignment, i)
        held = assignment.held["depth"][i].tolist()
        for unit, block in enumerate(subnet.blocks):
            assert isinstance(block, pyg.SAGEConv if unit in held else nn.Identity)
        names = {n.split(".")[1] for n in model_tensors(subnet) if n.startswith("blocks.")}
        assert names == {str(unit) for unit in held}


def test_absent_blocks_of_several_arguments_hand_on_the_first():
    model = Blocks().eval()
    spec = partition_spec(model)
    assignment = deal(spec)
    x, edges = graph()
    expected = model.embed(x)
    for unit in assignment.held["depth"][0].tolist():
        expected = model.blocks[unit](expected, edges)
    subnet = build_subnet(model, spec, assignment, 0)
    assert torch.equal(subnet(x, edges), model.head(expected))


@pytest.mark.parametrize(
    ("layer", "narrowed"),
    [
        (nn.Identity(), "Linear(in_features=6, out_features=4, bias=True)"),
        (nn.BatchNorm1d(8), "BatchNorm1d(4, "),
        (nn.LayerNorm(8), "LayerNorm((4,), "),
        (nn.GroupNorm(1, 8), "GroupNorm(1, 4, "),
        (nn.GroupNorm(8, 8), "GroupNorm(4, 4, "),
        (nn.PReLU(8), "PReLU(num_parameters=4)"),
        (pyg.LayerNorm(8), "LayerNorm(4, "),
        (pyg.BatchNorm(8), "BatchNorm(4"),
    ],
)
def test_printed_sizes_are_the_narrowed_ones(layer, narrowed):
    model = nn.Sequential(nn.Linear(6, 8), layer, nn.Linear(8, 3))
    spec = partition_spec(model, ["0", "1", "2"])
    subnet = build_subnet(model, spec, deal(spec), 0)
    assert narrowed in repr(subnet)
    assert "Linear(in_features=4, out_features=3, bias=True)" in repr(subnet)


@pytest.mark.parametrize(
    ("make", "narrowed", "whole"),
    [
        (lambda: pyg.GCNConv(8, 8), "GCNConv(4, 4)", "GCNConv(8, 8)"),
        (lambda: pyg.SAGEConv(8, 8), "SAGEConv(4, 4, aggr=mean)", "SAGEConv(8, 8, aggr=mean)"),
        (lambda: gist.nn.SAGEConcatConv(8, 8), "SAGEConcatConv(4, 4)", "SAGEConcatConv(8, 8)"),
        (lambda: pyg.GATConv(8, 4, heads=2), "GATConv(4, 2, heads=2)", "GATConv(8, 4, heads=2)"),
        (
            lambda: pyg.GATv2Conv(8, 4, heads=2),
            "GATv2Conv(4, 2, heads=2)",
            "GATv2Conv(8, 4, heads=2)",
        ),
        (
            lambda: pyg.GINConv(MLP([8, 8, 8], norm=None)),
            "GINConv(nn=MLP(4, 4, 4))",
            "GINConv(nn=MLP(8, 8, 8))",
        ),
    ],
    ids=["GCNConv", "SAGEConv", "SAGEConcatConv", "GATConv", "GATv2Conv", "GINConv"],
)
def test_printed_sizes_of_convolutions(make, narrowed, whole):
    model = nn.ModuleList([nn.Linear(6, 8), make(), nn.Linear(8, 3)])
    assert whole in repr(model).replace("(\n    8, 8\n", "(8, 8)")
    spec = partition_spec(model, ["0", "1", "2"])
    subnet = build_subnet(model, spec, deal(spec), 0)
    assert narrowed in repr(subnet).replace("(\n    4, 4\n", "(4, 4)")


@pytest.mark.parametrize(
    "make",
    [
        lambda: pyg.GCNConv(8, 8),
        lambda: pyg.SAGEConv(8, 8, project=True),
        lambda: gist.nn.SAGEConv(8, 8),
        lambda: gist.nn.SAGEConcatConv(8, 8),
        lambda: pyg.GATConv(8, 4, heads=2, residual=True),
        lambda: pyg.GATv2Conv(8, 4, heads=2, edge_dim=3),
        lambda: pyg.GINConv(MLP([8, 8, 8], norm="batch_norm")),
    ],
    ids=["GCN", "SAGE", "gist SAGE", "SAGEConcat", "GAT", "GATv2", "GIN"],
)
def test_every_linear_of_a_subnet_knows_its_size(make):
    model = nn.ModuleList([nn.Linear(6, 8), make(), nn.Linear(8, 3)])
    spec = partition_spec(model, ["0", "1", "2"])
    subnet = build_subnet(model, spec, deal(spec), 0)
    for name, module in subnet.named_modules():
        if isinstance(module, pyg.Linear):
            assert (module.out_channels, module.in_channels) == module.weight.shape, name
        if isinstance(module, nn.Linear):
            assert (module.out_features, module.in_features) == module.weight.shape, name


def test_subnets_train_and_leave_a_state_dict():
    model = GraphSAGE(6, 9, 3, 4, norm="batch_norm")
    spec = partition_spec(model)
    subnet = build_subnet(model, spec, deal(spec, 2), 0)
    optimizer = torch.optim.Adam(subnet.parameters())
    before = {n: t.clone() for n, t in subnet.state_dict().items()}
    subnet(*graph()).square().sum().backward()
    optimizer.step()
    after = subnet.state_dict()
    assert after.keys() == before.keys() == model.state_dict().keys()
    assert not torch.equal(after["convs.1.lin_l.weight"], before["convs.1.lin_l.weight"])
    assert copy.deepcopy(subnet).state_dict().keys() == before.keys()
