import pytest
import torch
import torch_geometric.nn.models as zoo
from torch import nn

import gist.nn
from gist.errors import ConfigError
from gist.execution.initialise import has_no_memory, initialise, place_model
from gist.partition.spec import model_tensors

MODELS = {
    **{
        f"{name}-{norm}": lambda kind=kind, norm=norm, more=more: kind(
            5, 8, 3, 3, norm=norm, **more
        )
        for name, kind, more in [
            ("gcn", gist.nn.GCN, {}),
            ("sage", gist.nn.GraphSAGE, {}),
            ("sage-concat", gist.nn.GraphSAGE, {"concat": True}),
            ("gat", gist.nn.GAT, {"heads": 2}),
            ("gatv2", gist.nn.GAT, {"heads": 2, "v2": True}),
            ("jk", gist.nn.GCN, {"jk": "cat"}),
        ]
        for norm in ("layer", "batch", None, "layer_norm", "graph_norm")
    },
    **{
        f"pyg-{kind.__name__}": lambda kind=kind: kind(5, 8, 3, 3, norm="batch_norm", act="prelu")
        for kind in (zoo.GCN, zoo.GraphSAGE, zoo.GAT, zoo.GIN)
    },
    "sequential": lambda: nn.Sequential(
        nn.Linear(5, 4), nn.PReLU(), nn.BatchNorm1d(4), nn.Linear(4, 3)
    ),
}


def without_memory(make):
    with torch.device("meta"):
        return make()


def in_memory(model, value: float = 7.0):
    tensors = {n: torch.full_like(t, value, device="cpu") for n, t in model_tensors(model).items()}
    place_model(model, tensors)
    return tensors


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_every_tensor_is_drawn_as_the_constructor_would(make):
    torch.manual_seed(0)
    model, built = without_memory(make), make()
    assert has_no_memory(model)
    assert not has_no_memory(built)
    tensors = in_memory(model)
    initialise(model, seed=3)
    for name, tensor in model_tensors(built).items():
        got, tensor = tensors[name], tensor.detach()
        if not tensor.is_floating_point() or tensor.unique().numel() == 1:
            assert torch.equal(got, tensor), name
        else:  # another draw of the same distribution
            assert not torch.equal(got, tensor), name
            assert got.abs().max() < 3 * tensor.abs().max(), name


def test_a_draw_depends_on_the_seed_alone_and_leaves_the_random_state():
    draws = []
    for seed in (1, 1, 2):
        model = without_memory(MODELS["gat-batch"])
        tensors = in_memory(model)
        before = torch.get_rng_state()
        initialise(model, seed)
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(5)
        draws.append(torch.cat([t.double().flatten() for t in tensors.values()]))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("meta", [True, False])
def test_parameters_keep_identity_ties_and_requires_grad(meta):
    with torch.device("meta" if meta else "cpu"):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[1].weight = model[0].weight
    model[1].bias.requires_grad_(False)
    before = model_tensors(model)
    tensors = in_memory(model)
    after = model_tensors(model)
    assert all(after[name] is tensor for name, tensor in before.items())
    assert model[1].weight is model[0].weight
    assert "1.weight" not in tensors
    assert [p.requires_grad for p in model.parameters()] == [True, True, False, True, True]
    assert all(after[name].data_ptr() == tensor.data_ptr() for name, tensor in tensors.items())
    assert isinstance(model[0].weight, nn.Parameter)
    assert not isinstance(model[2].running_mean, nn.Parameter)
    model(torch.ones(2, 4)).sum().backward()
    assert model[0].weight.grad is not None


class Half(nn.Module):
    """Resets its weight and forgets its shift."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.shift = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))

    def reset_parameters(self) -> None:
        self.weight.data[:1].fill_(1)


def test_what_no_module_resets_is_refused_by_name():
    model = without_memory(lambda: nn.Sequential(nn.Linear(2, 2), Half()))
    in_memory(model)
    with pytest.raises(ConfigError, match=r"got: 1\.shift;.*reset_parameters|got: 1\.shift"):
        initialise(model, seed=0)


def test_half_a_model_is_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].to("meta")
    with pytest.raises(ConfigError, match=r"in memory: 1\.weight, 1\.bias"):
        has_no_memory(model)
