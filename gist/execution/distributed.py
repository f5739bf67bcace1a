"""Subnets spread over ranks: the global parameters in shards, optimiser state along with them."""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gist.errors import ConfigError
from gist.execution.comm import Comm
from gist.execution.initialise import has_no_memory, place_model
from gist.execution.mapped import MODEL_FILE, MappedStore
from gist.execution.mapped_file import MappedFile
from gist.execution.partfiles import read_rows, with_rows
from gist.execution.shards import Part, Shards
from gist.execution.tensorfile import FileLayout, replace_file, write_tensors
from gist.partition.assignment import Assignment
from gist.partition.optim_state import CarriedState
from gist.partition.spec import PartitionSpec, model_tensors
from gist.partition.transfer import Selection


class ShardedStore:
    """The global parameters and buffers, spread over ranks; no rank has all of them.

    Every rank is home to ``1 / W`` of every tensor's rows (:class:`~gist.execution.shards.Shards`).
    The model that it was made from is left without memory, on the ``meta`` device:
    :meth:`assembled` gives a whole one.

    Args:
        model: The global model: rank 0's values are taken. On the ``meta`` device it is initialised
            as :class:`~gist.execution.mapped.MappedStore` does, in a file that one rank of each
            machine makes in the folder for temporary files, and that is removed again.
        spec: Its partition spec.
        comm: The ranks.
        device: Where subnets are made and the shards live.
        seed: Of the initialisation, where the model has no values yet.

    Attributes:
        shards: What this rank has.
    """

    overlaps = False

    def __init__(
        self,
        model: nn.Module,
        spec: PartitionSpec,
        comm: Comm,
        device: torch.device,
        *,
        seed: int = 0,
    ) -> None:
        self.model, self.spec, self.comm, self.device = model, spec, comm, device
        tensors = model_tensors(model)
        self.layout = FileLayout.of(tensors)
        self.shards = Shards(comm, spec, tensors, device)
        self._kept: dict[str, Any] | None = None
        if comm.from_main(has_no_memory(model)):
            if _is_spread(model):
                raise ConfigError(
                    "the model's values are spread over the workers, by an earlier trainer",
                    remedy="give rank 0 what that trainer's gather_model() returns there, and the "
                    "other workers the model as it is",
                )
            self._initialise(seed)
        else:
            self.shards.fill(tensors.__getitem__)
        if not _is_spread(model):
            model.register_state_dict_pre_hook(_refuse_state)  # type: ignore[no-untyped-call]
        for own in model_tensors(model).values():
            if not own.is_meta:
                _forget(own)

    def _initialise(self, seed: int) -> None:
        """Draws the values in a file, of which every rank of a machine takes its rows."""
        here = int(os.environ.get("LOCAL_RANK", "0"))
        folder: str | None = None
        try:
            if here == 0:
                folder = tempfile.mkdtemp(prefix="gist-initial-")
                store = MappedStore(copy.deepcopy(self.model), self.spec, Path(folder), seed=seed)
                store.write(Path(folder) / MODEL_FILE)
                del store
            groups = self.comm.gather_values([_machine(), folder])
            place = next(path for machine, path in groups if path and machine == _machine())
            file = MappedFile(Path(place) / MODEL_FILE, self.layout)
            self.comm.gather_values(None)  # all have mapped it: its name can go
        finally:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
        self._read_rows_of(file)

    @torch.no_grad()
    def _read_rows_of(self, file: MappedFile) -> None:
        for name, own in self.shards.tensors.items():
            home, rows, whole = self.shards.homes[name], self.shards.rows(name), file.tensors[name]
            if home is None or rows is None:
                own.copy_(whole)
            elif home.of_unit:
                own.copy_(whole.unsqueeze(0)[rows])
            else:
                own.copy_(whole.narrow(home.dim, int(rows[0]) if len(rows) else 0, len(rows)))
            file.drop()

    @property
    def has_kept(self) -> bool:
        """See :attr:`Store.has_kept`."""
        return self._kept is not None

    @contextlib.contextmanager
    def open(self, assignment: Assignment) -> Iterator[ShardedRound]:
        """See :meth:`Store.open`; all ranks take part."""
        yield ShardedRound(self.shards, assignment)

    def reading(self) -> contextlib.AbstractContextManager[None]:
        """See :meth:`Store.reading`."""
        return contextlib.nullcontext()

    def keep(self) -> None:
        """See :meth:`Store.keep`."""
        self._kept = None  # makes room first
        self._kept = self.shards.copy()

    def recall(self) -> None:
        """See :meth:`Store.recall`."""
        if self._kept is not None:
            self.shards.restore(self._kept)
        self._kept = None

    def write(self, path: Path) -> None:
        """See :meth:`Store.write`; rank 0 writes the file, and never has all of it in memory."""
        with contextlib.ExitStack() as stack:
            files: list[MappedFile] = []

            def create() -> None:
                new = stack.enter_context(replace_file(path))
                files.append(MappedFile.create(new, self.layout))

            self.comm.on_main(create)  # all of its room on the disk is taken here
            self._stream(files[0].tensors if files else None, files[0] if files else None)
            if files:
                files[0].sync()
        self.comm.gather_values(None)  # it is there

    @torch.no_grad()
    def _stream(self, into: Mapping[str, Tensor] | None, file: MappedFile | None = None) -> None:
        """Fills whole tensors on rank 0."""
        for name, blocks in self.shards.blocks():
            home = self.shards.homes[name]
            for rows, entries in blocks:
                assert into is not None, "rank 0 alone gets any"
                tensor = into[name]
                if rows is None or home is None:
                    tensor.copy_(entries)
                    continue
                tensor = tensor.unsqueeze(0) if home.of_unit else tensor
                tensor.index_copy_(home.dim, rows.to(tensor.device), entries.to(tensor.device))
            if file is not None:
                file.drop()

    def write_part(self, path: Path) -> None:
        """See :meth:`Store.write_part`."""
        write_tensors(path, with_rows(self.shards.tensors, self.shards.all_rows()))

    def write_kept(self, path: Path) -> None:
        """See :meth:`Store.write_kept`."""
        assert self._kept is not None, "something is kept"
        now = self.shards.view()
        self.shards.restore(self._kept)
        try:
            self.write_part(path)
        finally:
            self.shards.restore(now)

    def read(self, paths: Sequence[Path]) -> None:
        """See :meth:`Store.read`."""
        self.shards.clear()
        shards = self.shards
        read_rows(paths, shards.tensors, shards.homes, shards.all_rows())

    def read_kept(self, paths: Sequence[Path]) -> None:
        """See :meth:`Store.read_kept`."""
        now = self.shards.view()
        self.read(paths)
        self._kept = self.shards.view()
        self.shards.restore(now)

    def assembled(self) -> nn.Module | None:
        """The whole model as it is now, a new one in memory, on rank 0; None on the others."""
        model: nn.Module | None = None
        if self.comm.is_main:
            model = copy.deepcopy(self.model)
            hooks = model._state_dict_pre_hooks
            for key in [key for key, hook in hooks.items() if hook is _refuse_state]:
                del hooks[key]
            empty = {
                name: torch.empty_like(tensor, device=self.device)
                for name, tensor in model_tensors(self.model).items()
            }
            place_model(model, empty)
        self._stream(
            None if model is None else {n: t.detach() for n, t in model_tensors(model).items()}
        )
        return model

    def take(self, model: nn.Module | None, names: Sequence[str]) -> None:
        """Takes over some tensors of a model on rank 0."""
        tensors = {} if model is None else model_tensors(model)
        self.shards.fill(tensors.__getitem__, names)


class ShardedRound:
    """One round's traffic between ranks; see :class:`~gist.execution.store.RoundTransfer`.

    Args:
        shards: Where the tensors live.
        assignment: Which units each subnet holds.
    """

    def __init__(self, shards: Shards, assignment: Assignment) -> None:
        self._shards, self._assignment = shards, assignment
        m, comm = assignment.num_subnets, shards.comm
        self._selections = [Selection(shards.spec, assignment, i) for i in range(m)]
        own = comm.subnets(m)
        self._parts = dict(zip(own, shards.deal(self._selections), strict=True))
        self._saved: list[Part] = []
        self._own = list(own)

    @torch.no_grad()
    def load(self, subnets: Sequence[int], out: Mapping[str, Tensor]) -> None:
        """See :meth:`RoundTransfer.load`."""
        for place, subnet in enumerate(subnets):
            for name, tensor in self._parts.pop(subnet).items():
                out[name][place].copy_(tensor)

    def save(self, part: Mapping[str, Tensor]) -> None:
        """See :meth:`RoundTransfer.save`."""
        alone = len(self._own) == 1  # its program trains no other before this is put back
        self._saved.append(
            dict(part) if alone else {name: tensor.clone() for name, tensor in part.items()}
        )

    def finish(self) -> None:
        """See :meth:`RoundTransfer.finish`; all ranks take part."""
        self._shards.collect(self._assignment, self._selections, self._saved)


class ShardedState(CarriedState):
    """Optimiser state that is spread over ranks like the parameters it belongs to.

    Args:
        spec: The partition spec of the model.
        parameters: The global parameters by full name; their shapes and dtypes count.
        device: Where the state lives.
        comm: The ranks.
    """

    def __init__(
        self,
        spec: PartitionSpec,
        parameters: Mapping[str, Tensor],
        device: torch.device,
        comm: Comm,
    ) -> None:
        super().__init__(spec, parameters, device)
        self.comm = comm
        self.shards: Shards | None = None
        self._selections: list[Selection] = []
        self._parts: dict[int, Part] = {}

    def open(self, assignment: Assignment) -> None:
        """See :meth:`CarriedState.open`; all ranks take part."""
        super().open(assignment)
        self._parts = {}
        if self.shards is None:
            return
        m = assignment.num_subnets
        self._selections = [Selection(self.spec, assignment, i) for i in range(m)]
        dealt = self.shards.deal(self._selections)
        self._parts = dict(zip(self.comm.subnets(m), dealt, strict=True))

    def _part(self, subnet: int) -> Mapping[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self._parts.get(subnet, {}).items()}

    def _merge(self, parts: Sequence[Mapping[str, Tensor]]) -> None:
        assert self.assignment is not None, "a round is open"
        assert self.shards is not None, "there is something to merge"
        if not self._selections:
            m = self.assignment.num_subnets
            self._selections = [Selection(self.spec, self.assignment, i) for i in range(m)]
        self.shards.collect(self.assignment, self._selections, [dict(part) for part in parts])
        self.tensors = self.shards.tensors
        self._parts, self._selections = {}, []

    def _grow(self, names: Any) -> None:
        if self.shards is None:
            everyones = self.comm.gather_values(sorted(names))
            self.room_for({name for each in everyones for name in each})
        elif new := sorted(set(names) - self.tensors.keys()):
            raise ConfigError(
                "optimizer_state='carry' over several workers carries what the first round had",
                got=f"new: {', '.join(new[:3])}",
                remedy="leave requires_grad as it is in a run, or use optimizer_state='reset'",
            )

    def room_for(self, names: Any) -> None:
        """See :meth:`CarriedState.room_for`."""
        self.spec = self._spec_of(sorted(names))
        like = {full: torch.empty(0, dtype=self._dtype(full)) for full in self.spec.layouts}
        self.shards = Shards(self.comm, self.spec, like, self.device)
        self.tensors = self.shards.tensors

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's part of everything, for a checkpoint."""
        if self.shards is None:
            return {}
        return with_rows(self.shards.tensors, self.shards.all_rows())


def _refuse_state(model: nn.Module, *args: Any) -> None:
    raise ConfigError(
        "the model's values are spread over the workers: here it has none",
        remedy="call trainer.gather_model() by all workers, which returns it on rank 0, or "
        "trainer.save(folder)",
    )


def _is_spread(model: nn.Module) -> bool:
    """Whether a store has taken a model's values."""
    return any(hook is _refuse_state for hook in model._state_dict_pre_hooks.values())


def _forget(own: Tensor) -> None:
    """Puts a tensor of a model on the ``meta`` device; it keeps its identity and ties."""
    empty: Tensor = torch.empty_like(own.detach(), device="meta")
    if isinstance(own, nn.Parameter):
        empty = nn.Parameter(empty, requires_grad=own.requires_grad)
        empty.__dict__.update(own.__dict__)
    torch.utils.swap_tensors(own, empty)  # type: ignore[no-untyped-call]


def _machine() -> str:
    return f"{os.uname().nodename}/{os.environ.get('GROUP_RANK', '0')}"
