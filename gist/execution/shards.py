"""Tensors spread over ranks by rows: dealt to the subnets of a round, and taken back.

Shape legend: ``W`` ranks, ``m`` subnets; subnet ``i`` is trained by rank ``i mod W``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gist.execution.comm import Comm, Pending
from gist.partition.assignment import Assignment
from gist.partition.spec import ParamLayout, PartitionSpec
from gist.partition.transfer import (
    Index,
    Merge,
    RunningMean,
    Selection,
    gather,
    is_exclusive,
)

Part = dict[str, Tensor]
"""What one subnet holds, by name."""

_EXCHANGE_BYTES = 64 * 2**20
"""Tensors are exchanged in groups of about this size: one is packed while another travels."""


@dataclass(frozen=True)
class Home:
    """Along which dim of a tensor its rows are spread over the ranks.

    Attributes:
        dim: The first that units index; that of a tensor of one unit is an extra one of size 1.
        size: Its length.
        moves: Whether rows stay with the rank that trained them last. Those of tensors that units
            index along one dim do: all of them are held in every round, so they go straight from
            one holder to the next. Of others only the held entries travel, and return.
        axis: What runs along ``dim``; tensors that agree in it and in ``moves`` lie alike.
        of_unit: Whether the tensor as a whole belongs to one unit.
    """

    dim: int
    size: int
    moves: bool
    axis: Hashable
    of_unit: bool = False

    @classmethod
    def of(cls, layout: ParamLayout) -> Home | None:
        """That of a tensor; None for one that all subnets hold, which every rank has."""
        if layout.owner is not None:
            return cls(dim=0, size=1, moves=True, axis=layout.owner, of_unit=True)
        dims = sorted({slot.dim for slot in layout.slots})
        if not dims:
            return None
        axis = tuple((slot.group, slot.map) for slot in layout.slots if slot.dim == dims[0])
        size = layout.shape[dims[0]]
        return cls(dim=dims[0], size=size, moves=len(dims) == 1, axis=(size, axis))


class Placement:
    """Which rank has which rows.

    Args:
        owner: ``[n]`` int64, a rank for each row.
        rank: This one.

    Attributes:
        owner: Likewise.
        mine: The rows that this rank has, ascending.
        place: ``[n]``, where it has each of them.
    """

    def __init__(self, owner: Tensor, rank: int) -> None:
        self.owner = owner
        self.mine = (owner == rank).nonzero()[:, 0]
        self.place = torch.full_like(owner, -1)
        self.place[self.mine] = torch.arange(self.mine.numel())

    @classmethod
    def even(cls, home: Home, comm: Comm) -> Placement:
        """Consecutive rows, about equally many for each rank; units that own tensors take turns."""
        owner = torch.empty(home.size, dtype=torch.long)
        if home.of_unit:
            owner[0] = home.axis[1] % comm.size  # type: ignore[index]
        else:
            for rank, rows in enumerate(torch.arange(home.size).tensor_split(comm.size)):
                owner[rows] = rank
        return cls(owner, comm.rank)


class Shards:
    """A rank's rows of tensors that are spread over all ranks.

    Args:
        comm: The ranks.
        spec: How the tensors follow the units.
        like: Tensors by name, of which dtypes are taken; shapes are those of the spec.
        device: Of the rows.

    Attributes:
        tensors: This rank's rows by name; those of a tensor of one unit have an extra first dim.
        homes: Along which dim each tensor is spread; None for one that every rank has.
        dtypes: Of each tensor.
    """

    def __init__(
        self,
        comm: Comm,
        spec: PartitionSpec,
        like: Mapping[str, Tensor],
        device: torch.device,
    ) -> None:
        self.comm, self.spec, self.device = comm, spec, device
        self.homes = {name: Home.of(spec.layouts[name]) for name in like}
        self.dtypes = {name: tensor.dtype for name, tensor in like.items()}
        self._placements: dict[Home, Placement] = {}
        self.tensors: dict[str, Tensor] = {}
        self.clear()

    def clear(self) -> None:
        """Lays all rows out evenly; what was in them is lost."""
        for home in filter(None, self.homes.values()):
            self._placements[home] = Placement.even(home, self.comm)
        self.tensors = {
            name: torch.zeros(self.local_shape(name), dtype=dtype, device=self.device)
            for name, dtype in self.dtypes.items()
        }

    def shape(self, name: str, rows: int) -> tuple[int, ...]:
        """Shape of so many rows of a tensor."""
        home, shape = self.homes[name], self.spec.layouts[name].shape
        if home is None:
            return shape
        if home.of_unit:
            return rows, *shape
        return *shape[: home.dim], rows, *shape[home.dim + 1 :]

    def local_shape(self, name: str) -> tuple[int, ...]:
        """Shape of this rank's rows."""
        home = self.homes[name]
        return self.shape(name, 0 if home is None else self._placements[home].mine.numel())

    def rows(self, name: str) -> Tensor | None:
        """Which rows of a tensor this rank has, ascending; None for a tensor without rows."""
        home = self.homes[name]
        return None if home is None else self._placements[home].mine

    def all_rows(self) -> dict[str, Tensor | None]:
        """:meth:`rows` of every tensor."""
        return {name: self.rows(name) for name in self.tensors}

    def owner(self, name: str) -> Tensor | None:
        """``[n]``: the rank that has each row of a tensor; None for a tensor without rows."""
        home = self.homes[name]
        return None if home is None else self._placements[home].owner

    def copy(self) -> dict[str, Any]:
        """Everything as it is now."""
        tensors = {name: tensor.clone() for name, tensor in self.tensors.items()}
        return {"tensors": tensors, "placements": dict(self._placements)}

    def view(self) -> dict[str, Any]:
        """As :meth:`copy`, but of the same tensors."""
        return {"tensors": self.tensors, "placements": dict(self._placements)}

    def restore(self, copy: dict[str, Any]) -> None:
        """Takes over what :meth:`copy` or :meth:`view` gave."""
        self.tensors, self._placements = copy["tensors"], copy["placements"]

    def deal(
        self, selections: Sequence[Selection], names: Iterable[str] | None = None
    ) -> list[Part]:
        """What this rank's subnets hold; all ranks take part.

        Args:
            selections: What each subnet holds, of all of them.
            names: Of which tensors; all by default.

        Returns:
            One part for each subnet of this rank. Entries are fresh, or where a subnet holds all
            that the rank has and nothing else, the rank's own.
        """
        return _Deal(self, selections).run(list(self.tensors) if names is None else list(names))

    @torch.no_grad()
    def collect(
        self, assignment: Assignment, selections: Sequence[Selection], parts: Sequence[Part]
    ) -> None:
        """Puts back what was dealt, trained; see :class:`~gist.partition.transfer.Merge`.

        Args:
            assignment: What was dealt.
            selections: As for :meth:`deal`.
            parts: Of this rank's subnets.
        """
        exclusive = {
            name: is_exclusive(self.spec.layouts[name], self.spec, assignment)
            for name in self.tensors
        }
        shared: list[str] = []
        staying: list[str] = []
        moving: list[str] = []
        for name, home in self.homes.items():
            if home is None:
                shared.append(name)
            else:
                (moving if home.moves and exclusive[name] else staying).append(name)
        _Average(self, selections, parts).run_groups(shared)
        _Collect(self, selections, assignment, parts).run_groups(staying)
        self._move(moving, selections, parts)

    def _move(
        self, names: Sequence[str], selections: Sequence[Selection], parts: Sequence[Part]
    ) -> None:
        """Makes rows stay where they were trained."""
        before, after = dict(self._placements), dict(self._placements)
        for home in dict.fromkeys(self.homes[name] for name in names):
            assert home is not None
            owner = before[home].owner.clone()
            name = next(name for name in names if self.homes[name] == home)
            for subnet, selection in enumerate(selections):
                owner[rows_of(home, self.spec.layouts[name], selection)] = subnet % self.comm.size
            after[home] = Placement(owner, self.comm.rank)
        self._placements = after
        own = [selections[i] for i in self.comm.subnets(len(selections))]
        for name in names:
            home, layout = self.homes[name], self.spec.layouts[name]
            assert home is not None
            old, new = self.tensors[name], self.tensors[name].new_empty(self.local_shape(name))
            trained = torch.zeros(home.size, dtype=torch.bool)
            for selection, part in zip(own, parts, strict=True):
                rows = rows_of(home, layout, selection)
                if rows.numel():
                    trained[rows] = True
                    _put(new, home.dim, after[home].place[rows], _as_rows(home, part[name]))
            idle = after[home].mine[~trained[after[home].mine]]  # no subnet holds them
            if idle.numel():
                kept = old.index_select(home.dim, before[home].place[idle].to(old.device))
                _put(new, home.dim, after[home].place[idle], kept)
            self.tensors[name] = new

    def blocks(
        self, names: Iterable[str] | None = None
    ) -> Iterator[tuple[str, list[tuple[Tensor | None, Tensor]]]]:
        """Streams tensors to rank 0, some rows at a time; all ranks take part.

        Yields:
            A name, and on rank 0 ``(rows, their entries)`` from each rank, or ``(None, all of
            it)`` for a tensor without rows; nothing on the others.
        """
        for name in list(self.tensors) if names is None else names:
            home, own = self.homes[name], self.tensors[name]
            if home is None:
                yield name, [(None, own)] if self.comm.is_main else []
                continue
            for rows, mine in self._portions(name):
                entries = own.index_select(home.dim, mine.to(own.device))
                shapes = [self.shape(name, each.numel()) for each in rows]
                parts = self.comm.to_main(entries.reshape(-1), [math.prod(s) for s in shapes])
                got = zip(rows, parts, shapes, strict=True) if parts else ()
                yield name, [(each, part.to(self.device).view(s)) for each, part, s in got]

    def fill(self, whole: Callable[[str], Tensor], names: Iterable[str] | None = None) -> None:
        """Takes rank 0's values of tensors; all ranks take part.

        Args:
            whole: Gives a whole tensor by name, on rank 0; called there alone.
            names: Which; all by default.
        """
        for name in list(self.tensors) if names is None else names:
            home, own = self.homes[name], self.tensors[name]
            source = whole(name).detach() if self.comm.is_main else None
            if home is None:
                if source is not None:
                    own.copy_(source)
                self.comm.fill_from_main([own])
                continue
            if source is not None and home.of_unit:
                source = source.unsqueeze(0)
            for rows, mine in self._portions(name):
                parts: list[Tensor] | None = None
                if source is not None:
                    cut = [source.index_select(home.dim, each.to(source.device)) for each in rows]
                    parts = [part.reshape(-1).to(self.comm.device) for part in cut]
                shape = self.shape(name, mine.numel())
                entries = self.comm.hand_out(parts, own, math.prod(shape))
                _put(own, home.dim, mine, entries.to(self.device).view(shape))

    def _portions(self, name: str) -> Iterator[tuple[list[Tensor], Tensor]]:
        """Rows of every rank, a bounded number at a time, and where this rank has its own."""
        home = self.homes[name]
        assert home is not None
        owner = self._placements[home].owner
        all_rows = [(owner == rank).nonzero()[:, 0] for rank in range(self.comm.size)]
        row_bytes = math.prod(self.shape(name, 1)) * self.dtypes[name].itemsize
        size = max(_EXCHANGE_BYTES // max(row_bytes * self.comm.size, 1), 1)
        for start in range(0, max(rows.numel() for rows in all_rows), size):
            rows = [rows[start : start + size] for rows in all_rows]
            begin = min(start, all_rows[self.comm.rank].numel())
            yield rows, torch.arange(begin, begin + rows[self.comm.rank].numel())


def exchange_groups(
    names: Iterable[str], spec: PartitionSpec, dtypes: Mapping[str, torch.dtype]
) -> list[list[str]]:
    """Names in groups that are exchanged at once: of one dtype, and about equal size."""
    groups: list[list[str]] = []
    size = 0
    for name in sorted(names, key=lambda name: str(dtypes[name])):
        nbytes = math.prod(spec.layouts[name].shape) * dtypes[name].itemsize
        same = groups and dtypes[groups[-1][0]] == dtypes[name]
        if same and size + nbytes <= _EXCHANGE_BYTES:
            groups[-1].append(name)
            size += nbytes
        else:
            groups.append([name])
            size = nbytes
    return groups


def rows_of(home: Home, layout: ParamLayout, selection: Selection) -> Tensor:
    """The rows of a tensor that a subnet holds, ascending."""
    if not selection.holds(layout):
        return torch.empty(0, dtype=torch.long)
    rows = None if home.of_unit else selection.index(layout)[home.dim]
    return torch.arange(home.size) if rows is None else rows


class _Exchange(ABC):
    """What of every tensor travels between a rank that has rows and one that trains them."""

    def __init__(self, shards: Shards, selections: Sequence[Selection]) -> None:
        self.shards, self.selections, self.comm = shards, selections, shards.comm
        self._splits: dict[tuple[Home, int], tuple[Tensor, Tensor, list[int]]] = {}

    @abstractmethod
    def travelling(self, sender: int, receiver: int) -> tuple[range, int]:
        """The subnets whose entries one rank sends another, and the rank that has the rows."""

    @abstractmethod
    def write(self, name: str, subnet: int, rows_of: int, out: Tensor) -> None:
        """Writes what this rank sends of a tensor: what a subnet holds of the rows of a rank."""

    @abstractmethod
    def unpack(self, group: list[str], blocks: Mapping[tuple[str, int, int], Tensor]) -> None:
        """Takes what has arrived, by name, subnet, and the rank that sent it."""

    def holds(self, name: str, subnet: int) -> bool:
        return self.selections[subnet].holds(self.shards.spec.layouts[name])

    def split(self, name: str, subnet: int) -> tuple[Tensor, Tensor, list[int]]:
        """Rows that a subnet holds, the rank that has each, and how many each rank has."""
        home = self.shards.homes[name]
        assert home is not None
        key = home, subnet
        if key not in self._splits:
            rows = rows_of(home, self.shards.spec.layouts[name], self.selections[subnet])
            owners = self.shards._placements[home].owner[rows]
            counts = torch.bincount(owners, minlength=self.comm.size).tolist()
            self._splits[key] = rows, owners, counts
        return self._splits[key]

    def shape(self, name: str, subnet: int, rank: int) -> tuple[int, ...]:
        """Shape of what a subnet holds of the rows that a rank has."""
        home, layout = self.shards.homes[name], self.shards.spec.layouts[name]
        assert home is not None
        shape = self.selections[subnet].shape(layout)
        rows = self.split(name, subnet)[2][rank]
        if home.of_unit:
            return rows, *shape
        return *shape[: home.dim], rows, *shape[home.dim + 1 :]

    def within(self, name: str, subnet: int, rank: int) -> Tensor:
        """Which of a subnet's rows a rank has."""
        return (self.split(name, subnet)[1] == rank).nonzero()[:, 0]

    def local_index(self, name: str, subnet: int) -> Index:
        """Where this rank has what a subnet holds of a tensor."""
        home, layout = self.shards.homes[name], self.shards.spec.layouts[name]
        assert home is not None
        placement = self.shards._placements[home]
        rows, owners, counts = self.split(name, subnet)
        mine: Tensor | None = None
        if counts[self.comm.rank] != placement.mine.numel():
            mine = placement.place[rows[owners == self.comm.rank]]
        if home.of_unit:
            return mine, *(None for _ in layout.shape)
        index = list(self.selections[subnet].index(layout))
        index[home.dim] = mine
        return tuple(index)

    def message(self, group: list[str], sender: int, receiver: int) -> list[tuple[str, int, Any]]:
        """What one rank sends another, in order: name, subnet and shape of each block."""
        if sender == receiver:
            return []
        subnets, rows_of = self.travelling(sender, receiver)
        return [
            (name, subnet, self.shape(name, subnet, rows_of))
            for subnet in subnets
            for name in group
            if self.holds(name, subnet)
        ]

    @torch.no_grad()
    def run_groups(self, names: Sequence[str]) -> None:
        """Exchanges group by group: while one is on its way, the next is packed."""
        waiting: deque[tuple[list[str], Pending, list[Any]]] = deque()
        for group in exchange_groups(names, self.shards.spec, self.shards.dtypes):
            waiting.append((group, *self._send(group)))
            if len(waiting) > 1:
                self._arrive(*waiting.popleft())
        while waiting:
            self._arrive(*waiting.popleft())

    def _send(self, group: list[str]) -> tuple[Pending, list[Any]]:
        """Packs and starts; with it, the messages that will come."""
        me, ranks = self.comm.rank, range(self.comm.size)
        going = [self.message(group, me, rank) for rank in ranks]
        coming = [self.message(group, rank, me) for rank in ranks]
        counts = [[sum(math.prod(b[2]) for b in each) for each in all_] for all_ in (going, coming)]
        outgoing, at = self.shards.tensors[group[0]].new_empty(sum(counts[0])), 0
        for rank, message in zip(ranks, going, strict=True):
            rows_of = self.travelling(me, rank)[1]
            for name, subnet, shape in message:
                out = outgoing[at : at + math.prod(shape)].view(shape)
                if out.numel():
                    self.write(name, subnet, rows_of, out)
                at += out.numel()
        return self.comm.start(outgoing, *counts), coming

    def _arrive(self, group: list[str], pending: Pending, coming: list[Any]) -> None:
        received, at = pending.wait().to(self.shards.device), 0
        blocks = {}
        for sender, message in enumerate(coming):
            for name, subnet, shape in message:
                size = math.prod(shape)
                blocks[name, subnet, sender] = received[at : at + size].view(shape)
                at += size
        self.unpack(group, blocks)


class _Deal(_Exchange):
    def run(self, names: list[str]) -> list[Part]:
        own = self.comm.subnets(len(self.selections))
        self.parts: dict[int, Part] = {subnet: {} for subnet in own}
        self.run_groups([name for name in names if self.shards.homes[name] is not None])
        for name in names:
            if self.shards.homes[name] is None:
                for part in self.parts.values():
                    part[name] = self.shards.tensors[name].clone()
        return list(self.parts.values())

    def travelling(self, sender: int, receiver: int) -> tuple[range, int]:
        return self.comm.subnets(len(self.selections), receiver), sender

    def write(self, name: str, subnet: int, rows_of: int, out: Tensor) -> None:
        gather(self.shards.tensors[name], self.local_index(name, subnet), out=out)

    def unpack(self, group: list[str], blocks: Mapping[tuple[str, int, int], Tensor]) -> None:
        for subnet, part in self.parts.items():
            for name in group:
                if self.holds(name, subnet):
                    part[name] = self._whole(name, subnet, blocks)

    def _whole(
        self, name: str, subnet: int, blocks: Mapping[tuple[str, int, int], Tensor]
    ) -> Tensor:
        """All that a subnet holds of a tensor, from this rank and others."""
        me, home, own = self.comm.rank, self.shards.homes[name], self.shards.tensors[name]
        assert home is not None
        index, (rows, _, counts) = self.local_index(name, subnet), self.split(name, subnet)
        if counts[me] == rows.numel():
            entries = own if all(each is None for each in index) else gather(own, index)
        else:
            entries = own.new_empty(self._held_shape(name, subnet))
            for rank in range(self.comm.size):
                if counts[rank]:
                    block = gather(own, index) if rank == me else blocks[name, subnet, rank]
                    _put(entries, home.dim, self.within(name, subnet, rank), block)
        return entries.squeeze(0) if home.of_unit else entries

    def _held_shape(self, name: str, subnet: int) -> tuple[int, ...]:
        home, layout = self.shards.homes[name], self.shards.spec.layouts[name]
        assert home is not None
        shape = self.selections[subnet].shape(layout)
        return (1, *shape) if home.of_unit else shape


class _Collect(_Exchange):
    def __init__(
        self,
        shards: Shards,
        selections: Sequence[Selection],
        assignment: Assignment,
        parts: Sequence[Part],
    ) -> None:
        super().__init__(shards, selections)
        self.assignment = assignment
        self.parts = dict(zip(self.comm.subnets(len(selections)), parts, strict=True))

    def travelling(self, sender: int, receiver: int) -> tuple[range, int]:
        return self.comm.subnets(len(self.selections), sender), receiver

    def write(self, name: str, subnet: int, rows_of: int, out: Tensor) -> None:
        self._cut(name, subnet, rows_of, out)

    def _cut(self, name: str, subnet: int, rank: int, out: Tensor | None = None) -> Tensor:
        """What of a part belongs to the rows that a rank has."""
        home = self.shards.homes[name]
        assert home is not None
        part = _as_rows(home, self.parts[subnet][name])
        if self.split(name, subnet)[2][rank] == part.size(home.dim):
            return part if out is None else out.copy_(part)
        rows = self.within(name, subnet, rank)
        if _is_run(rows):
            part = part.narrow(home.dim, int(rows[0]), rows.numel())
            return part if out is None else out.copy_(part)
        return torch.index_select(part, home.dim, rows.to(part.device), out=out)

    def unpack(self, group: list[str], blocks: Mapping[tuple[str, int, int], Tensor]) -> None:
        me = self.comm.rank
        tensors = {name: self.shards.tensors[name] for name in group}
        local = [_Local(self, subnet) for subnet in range(len(self.selections))]
        merging = Merge(tensors, self.shards.spec, self.assignment, local)  # type: ignore[arg-type]
        for subnet in range(len(self.selections)):
            rank = subnet % self.comm.size
            held = [name for name in group if local[subnet].holds(self.shards.spec.layouts[name])]
            merging.add(
                {
                    name: self._cut(name, subnet, me) if rank == me else blocks[name, subnet, rank]
                    for name in held
                }
            )
        merging.finish()


class _Average(_Exchange):
    """Means of what all subnets hold: each rank takes those of a piece of every tensor.

    The pieces then go to all ranks: 2 (W - 1) / W of a tensor's bytes are sent by each rank that
    trains one subnet, as in a ring, and the order in which copies are added is that of the subnets.
    """

    def __init__(
        self, shards: Shards, selections: Sequence[Selection], parts: Sequence[Part]
    ) -> None:
        super().__init__(shards, selections)
        self.parts = dict(zip(self.comm.subnets(len(selections)), parts, strict=True))

    def travelling(self, sender: int, receiver: int) -> tuple[range, int]:
        return self.comm.subnets(len(self.selections), sender), receiver

    def shape(self, name: str, subnet: int, rank: int) -> tuple[int, ...]:
        start, stop = piece(self.shards.tensors[name].numel(), rank, self.comm.size)
        return (stop - start,)

    def write(self, name: str, subnet: int, rows_of: int, out: Tensor) -> None:
        out.copy_(self._piece(self.parts[subnet][name], rows_of))

    def unpack(self, group: list[str], blocks: Mapping[tuple[str, int, int], Tensor]) -> None:
        me, size = self.comm.rank, self.comm.size
        tensors = [self.shards.tensors[name] for name in group]
        means = []
        for name, tensor in zip(group, tensors, strict=True):
            mean = RunningMean(self._piece(tensor, me))
            for subnet in range(len(self.selections)):
                rank = subnet % size
                own = self._piece(self.parts[subnet][name], me) if rank == me else None
                mean.add((None,), blocks[name, subnet, rank] if own is None else own)
            means.append(mean.value.to(tensor.dtype))
        counts = [sum(self.shape(name, 0, rank)[0] for name in group) for rank in range(size)]
        for rank, pieces in enumerate(
            self.comm.gather(torch.cat(means).to(self.comm.device), counts)
        ):
            sizes = [self.shape(name, 0, rank)[0] for name in group]
            for tensor, values in zip(tensors, torch.split(pieces, sizes), strict=True):
                self._piece(tensor, rank).copy_(values)

    def _piece(self, tensor: Tensor, rank: int) -> Tensor:
        start, stop = piece(tensor.numel(), rank, self.comm.size)
        return tensor.view(-1)[start:stop]


def piece(count: int, rank: int, size: int) -> tuple[int, int]:
    """Where the part of ``count`` entries begins and ends that one of ``size`` ranks averages."""
    each, more = divmod(count, size)
    start = rank * each + min(rank, more)
    return start, start + each + (rank < more)


class _Local:
    """A subnet's selection of the rows that this rank has."""

    def __init__(self, exchange: _Exchange, subnet: int) -> None:
        self._exchange, self._subnet = exchange, subnet

    def holds(self, layout: ParamLayout) -> bool:
        """Whether the subnet holds any of them."""
        exchange = self._exchange
        if not exchange.holds(layout.name, self._subnet):
            return False
        return exchange.split(layout.name, self._subnet)[2][exchange.comm.rank] > 0

    def index(self, layout: ParamLayout) -> Index:
        """Where this rank has them."""
        return self._exchange.local_index(layout.name, self._subnet)


def _as_rows(home: Home, part: Tensor) -> Tensor:
    return part.unsqueeze(0) if home.of_unit else part


def _put(tensor: Tensor, dim: int, rows: Tensor, part: Tensor) -> None:
    """Writes rows along a dim."""
    if _is_run(rows):
        tensor.narrow(dim, int(rows[0]) if rows.numel() else 0, rows.numel()).copy_(part)
    else:
        tensor.index_copy_(dim, rows.to(tensor.device), part)


def _is_run(rows: Tensor) -> bool:
    """Whether ascending rows are consecutive."""
    return not rows.numel() or int(rows[-1]) - int(rows[0]) + 1 == rows.numel()
