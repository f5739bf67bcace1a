"""Subnets that are cut out once and never merged: their tensors and optimiser states.

Shape legend: ``W`` ranks, ``m`` members; member ``i`` is trained, and kept, by rank ``i mod W``.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from gist.errors import CheckpointError
from gist.execution.comm import Comm
from gist.execution.partfiles import tensor_names
from gist.execution.store import RoundTransfer
from gist.execution.tensorfile import replace_file, write_tensors
from gist.partition.assignment import Assignment
from gist.partition.optim_state import CarriedState, State
from gist.partition.spec import PartitionSpec, model_tensors
from gist.partition.transfer import Selection, extract

Member = dict[str, Tensor]
"""The tensors of one member, by their full names in the model it was cut from."""


class MemberStore:
    """The tensors of every member, apart from each other; see :class:`~gist.execution.store.Store`.

    The model that they are cut from is left as it is: its tensors are no views of these. In files,
    those of member ``i`` are named ``members.i.NAME``.

    Args:
        model: What the members are cut from; of several ranks, rank 0's values are taken.
        spec: Its partition spec.
        assignment: Which units each member holds.
        comm: The ranks.

    Attributes:
        members: Those of this rank, by index.
    """

    overlaps = False

    def __init__(
        self, model: nn.Module, spec: PartitionSpec, assignment: Assignment, comm: Comm
    ) -> None:
        self.model, self.spec, self.assignment, self.comm = model, spec, assignment, comm
        tensors = model_tensors(model)
        comm.fill_from_main(tensors.values())
        own = comm.subnets(assignment.num_subnets)
        self.members: dict[int, Member] = {i: extract(tensors, spec, assignment, i) for i in own}
        self._kept: dict[int, Member] = {}

    @property
    def device(self) -> torch.device:
        """See :attr:`Store.device`."""
        return next(self.model.parameters()).device

    @property
    def has_kept(self) -> bool:
        """See :attr:`Store.has_kept`."""
        return bool(self._kept)

    def open(self, assignment: Assignment) -> AbstractContextManager[RoundTransfer]:
        """See :meth:`Store.open`."""
        return nullcontext(_MemberRound(self.members))

    def reading(self) -> AbstractContextManager[None]:
        """See :meth:`Store.reading`."""
        return nullcontext()

    @torch.no_grad()
    def keep(self) -> None:
        """See :meth:`Store.keep`."""
        self._make_room()
        _copy(self.members, self._kept)

    @torch.no_grad()
    def recall(self) -> None:
        """See :meth:`Store.recall`."""
        if self._kept:
            _copy(self._kept, self.members)
        self._kept = {}

    def write(self, path: Path) -> None:
        """See :meth:`Store.write`; rank 0 writes the file."""
        whole = {name: part for name, part in self._everyones() if self.comm.is_main}

        def put() -> None:
            with replace_file(path) as new:
                write_tensors(new, whole)

        self.comm.on_main(put)

    def _everyones(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors of all members, member by member, on every rank."""
        size = self.comm.size
        for i in range(self.assignment.num_subnets):
            selection = Selection(self.spec, self.assignment, i)
            for name, like in model_tensors(self.model).items():
                layout = self.spec.layouts[name]
                if not selection.holds(layout):
                    continue
                counts = [selection.numel(layout) if i % size == r else 0 for r in range(size)]
                own = self.members[i][name] if i in self.members else like.detach().new_empty(0)
                part = self.comm.gather(own.reshape(-1).to(self.comm.device), counts)[i % size]
                yield f"members.{i}.{name}", part.view(selection.shape(layout))

    def write_part(self, path: Path) -> None:
        """See :meth:`Store.write_part`."""
        write_tensors(path, _named(self.members))

    def write_kept(self, path: Path) -> None:
        """See :meth:`Store.write_kept`."""
        write_tensors(path, _named(self._kept))

    def read(self, paths: Sequence[Path]) -> None:
        """See :meth:`Store.read`."""
        self._read(paths, self.members)

    def read_kept(self, paths: Sequence[Path]) -> None:
        """See :meth:`Store.read_kept`."""
        self._make_room()
        self._read(paths, self._kept)

    @torch.no_grad()
    def _read(self, paths: Sequence[Path], members: dict[int, Member]) -> None:
        wanted = {
            f"members.{i}.{name}"
            for i in range(self.assignment.num_subnets)
            for name in model_tensors(self.model)
            if Selection(self.spec, self.assignment, i).holds(self.spec.layouts[name])
        }
        if differ := sorted(wanted ^ set(tensor_names(paths))):
            raise CheckpointError(
                f"{paths[0].parent} is of another ensemble",
                got=", ".join(f"{n} {'missing' if n in wanted else 'there'}" for n in differ[:5]),
                remedy="use the model and the number of members that it was trained with",
            )
        into = _named(members)
        for name, tensor in _read_some(paths, into):
            if tensor.shape != into[name].shape:
                raise CheckpointError(
                    f"{paths[0].parent} is of another ensemble",
                    got=f"{name} {tuple(tensor.shape)}",
                    expected=tuple(into[name].shape),
                )
            into[name].copy_(tensor)

    def _make_room(self) -> None:
        if not self._kept:
            self._kept = {
                i: {name: torch.empty_like(tensor) for name, tensor in member.items()}
                for i, member in self.members.items()
            }


class _MemberRound:
    def __init__(self, members: Mapping[int, Member]) -> None:
        self._members, self._order = members, iter(members)

    @torch.no_grad()
    def load(self, subnets: Sequence[int], out: Mapping[str, Tensor]) -> None:
        for place, subnet in enumerate(subnets):
            for name, tensor in self._members[subnet].items():
                out[name][place].copy_(tensor)

    @torch.no_grad()
    def save(self, part: Mapping[str, Tensor]) -> None:
        for name, tensor in self._members[next(self._order)].items():
            tensor.copy_(part[name])

    def finish(self) -> None:
        pass


class MemberStates(CarriedState):
    """The optimiser state of every member, apart from each other and never reset.

    Args:
        spec: The partition spec of the model that they are cut from.
        parameters: Its parameters by full name.
        device: Where the state lives.
        own: The members of this rank, in order.
    """

    def __init__(
        self,
        spec: PartitionSpec,
        parameters: Mapping[str, Tensor],
        device: torch.device,
        own: Sequence[int],
    ) -> None:
        super().__init__(spec, parameters, device)
        self._own, self._states = own, dict[int, State]()

    def cut(self, subnet: int) -> State:
        """The state of one member's parameters; empty before the first merge."""
        return {
            name: {key: v.clone() if isinstance(v, Tensor) else v for key, v in entry.items()}
            for name, entry in self._states.get(subnet, {}).items()
        }

    def merge(self, states: Sequence[State]) -> None:
        """Takes back the states of this rank's members, in order."""
        self._states = dict(zip(self._own, states, strict=True))

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's members' state, for a checkpoint: ``i/key/name`` of each tensor."""
        return {
            f"{i}/{key}/{name}": torch.as_tensor(value)
            for i, state in self._states.items()
            for name, entry in state.items()
            for key, value in entry.items()
        }

    def read(self, paths: Sequence[Path]) -> None:
        """Takes what :meth:`state_dict` gave, of one rank or several, from files."""
        states: dict[int, State] = {i: {} for i in self._own}
        wanted = [full for full in tensor_names(paths) if int(full.partition("/")[0]) in states]
        for full, tensor in _read_some(paths, wanted):
            i, key, name = full.split("/", 2)
            states[int(i)].setdefault(name, {})[key] = tensor.to(self.device)
        self._states = states


def _named(members: Mapping[int, Member]) -> dict[str, Tensor]:
    return {f"members.{i}.{n}": t for i, member in members.items() for n, t in member.items()}


def _copy(source: Mapping[int, Member], target: Mapping[int, Member]) -> None:
    for i, member in source.items():
        for name, tensor in member.items():
            target[i][name].copy_(tensor)


def _read_some(paths: Sequence[Path], wanted: Container[str]) -> Iterator[tuple[str, Tensor]]:
    """The tensors with the wanted names, from whichever file they are in."""
    for path in paths:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                if name in wanted:
                    yield name, file.get_tensor(name)
