"""One round against Algorithm 1 written out, and one subnet against plain training."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn.models import GCN as PyGGCN

import gist.nn
from gist import (
    Bernoulli,
    Categorical,
    DisjointUniform,
    GISTTrainer,
    GraphData,
    Overlapping,
)
from gist.errors import DivergedError
from gist.graph.generate import csbm
from gist.partition.optim_state import CarriedState
from gist.partition.spec import model_tensors
from gist.partition.streams import stream_seed

CLASSES = 3


def graph(
    dtype: torch.dtype = torch.float64, nodes: int = 30, *, weighted: bool = True
) -> GraphData:
    """A small symmetric graph whose edges all weigh 1, given as numbers of ``dtype``."""
    generator = torch.Generator().manual_seed(4)
    edges = torch.randint(nodes, (2, 60), generator=generator)
    edges = torch.cat([edges, edges.flip(0)], dim=1).unique(dim=1)
    order = torch.randperm(nodes, generator=generator)
    return GraphData.from_edges(
        edges,
        torch.randn(nodes, 5, generator=generator, dtype=torch.float64).to(dtype),
        torch.arange(nodes) % CLASSES,
        edge_weight=torch.ones(edges.size(1), dtype=dtype) if weighted else None,
        train=order[:15],
        val=order[15:22],
        test=order[22:],
    )


def a_hat(data: GraphData) -> Tensor:
    dense = torch.zeros(data.num_nodes, data.num_nodes, dtype=torch.float64)
    for source, target in data.edge_index.T.tolist():
        dense[target, source] = 1.0
    dense.fill_diagonal_(1.0)
    scale = dense.sum(1).rsqrt()
    return scale[:, None] * dense * scale


def train_by_hand(
    weights: list[Tensor], data: GraphData, norm: str | None, optimizer: str, steps: int
) -> list[Tensor]:
    """ζ steps on ``[W1, b1, W2, b2, W3, b3]``: forward, SGD and Adam from their formulas."""
    matrix, train = a_hat(data), data.train_mask
    lr, decay, momentum, beta1, beta2, eps = 0.05, 5e-4, 0.9, 0.9, 0.999, 1e-8
    weights = [w.clone().requires_grad_() for w in weights]
    first = [torch.zeros_like(w) for w in weights]
    second = [torch.zeros_like(w) for w in weights]
    for step in range(1, steps + 1):
        h = data.x
        for layer in range(3):
            h = matrix @ (h @ weights[2 * layer].T) + weights[2 * layer + 1]
            if layer < 2:
                if norm == "layer":
                    centred = h - h.mean(1, keepdim=True)
                    h = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
                h = h.clamp(min=0)
        log_p = h - h.logsumexp(1, keepdim=True)
        loss = -log_p[train].gather(1, data.y[train, None]).mean()
        grads = torch.autograd.grad(loss, weights)
        updated = []
        for i, (w, grad) in enumerate(zip(weights, grads, strict=True)):
            grad = grad + decay * w.detach()
            if optimizer == "sgd":
                first[i] = grad if step == 1 else momentum * first[i] + grad
                change = lr * first[i]
            else:
                first[i] = beta1 * first[i] + (1 - beta1) * grad
                second[i] = beta2 * second[i] + (1 - beta2) * grad.square()
                unbiased = (second[i] / (1 - beta2**step)).sqrt()
                change = lr * (first[i] / (1 - beta1**step)) / (unbiased + eps)
            updated.append((w.detach() - change).requires_grad_())
        weights = updated
    return [w.detach() for w in weights]


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("norm", [None, "layer"])
@pytest.mark.parametrize("m", [2, 3])
def test_one_round_is_algorithm_1(m, norm, optimizer):
    torch.manual_seed(1)
    data = graph()
    model = gist.nn.GCN(5, 7, CLASSES, 3, norm=norm, dropout=0.0).double()
    with torch.no_grad():
        for conv in model.convs:
            conv.bias.normal_()
    names = [f"convs.{i}.{kind}" for i in range(3) for kind in ("lin.weight", "bias")]
    start = [dict(model.named_parameters())[name].detach().clone() for name in names]

    trainer = GISTTrainer(
        model, data, num_subnets=m, local_steps=3, rounds=1, optimizer=optimizer, lr=0.05,
        schedule="constant", width_correction=False, seed=11,
    )  # fmt: skip
    trainer.fit()

    dealt = DisjointUniform()({"hidden.0": 7, "hidden.1": 7}, m, seed=11, round=0)
    w1, b1, w2, b2, w3, b3 = (w.clone() for w in start)
    b3_sum = torch.zeros_like(b3)
    for i in range(m):
        d1, d2 = dealt.held["hidden.0"][i], dealt.held["hidden.1"][i]
        square = torch.meshgrid(d2, d1, indexing="ij")
        part = [
            start[0][d1],
            start[1][d1],
            start[2][square],
            start[3][d2],
            start[4][:, d2],
            start[5],
        ]
        part = train_by_hand(part, data, norm, optimizer, steps=3)
        w1[d1], b1[d1], w2[square], b2[d2], w3[:, d2] = part[:5]
        b3_sum += part[5]
    expected = [w1, b1, w2, b2, w3, b3_sum / m]

    trained = dict(trainer.model.named_parameters())
    for name, before, value in zip(names, start, expected, strict=True):
        assert torch.allclose(trained[name], value, rtol=0, atol=1e-12), name
        assert not torch.allclose(trained[name], before, rtol=0, atol=1e-3), "something was trained"
    idle = torch.ones(7, 7, dtype=torch.bool)
    for i in range(m):
        idle[dealt.held["hidden.1"][i][:, None], dealt.held["hidden.0"][i]] = False
    assert torch.equal(trained["convs.1.lin.weight"][idle], start[2][idle]), "idle entries stay"


def capture(kept: list[dict[str, Tensor]]):
    def callback(trainer, record) -> None:
        kept.append({n: t.detach().clone() for n, t in model_tensors(trainer.model).items()})

    return callback


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("state", ["reset", "carry"])
@pytest.mark.parametrize("norm", ["layer", "batch", None])
def test_one_subnet_is_plain_training_bit_for_bit(norm, state, optimizer):
    torch.manual_seed(0)
    data = graph(torch.float32, weighted=False)
    model = gist.nn.GraphSAGE(5, 8, CLASSES, 3, norm=norm, dropout=0.5)
    plain = copy.deepcopy(model)
    rounds: list[dict[str, Tensor]] = []
    trainer = GISTTrainer(
        model, data, num_subnets=1, local_steps=4, rounds=3, optimizer=optimizer, lr=0.02,
        weight_decay=1e-3, schedule="step", optimizer_state=state, seed=5,
        callbacks=(capture(rounds),),
    )  # fmt: skip
    trainer.fit()

    makers = {
        "adam": lambda p: torch.optim.Adam(p, lr=0.02, weight_decay=1e-3, fused=True),
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=1e-3, fused=True),
        "sgd": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=1e-3, fused=True),
    }
    whole = makers[optimizer](plain.parameters())
    step = 0
    for round in range(3):
        if state == "reset":
            whole = makers[optimizer](plain.parameters())
        torch.manual_seed(stream_seed("train", 5, round, 0))
        plain.train()
        for _ in range(4):
            rate = 0.02 * (1.0 if step < 6 else 0.1 if step < 9 else 0.01)
            for group in whole.param_groups:
                group["lr"] = rate
            whole.zero_grad()
            scores = plain(data.x, data.adjacency)
            F.cross_entropy(scores[data.train_mask], data.y[data.train_mask]).backward()
            whole.step()
            step += 1
        for name, tensor in model_tensors(plain).items():
            assert torch.equal(tensor, rounds[round][name]), (round, name)


def run(model: nn.Module | None = None, **settings) -> GISTTrainer:
    torch.manual_seed(0)
    model = model or gist.nn.GCN(5, 12, CLASSES, 3, dropout=0.3)
    defaults = {"num_subnets": 3, "local_steps": 2, "rounds": 4, "executor": "serial"}
    trainer = GISTTrainer(model, graph(torch.float32), **(defaults | settings))
    trainer.fit()
    return trainer


def same(one: GISTTrainer, two: GISTTrainer) -> bool:
    pairs = zip(model_tensors(one.model).values(), model_tensors(two.model).values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optimizer_state": "carry"},
        {"sampler": Overlapping(min_units=6)},
        {"sampler": Bernoulli(keep=0.5)},
        {"sampler": Categorical()},
        {"num_subnets": [(0.5, 4), (0.5, 1)]},
        {"num_subnets": 5},
        {"sampler": Bernoulli(keep=0.4), "optimizer_state": "carry", "optimizer": "sgd"},
        {"clip_norm": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("executor", ["serial", "stacked"])
def test_runs_repeat_whatever_the_global_random_state(settings, executor):
    one = run(executor=executor, rounds=2, **settings)
    torch.rand(17)
    assert same(one, run(executor=executor, rounds=2, **settings))


def test_training_leaves_the_global_random_state_alone():
    torch.manual_seed(0)
    model = gist.nn.GCN(5, 12, CLASSES, 3)
    data = graph(torch.float32)
    state = torch.get_rng_state()
    GISTTrainer(model, data, num_subnets=2, rounds=2, local_steps=2).fit()
    assert torch.equal(torch.get_rng_state(), state)


def test_each_subnet_has_a_stream_of_its_own():
    """What subnet 1 draws does not depend on how many steps subnet 0 ran, or whether it ran."""
    trainer = run(rounds=1)
    executor, (plan,) = trainer.executor, trainer.rounds
    assignment = trainer.assign(plan)
    drawn = []
    for subnet in (1, 0, 1):
        subnets = range(subnet, subnet + 1)
        program = executor.build(assignment, subnets)
        with executor.store.open(assignment) as transfer:
            transfer.load(subnets, program.tensors)
        program.restart(executor.tensors, None)
        executor._train(program, plan, subnets)
        drawn.append([t.detach().clone() for t in program.module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(drawn[0], drawn[2], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(drawn[0], drawn[1], strict=True))


def test_modes_of_every_module_are_left_as_they_were():
    model = gist.nn.GCN(5, 12, CLASSES, 3, norm="batch")
    model.train()
    model.norms[0].eval()  # a frozen norm
    before = {name: module.training for name, module in model.named_modules()}
    trainer = GISTTrainer(model, graph(torch.float32), num_subnets=2, rounds=2, local_steps=2)
    assert {n: m.training for n, m in model.named_modules()} == before, "by the constructor"
    trainer.fit()
    trainer.evaluate("val")
    assert {n: m.training for n, m in model.named_modules()} == before


@pytest.mark.parametrize("ran_before", [False, True])
def test_models_that_cache_their_normalisation(ran_before):
    """PyG's ``cached=True`` keeps the first graph it sees; that must be the data's."""
    data = graph(torch.float32)
    results = []
    for cached in (False, True):
        torch.manual_seed(0)
        model = PyGGCN(5, 12, 3, CLASSES, cached=cached)
        if ran_before:
            model(data.x, data.edge_index, data.edge_weight)
        trainer = GISTTrainer(model, data, num_subnets=2, rounds=2, local_steps=3)
        trainer.fit()
        results.append(trainer.predict())
    assert torch.allclose(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("executor", ["serial", "stacked"])
def test_subnets_of_many_shapes_do_not_pile_up(executor):
    trainer = run(
        sampler=Bernoulli(keep=0.5), rounds=20, local_steps=1, num_subnets=4, eval_every=20,
        executor=executor,
    )  # fmt: skip
    assert len(trainer.executor._programs) <= 16, "programs of shapes long gone are kept"


def test_parameters_may_be_frozen_between_rounds():
    seen: list[Tensor] = []

    def freeze(trainer: GISTTrainer, record: object) -> None:
        trainer.model.convs[0].lin.weight.requires_grad_(False)
        seen.append(trainer.model.convs[0].lin.weight.detach().clone())

    run(callbacks=(freeze,))
    assert len(seen) == 4
    assert torch.equal(seen[0], seen[-1])


def test_frozen_parameters_never_move():
    torch.manual_seed(0)
    model = gist.nn.GCN(5, 12, CLASSES, 3)
    model.convs[1].lin.weight.requires_grad_(False)
    before = model.convs[1].lin.weight.clone()
    for state in ("reset", "carry"):
        trainer = run(model=model, optimizer_state=state)
        assert torch.equal(trainer.model.convs[1].lin.weight, before)
        assert not trainer.model.convs[1].lin.weight.requires_grad


def test_divergence_names_round_and_subnet():
    with pytest.raises(DivergedError, match=r"round \d, subnet \d.*lower lr"):
        run(optimizer="sgd", lr=1e30, model=gist.nn.GCN(5, 12, CLASSES, 3, norm=None))


def test_batch_norm_counts_its_batches_as_one_model_would():
    data = graph(torch.float32)
    model = gist.nn.GCN(5, 12, CLASSES, 2, norm="batch")
    trainer = GISTTrainer(model, data, num_subnets=3, rounds=1, local_steps=4, recalibrate_bn=False)
    trainer.fit()
    count = model.norms[0].num_batches_tracked
    assert count.dtype == torch.int64
    assert count.item() == 4


def test_stopping_before_the_first_evaluation():
    trainer = GISTTrainer(
        gist.nn.GCN(5, 12, CLASSES, 2), graph(torch.float32), num_subnets=2, rounds=4,
        local_steps=1, eval_every=3, callbacks=(lambda trainer, record: True,),
    )  # fmt: skip
    result = trainer.fit()
    assert len(result.history) == 1
    assert result.best.val_metric is not None


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_carried_state_learns_at_one_step_per_round(optimizer):
    """ζ = 1 with a fresh Adam is sign descent; carried, it must learn and not diverge."""
    data = csbm(
        num_nodes=300, num_features=16, num_classes=4, average_degree=8.0, homophily=0.8,
        feature_signal=2.0, seed=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = gist.nn.GCN(16, 32, 4, 3, dropout=0.0)
    trainer = GISTTrainer(
        model, data, num_subnets=2, local_steps=1, rounds=60, optimizer=optimizer,
        optimizer_state="carry", schedule="constant", eval_every=60,
        lr=0.01 if optimizer == "adam" else 0.05,
    )  # fmt: skip
    result = trainer.fit()
    losses = [record.train_loss for record in result.history]
    assert max(losses) < 1.3 * losses[0], "no overlong step"
    assert sum(losses[-10:]) / 10 < 0.7 * losses[0]
    assert result.last_test_metric > 0.8


def test_carried_state_covers_exactly_what_was_trained():
    trainer = run(optimizer_state="carry", rounds=1, num_subnets=3)
    carried = trainer.executor.carried
    assert isinstance(carried, CarriedState)
    assignment = trainer.assign(trainer.rounds[0])
    seen = torch.zeros(12, 12, dtype=torch.bool)
    for i in range(3):
        rows, columns = assignment.held["hidden.1"][i], assignment.held["hidden.0"][i]
        seen[rows[:, None], columns] = True
    assert torch.equal(carried.tensors["seen/convs.1.lin.weight"], seen)
    moments = carried.tensors["exp_avg_sq/convs.1.lin.weight"]
    assert not moments[~seen].any()
    assert moments[seen].all()
