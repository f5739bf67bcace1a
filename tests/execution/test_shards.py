"""Shards against whole tensors: dealt as extract does, merged as merge does; ranks are threads.

Real processes are in tests/workers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gist.nn
from gist import Bernoulli, Categorical, DisjointUniform, Overlapping, Proportional, Whole
from gist.costs.exchange import Traffic
from gist.execution import shards
from gist.execution.comm import Comm, Pending
from gist.execution.shards import Part, Shards
from gist.partition.index_map import ONE_POSITION
from gist.partition.samplers import Sampler
from gist.partition.spec import ParamLayout, PartitionSpec, Slot, UnitGroup, model_tensors
from gist.partition.transfer import Selection, extract, merge
from gist.partition.wiring import partition_spec
from tests.threads import Queues, on_ranks

SAMPLERS: list[Sampler] = [
    DisjointUniform(),
    Overlapping(min_units=3),
    Bernoulli(keep=0.4),
    Categorical(),
    Proportional((1.0, 0.2)),
    Whole(),
]
MODELS: dict[str, Callable[[int], nn.Module]] = {
    "gcn": lambda width: gist.nn.GCN(3, width, 2, 3, norm="batch"),
    "sage": lambda width: gist.nn.GraphSAGE(3, width, 2, 3, norm="layer", jk="cat"),
    "gat": lambda width: gist.nn.GAT(3, 2 * width, 2, 3, heads=2),
}


class Threads(Comm):
    """A rank that is a thread, with queues to the others."""

    def __init__(self, rank: int, queues: Queues) -> None:
        super().__init__()
        self.rank, self.size, self.queues = rank, len(queues), queues

    def start(
        self, outgoing: Tensor, counts_out: Sequence[int], counts_in: Sequence[int]
    ) -> Pending:
        assert outgoing.numel() == sum(counts_out)
        for rank, part in enumerate(torch.split(outgoing, list(counts_out))):
            if rank != self.rank:
                self.queues[self.rank][rank].put(part.clone())
        others = [rank for rank in range(self.size) if rank != self.rank]
        parts = [self.queues[rank][self.rank].get(timeout=20) for rank in others]
        assert [part.numel() for part in parts] == [counts_in[rank] for rank in others]
        self.sent += sum(counts_out) * outgoing.element_size()
        self.received += sum(counts_in) * outgoing.element_size()
        return Pending(self, torch.cat([outgoing.new_empty(0), *parts]))


def trained(part: Part, *key: int) -> Part:
    """Other values for a subnet, the same whoever makes them."""
    generator = torch.Generator().manual_seed(hash(key) % 2**31)
    return {
        name: (tensor + 9 * torch.rand(tensor.shape, generator=generator)).to(tensor.dtype)
        for name, tensor in sorted(part.items())
    }


def whole(own: Shards, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Everything, put together on rank 0."""
    found = {name: torch.empty_like(tensor) for name, tensor in like.items()}
    for name, blocks in own.blocks():
        for rows, entries in blocks:
            home = own.homes[name]
            if rows is None or home is None:
                found[name].copy_(entries)
            else:
                into = found[name].unsqueeze(0) if home.of_unit else found[name]
                into.index_copy_(home.dim, rows, entries)
    return found


def check(
    tensors: dict[str, Tensor],
    spec: PartitionSpec,
    rounds: list[tuple[Sampler, int]],
    ranks: int,
) -> None:
    """Rounds of shards on ranks against those of whole tensors; bytes against the formula."""
    deals = [
        sampler(spec.sizes, m, seed=1, round=index) for index, (sampler, m) in enumerate(rounds)
    ]
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    parts_of: list[list[Part]] = []
    for index, deal in enumerate(deals):
        cut = [extract(expected, spec, deal, i) for i in range(deal.num_subnets)]
        parts_of.append(cut)
        merge(expected, spec, deal, [trained(part, index, i) for i, part in enumerate(cut)])
    items = {name: tensor.element_size() for name, tensor in tensors.items()}
    traffic = Traffic(spec, items, workers=ranks)
    promised = [traffic.round(deal) for deal in deals]

    def job(rank: int, queues: Queues) -> dict[str, Tensor]:
        comm = Threads(rank, queues)
        own = Shards(comm, spec, tensors, torch.device("cpu"))
        own.fill(tensors.__getitem__)
        kept: Any = None
        for index, deal in enumerate(deals):
            sent, received = comm.sent, comm.received
            selections = [Selection(spec, deal, i) for i in range(deal.num_subnets)]
            mine = range(comm.rank, deal.num_subnets, comm.size)
            parts = own.deal(selections)
            for i, part in zip(mine, parts, strict=True):
                assert part.keys() == parts_of[index][i].keys()
                for name, tensor in part.items():
                    assert torch.equal(tensor, parts_of[index][i][name]), (name, i)
            new = [trained(part, index, i) for i, part in zip(mine, parts, strict=True)]
            if index == 1:
                kept = own.copy()
                own.collect(deal, selections, new)
                own.restore(kept)  # as if that round had not been: then again
                comm.sent, comm.received = sent, received
                parts = own.deal(selections)
            own.collect(deal, selections, new)
            losses = 8 * len(mine) * (comm.size - 1)
            others = 8 * (deal.num_subnets - len(mine))
            assert (comm.sent - sent + losses, comm.received - received + others) == (
                promised[index][comm.rank]
            )
        rows = sum(len(each) for name in tensors if (each := own.rows(name)) is not None)
        everyones = comm.gather(torch.tensor([rows]), [1] * comm.size)
        homes = [home.size for home in own.homes.values() if home is not None]
        assert sum(int(each) for each in everyones) == sum(homes), "every row has one owner"
        return whole(own, tensors)

    found = on_ranks(ranks, job)[0]
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("model", MODELS)
@settings(max_examples=15)
@given(
    width=st.integers(8, 13),
    ranks=st.integers(1, 4),
    rounds=st.lists(
        st.tuples(st.sampled_from(SAMPLERS), st.integers(1, 6)), min_size=2, max_size=4
    ),
    most=st.sampled_from([2**26, 256]),
)
def test_shards_are_dealt_and_merged_as_whole_tensors_are(model, width, ranks, rounds, most):
    torch.manual_seed(0)
    made = MODELS[model](width)
    tensors = {name: tensor.detach().clone() for name, tensor in model_tensors(made).items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "_EXCHANGE_BYTES", most)
        check(tensors, partition_spec(made), rounds, ranks)


@settings(max_examples=15)
@given(ranks=st.integers(1, 4), rounds=st.lists(st.integers(1, 5), min_size=2, max_size=4))
def test_tensors_that_belong_to_one_unit_go_with_it(ranks, rounds):
    """As those of a residual block do."""
    names = [f"block.{unit}.weight" for unit in range(5)]
    layouts = {
        name: ParamLayout(name=name, shape=(2, 3), owner=("blocks", unit))
        for unit, name in enumerate(names)
    }
    layouts["head"] = ParamLayout(
        name="head", shape=(5,), slots=(Slot(dim=0, group="blocks", map=ONE_POSITION),)
    )
    layouts["bias"] = ParamLayout(name="bias", shape=(2,))
    spec = PartitionSpec(groups={"blocks": UnitGroup(name="blocks", size=5)}, layouts=layouts)
    tensors = {name: torch.rand(layout.shape) for name, layout in layouts.items()}
    samplers = [DisjointUniform(), Overlapping(min_units=2)]
    check(tensors, spec, [(samplers[m % 2], m) for m in rounds], ranks)
