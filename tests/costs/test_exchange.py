"""Bytes of an exchange are those of the entries that have to move."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gist import DisjointUniform, Overlapping, Whole, partition_spec
from gist.costs.exchange import Traffic, exchange_per_round
from gist.execution.distributed import ShardedState
from gist.nn import GCN, GraphSAGE, PreActResNet
from gist.partition.residual_wiring import wire_blocks
from gist.partition.spec import model_tensors
from gist.partition.transfer import Selection, extract, scatter_
from tests.execution.test_shards import Threads, check
from tests.threads import on_ranks

SCHEMES = {"gist", "data_parallel", "local_sgd", "central_server"}


def exchanged(model, num_subnets, workers, local_steps=20):
    spec = partition_spec(model)
    rounds = [DisjointUniform()(spec.sizes, num_subnets, seed=0, round=r) for r in (1, 0)]
    sizes = {name: tensor.element_size() for name, tensor in model_tensors(model).items()}
    trained = [name for name, _ in model.named_parameters()]
    return exchange_per_round(
        spec, rounds, sizes, trained, workers=workers, local_steps=local_steps
    )


def held_bytes(model, num_subnets):
    """Of every subnet, by what is really cut out for it."""
    spec = partition_spec(model)
    assignment = DisjointUniform()(spec.sizes, num_subnets, seed=0, round=0)
    return [
        sum(t.nbytes for t in extract(model_tensors(model), spec, assignment, i).values())
        for i in range(num_subnets)
    ]


def test_one_worker_exchanges_nothing():
    for exchange in exchanged(GCN(5, 12, 3, 3), 4, 1).values():
        assert (exchange.total, exchange.busiest) == (0, 0)


@given(num_subnets=st.integers(1, 8), workers=st.integers(1, 9), steps=st.integers(1, 50))
def test_the_others_move_the_whole_model(num_subnets, workers, steps):
    model = GraphSAGE(5, 16, 3, 3)
    found = exchanged(model, num_subnets, workers, steps)
    whole = sum(p.nbytes for p in model.parameters())
    ring = 2 * (workers - 1) * whole * num_subnets / workers  # one for the batches of the round
    assert set(found) == SCHEMES
    assert found["local_sgd"].total == round(ring)
    assert found["data_parallel"].total == round(ring * steps)
    away = [held for i, held in enumerate(held_bytes(model, num_subnets)) if i % workers]
    assert found["central_server"].total == 2 * sum(away)


@given(num_subnets=st.integers(1, 6), workers=st.integers(2, 5), width=st.integers(6, 12))
def test_gist_moves_what_changes_hands(num_subnets, workers, width):
    """Bytes, summed entry by entry over where each is, who trains it, and where it stays."""
    model, m = GCN(4, width, 2, 3), num_subnets
    spec = partition_spec(model)
    before, now = (DisjointUniform()(spec.sizes, m, seed=0, round=r) for r in (1, 0))
    moved = torch.zeros(workers, workers, dtype=torch.long)
    averages = {
        n: [w for w, part in enumerate(torch.arange(n).tensor_split(workers)) for _ in part]
        for n in (1, 2)
    }
    for name, tensor in model_tensors(model).items():
        layout = spec.layouts[name]
        dims = sorted({slot.dim for slot in layout.slots})
        where = torch.zeros_like(tensor, dtype=torch.long)
        if dims:
            for worker, rows in enumerate(torch.arange(tensor.size(dims[0])).tensor_split(workers)):
                where.index_fill_(dims[0], rows, worker)
        if len(dims) == 1:
            for i in range(m):
                held = torch.full_like(extract({name: where}, spec, before, i)[name], i % workers)
                scatter_(where, Selection(spec, before, i).index(layout), held)
        for i in range(m):
            owners = extract({name: where}, spec, now, i)[name].reshape(-1).tolist()
            for owner in owners if dims else ():
                moved[owner, i % workers] += 4
                moved[i % workers, owner] += 4 * (len(dims) == 2)
            for entry in range(0 if dims else len(owners)):
                moved[i % workers, averages[len(owners)][entry]] += 4
        for entry in range(0 if dims else tensor.numel()):
            moved[averages[tensor.numel()][entry]] += 4
    for i in range(m):
        moved[i % workers] += 8  # its loss
    moved.fill_diagonal_(0)
    found = exchanged(model, m, workers)["gist"]
    assert found.total == int(moved.sum())
    assert found.busiest == int((moved.sum(dim=0) + moved.sum(dim=1)).max())


def test_the_wider_the_model_the_more_gist_saves():
    with torch.device("meta"):
        wide, narrow = (GraphSAGE(16, width, 8, 3) for width in (4096, 64))
    ratios = []
    for model in (narrow, wide):
        found = exchanged(model, 4, 4)
        ratios.append(found["local_sgd"].busiest / found["gist"].busiest)
        assert found["gist"].busiest < found["central_server"].busiest < found["local_sgd"].busiest
    assert ratios[1] > ratios[0]
    assert ratios[1] == pytest.approx(16, rel=0.05)  # P against P / m², both there and back


RESIST = [Overlapping(min_units=2), Overlapping(), Whole()]
ROUNDS = st.lists(st.tuples(st.sampled_from(RESIST), st.integers(1, 5)), min_size=2, max_size=3)


def resnet():
    torch.manual_seed(0)
    return PreActResNet((4,), (2,), block="basic", num_classes=3)


@settings(max_examples=8)
@given(ranks=st.integers(2, 4), rounds=ROUNDS)
def test_a_resnet_sends_what_is_promised(ranks, rounds):
    model = resnet()
    tensors = {name: tensor.detach().clone() for name, tensor in model_tensors(model).items()}
    check(tensors, partition_spec(model, wire_blocks), rounds, ranks)


@settings(max_examples=5)
@given(ranks=st.integers(2, 3), rounds=ROUNDS)
def test_state_that_is_carried_goes_along_with_blocks(ranks, rounds):
    model = resnet()
    spec, parameters = partition_spec(model, wire_blocks), dict(model.named_parameters())
    deals = [
        sampler(spec.sizes, m, seed=1, round=index) for index, (sampler, m) in enumerate(rounds)
    ]
    sizes = {name: tensor.element_size() for name, tensor in parameters.items()}
    moments = dict.fromkeys(parameters, 2 * 4 + 1)
    both, alone = (
        Traffic(spec, sizes, workers=ranks, state_bytes=state, counts_steps=bool(state))
        for state in (moments, {})
    )
    more = [
        [(b[0] - a[0], b[1] - a[1]) for b, a in zip(both.round(d), alone.round(d), strict=True)]
        for d in deals
    ]

    def job(rank, queues):
        comm = Threads(rank, queues)
        carried = ShardedState(spec, parameters, torch.device("cpu"), comm)
        for index, deal in enumerate(deals):
            sent, received = comm.sent, comm.received
            carried.open(deal)
            states = []
            for i in comm.subnets(deal.num_subnets):
                carried.cut(i)
                part = extract(parameters, spec, deal, i)
                keys = ("exp_avg", "exp_avg_sq")
                states.append(
                    {n: {"step": torch.ones(())} | dict.fromkeys(keys, t) for n, t in part.items()}
                )
            carried.merge(states)
            if index:  # in the first one they agree on what there is to carry, too
                assert (comm.sent - sent, comm.received - received) == more[index][rank]

    on_ranks(ranks, job)


def test_all_of_a_resnet_but_its_blocks_is_averaged():
    """Blocks change hands once; of the rest each of S workers sends and receives a ring's share."""
    model, size = resnet(), 3
    spec = partition_spec(model, wire_blocks)
    tensors = model_tensors(model)
    deals = [Overlapping()(spec.sizes, size, seed=0, round=r) for r in (1, 0)]
    found = exchange_per_round(
        spec,
        deals,
        {name: tensor.element_size() for name, tensor in tensors.items()},
        [name for name, _ in model.named_parameters()],
        workers=size,
        local_steps=5,
    )
    shared = sum(t.nbytes for name, t in tensors.items() if spec.layouts[name].is_shared)
    path, (group, _) = next(iter(spec.blocks.items()))
    block = sum(t.nbytes for name, t in tensors.items() if name.startswith(f"{path}."))
    before, now = (
        {unit: i for i, units in enumerate(deal.held[group]) for unit in units.tolist()}
        for deal in deals
    )
    moved = sum(before[unit] != now[unit] for unit in now)
    assert found["gist"].total == 2 * (size - 1) * shared + moved * block + size * (size - 1) * 8
