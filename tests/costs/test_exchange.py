"""Bytes of an exchange are those of the entries that have to move."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gist import DisjointUniform, partition_spec
from gist.costs.exchange import exchange_per_round
from gist.nn import GCN, GraphSAGE
from gist.partition.spec import model_tensors
from gist.partition.transfer import extract

SCHEMES = {"gist", "data_parallel", "local_sgd", "central_server"}


def exchanged(model, num_subnets, workers, local_steps=20):
    spec = partition_spec(model)
    assignment = DisjointUniform()(spec.sizes, num_subnets, seed=0, round=0)
    sizes = {name: tensor.element_size() for name, tensor in model_tensors(model).items()}
    trained = [name for name, _ in model.named_parameters()]
    return exchange_per_round(
        spec, assignment, sizes, trained, workers=workers, local_steps=local_steps
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


def test_gist_moves_what_changes_hands():
    """Expected bytes, summed entry by entry over all homes and next holders, equally likely."""
    model, m, workers = GCN(4, 9, 2, 3), 3, 3
    spec = partition_spec(model)
    assignment = DisjointUniform()(spec.sizes, m, seed=0, round=0)
    total = 0.0
    for name, tensor in model_tensors(model).items():
        for subnet in range(m):
            (mine,) = extract({name: tensor}, spec, assignment, subnet).values()
            dims = len({slot.dim for slot in spec.layouts[name].slots})
            homes = [int(home != subnet) for home in range(workers)]
            if dims == 2:  # from home and back
                total += mine.nbytes * 2 * sum(homes) / workers
            elif dims == 1:  # to the next holder
                total += mine.nbytes * sum(homes) / workers
            else:  # a copy to everybody else
                total += mine.nbytes * (workers - 1)
    found = exchanged(model, m, workers)["gist"]
    assert found.total == round(total)
    assert found.busiest == round(2 * total / workers)


def test_the_wider_the_model_the_more_gist_saves():
    with torch.device("meta"):
        wide, narrow = (GraphSAGE(16, width, 8, 3) for width in (4096, 64))
    ratios = []
    for model in (narrow, wide):
        found = exchanged(model, 4, 4)
        ratios.append(found["local_sgd"].busiest / found["gist"].busiest)
        assert found["gist"].busiest < found["central_server"].busiest < found["local_sgd"].busiest
    assert ratios[1] > ratios[0]
    assert ratios[1] == pytest.approx(16, rel=0.05)  # 2 m P against 2 P / m, less what moves once
