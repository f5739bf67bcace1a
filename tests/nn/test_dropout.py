"""Dropout: exact in expectation, the same bits whoever draws them, one byte per element kept."""

from __future__ import annotations

import copy
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import gist
from gist.graph.rowwise import is_row_wise
from gist.nn import GAT, GCN, Dropout, GraphSAGE, dropout
from gist.nn.dropout import GroupedDropout
from gist.partition.streams import seeded, seeded_each

PROBABILITIES = [0.5, 0.25, 0.1, 0.3, 0.9, 1e-7, 1 - 1e-7]


def kept(x: torch.Tensor) -> torch.Tensor:
    return x != 0


def drop_ones(*shape: int, p: float = 0.5, seed: int = 0, **given) -> torch.Tensor:
    torch.manual_seed(seed)
    return dropout.dropout(torch.ones(shape, **given), p)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of a few elements, so that small tensors take several."""
    monkeypatch.setattr(dropout, "_BLOCK", 64)
    monkeypatch.setattr(dropout, "_GRAIN", 1)


# What is drawn


@pytest.mark.parametrize("p", PROBABILITIES)
def test_kept_elements_are_scaled_so_that_the_expectation_is_the_input(p):
    threshold, bits = dropout._threshold(1 - p)
    assert 0 < threshold < 2**bits
    assert abs(threshold / 2**bits - (1 - p)) <= (0 if (p * 256).is_integer() else 2**-16)
    out = drop_ones(64, 64, p=p, dtype=torch.float64)
    assert set(out.unique().tolist()) <= {0.0, 2**bits / threshold}
    mean = Fraction(threshold, 2**bits) * Fraction(2**bits, threshold)
    assert mean == 1


@pytest.mark.parametrize("p", [0.5, 0.25, 0.1, 0.3, 0.9])
def test_elements_are_kept_with_the_right_probability_wherever_they_lie_in_a_word(p):
    n = 1 << 20
    found = kept(drop_ones(n, p=p)).view(-1, 16).double()
    threshold, bits = dropout._threshold(1 - p)
    keep = threshold / 2**bits
    deviation = (keep * (1 - keep)) ** 0.5
    assert (found.mean(0) - keep).abs().max() < 6 * deviation / (n / 16) ** 0.5


@pytest.mark.parametrize("p", [0.5, 0.3])
@pytest.mark.parametrize("lag", [1, 2, 4, 8, 64])
def test_elements_are_kept_independently(p, lag):
    found = kept(drop_ones(1 << 20, p=p)).double()
    found -= found.mean()
    correlation = (found[lag:] * found[:-lag]).mean() / found.var()
    assert abs(float(correlation)) < 6 / found.numel() ** 0.5


def test_the_mask_is_bytes_of_the_default_generator_below_a_threshold():
    out = kept(drop_ones(5, 7, p=0.25, seed=3))
    torch.manual_seed(3)
    words = torch.empty(5, dtype=torch.int64).random_(-(2**63), None)  # 35 bytes in whole words
    assert torch.equal(out.view(-1), words.view(torch.uint8)[:35] < 192)
    assert torch.equal(torch.rand(3), _after(5, seed=3)), "and no more is drawn than that"


def _after(words: int, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    torch.empty(words, dtype=torch.int64).random_(-(2**63), None)
    return torch.rand(3)


@given(
    shape=st.lists(st.integers(0, 9), min_size=0, max_size=4),
    p=st.sampled_from([0.5, 0.3]),
)
def test_blocks_of_any_size_draw_the_same(shape, p):
    whole = drop_ones(*shape, p=p)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dropout, "_BLOCK", 8)
        patch.setattr(dropout, "_GRAIN", 1)
        assert torch.equal(drop_ones(*shape, p=p), whole)


def test_threads_dtypes_and_strides_do_not_change_the_mask(small_blocks):
    mask = kept(drop_ones(40, 30, p=0.3))
    torch.set_num_threads(2)
    try:
        assert torch.equal(kept(drop_ones(40, 30, p=0.3)), mask)
    finally:
        torch.set_num_threads(1)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert torch.equal(kept(drop_ones(40, 30, p=0.3, dtype=dtype)), mask)
    torch.manual_seed(0)
    assert torch.equal(kept(dropout.dropout(torch.ones(30, 40).t(), 0.3)), mask)
    torch.manual_seed(0)
    assert torch.equal(kept(dropout.dropout(torch.ones(40, 1).expand(40, 30), 0.3)), mask)


def test_a_stream_gives_the_same_mask_whatever_was_drawn_before():
    def draw():
        with seeded("train", 0, 3, 1):
            return dropout.dropout(torch.ones(100), 0.5)

    first = draw()
    torch.rand(10)
    assert torch.equal(draw(), first)


# Stacked subnets


@given(
    n=st.integers(0, 40),
    m=st.integers(1, 4),
    k=st.integers(0, 11),
    p=st.sampled_from([0.5, 0.3]),
    block=st.sampled_from([8, 64, 1 << 19]),
)
def test_each_stacked_subnet_gets_the_bits_that_it_would_draw_alone(n, m, k, p, block):
    x = torch.randn(n, m, k)
    together = [Generator().manual_seed(i) for i in range(m)]
    alone = []
    for i in range(m):
        torch.manual_seed(i)
        alone.append((dropout.dropout(x[:, i], p), torch.rand(2)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dropout, "_BLOCK", block)
        patch.setattr(dropout, "_GRAIN", 1)
        out = dropout.dropout(x, p, generators=together)
    for i, (expected, after) in enumerate(alone):
        assert torch.equal(out[:, i], expected)
        assert torch.equal(torch.rand(2, generator=together[i]), after), "as many numbers drawn"


def test_the_grouped_layer_draws_from_the_streams_of_the_subnets():
    layer = GroupedDropout(0.3, 3).train()
    shared, keys = torch.randn(50, 4), [("train", 0, 0, i) for i in range(3)]
    with seeded_each(*keys, device=torch.device("cpu")):
        own, of_shared = layer(shared.repeat(1, 3).view(50, 3, 4)), layer(shared)
    for i, key in enumerate(keys):
        with seeded(*key):
            narrow = Dropout(0.3)
            assert torch.equal(own[:, i], narrow(shared))
            assert torch.equal(of_shared[:, i], narrow(shared))
    assert layer.eval()(shared) is shared
    assert str(layer) == "GroupedDropout(p=0.3, num_subnets=3)"


@pytest.mark.parametrize("model", [GCN, GraphSAGE], ids=lambda kind: kind.__name__)
def test_stacked_training_is_serial_training_with_dropout_too(model):
    data = gist.load_dataset("csbm", num_nodes=120, num_features=8, num_classes=3, seed=0)
    trained = {}
    for executor in ("serial", "stacked"):
        torch.manual_seed(0)
        net = model(8, 12, 3, num_layers=3, dropout=0.4)
        settings = {"num_subnets": 3, "local_steps": 4, "epochs": 24, "executor": executor}
        gist.GISTTrainer(net, data, **settings).fit()
        trained[executor] = net.state_dict()
    for name, tensor in trained["serial"].items():
        torch.testing.assert_close(trained["stacked"][name], tensor, rtol=1e-4, atol=1e-5)


# As a layer, and its gradient


@pytest.mark.parametrize("p", [0.5, 0.3])
def test_the_gradient_passes_through_the_same_mask(p, small_blocks):
    x = torch.randn(40, 30, requires_grad=True)
    torch.manual_seed(0)
    out = dropout.dropout(x, p)
    grad = torch.randn(40, 30)
    out.backward(grad)
    threshold, bits = dropout._threshold(1 - p)
    torch.testing.assert_close(x.grad, grad * kept(out) * (2**bits / threshold))


def test_it_can_be_differentiated_twice():
    def fixed(x):
        torch.manual_seed(0)
        return dropout.dropout(x, 0.3).pow(2)

    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(fixed, x)
    assert torch.autograd.gradgradcheck(fixed, x)


def test_one_byte_per_element_is_kept_for_the_backward_pass():
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        dropout.dropout(torch.randn(10, 7, requires_grad=True), 0.3)
    assert [(t.dtype, t.numel()) for t in saved] == [(torch.uint8, 70)]


@pytest.mark.parametrize("strided", [False, True])
def test_in_place(strided):
    x = torch.randn(8, 6).t() if strided else torch.randn(6, 8)
    torch.manual_seed(0)
    expected = dropout.dropout(x, 0.5)
    torch.manual_seed(0)
    layer = Dropout(0.5, inplace=True)
    assert layer(x) is x
    assert torch.equal(x, expected)
    grown = torch.randn(6, 8, requires_grad=True)
    middle = grown * 2
    layer(middle).sum().backward()
    assert torch.equal(kept(grown.grad), kept(middle))
    with pytest.raises(RuntimeError, match="leaf"):
        layer(torch.randn(2, 2, requires_grad=True))


def test_the_edges_are_those_of_pytorch():
    x = torch.randn(5, 4)
    before = torch.get_rng_state()
    assert dropout.dropout(x, 0.0) is x
    assert dropout.dropout(x, 0.5, training=False) is x
    assert Dropout(0.5).eval()(x) is x
    assert torch.equal(dropout.dropout(x, 1.0), torch.zeros(5, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert dropout.dropout(torch.randn(0, 3), 0.5).shape == (0, 3)
    assert drop_ones(p=0.5).shape == ()
    with pytest.raises(ValueError, match="between 0 and 1"):
        dropout.dropout(x, 1.5)
    layer = Dropout(0.2)
    assert isinstance(layer, nn.Dropout)
    assert str(layer) == str(nn.Dropout(0.2))
    assert copy.deepcopy(layer).p == 0.2


def test_another_default_device_plays_no_part():
    x = torch.ones(5, 4)
    with torch.device("meta"):
        assert dropout.dropout(x, 0.5).device.type == "cpu"


def test_dropped_elements_are_zero_and_kept_ones_exact():
    x = torch.randn(1000).abs() + 1
    torch.manual_seed(0)
    out = dropout.dropout(x, 0.5)
    assert torch.equal(out[kept(out)], 2 * x[kept(out)])
    assert not torch.signbit(out).any()


@pytest.mark.parametrize("where", ["meta", "compiled"])
def test_elsewhere_it_is_the_function_of_pytorch(where, monkeypatch):
    x = torch.randn(5, 4)
    if where == "meta":
        out = dropout.dropout(x.to("meta"), 0.5)
        assert (out.shape, out.device.type) == (x.shape, "meta")
        return
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.manual_seed(0)
    out = dropout.dropout(x, 0.5)
    torch.manual_seed(0)
    assert torch.equal(out, F.dropout(x, 0.5))


class CountsCalls(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("p", [0.5, 0.3])
def test_without_memory_only_shapes_are_worked_out(p):
    before = torch.get_rng_state()
    with FakeTensorMode(), CountsCalls() as counter:
        x = torch.empty(2**20, 2**20, requires_grad=True)  # 4 TiB
        out = dropout.dropout(x, p)
        out.sum().backward()
    assert out.shape == x.grad.shape == x.shape
    assert counter.calls < 150
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("model", [GCN, GraphSAGE, GAT], ids=lambda kind: kind.__name__)
def test_the_reference_models_use_it(model):
    net = model(4, 8, 3, num_layers=2, dropout=0.3)
    assert type(net.dropout) is Dropout
    assert net.dropout.p == 0.3
    assert is_row_wise(net.dropout)
    assert gist.partition_spec(net).sizes.keys() == {"hidden.0"}
