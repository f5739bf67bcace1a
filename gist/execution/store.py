"""Where the global parameters live, and how subnets' entries get out of there and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from gist.execution.partfiles import read_whole
from gist.execution.tensorfile import replace_file, write_tensors
from gist.partition.assignment import Assignment
from gist.partition.spec import PartitionSpec, model_tensors
from gist.partition.transfer import Merge, gather


class RoundTransfer(Protocol):
    """One round's traffic between a store and the subnets.

    One call at a time, from any thread.
    """

    def load(self, subnets: Sequence[int], out: Mapping[str, Tensor]) -> None:
        """Writes the entries of consecutive subnets of one shape.

        A subnet may be loaded before an earlier one is saved, or after: what is saved early is
        nothing that another subnet of the round holds.

        Args:
            subnets: Which.
            out: Tensors by full name, with one leading dim over ``subnets``; those of units that
                they do not hold are left out.
        """

    def save(self, part: Mapping[str, Tensor]) -> None:
        """Takes the next subnet's trained tensors; what it gets may be overwritten afterwards."""

    def finish(self) -> None:
        """Puts back everything that is still to be put back."""


class Store(Protocol):
    """Where the global parameters and buffers live between rounds, and one copy of the best ones.

    The model's parameters and buffers are views of what the store holds, at any time.
    """

    @property
    def device(self) -> torch.device:
        """Where subnets are made."""

    @property
    def overlaps(self) -> bool:
        """Whether loading and saving are to happen while other subnets of the round train."""

    @property
    def has_kept(self) -> bool:
        """Whether a copy is kept."""

    def open(self, assignment: Assignment) -> AbstractContextManager[RoundTransfer]:
        """The traffic of one round."""

    def reading(self) -> AbstractContextManager[None]:
        """To be held while the model itself is used, as in an evaluation."""

    def keep(self) -> None:
        """Keeps a copy of everything as it is now, in place of what was kept before."""

    def recall(self) -> None:
        """Puts back what was kept, if anything; it is no longer kept then."""

    def write(self, path: Path) -> None:
        """Writes everything as it is now as a safetensors file, complete or not at all."""

    def write_kept(self, path: Path) -> None:
        """Writes what of the copy is in this process."""

    def write_part(self, path: Path) -> None:
        """Writes what of everything is in this process; with the other ranks' parts, all of it."""

    def read(self, paths: Sequence[Path]) -> None:
        """Takes over a safetensors file, or the parts that ranks wrote.

        Raises:
            CheckpointError: it is missing, damaged, or of another model.
        """

    def read_kept(self, paths: Sequence[Path]) -> None:
        """Takes over a safetensors file, or parts, as what was kept."""


class MemoryStore:
    """The model's own tensors, in memory; a copy of them where the best ones are kept.

    Args:
        model: The global model; its tensors are read and changed in place.
        spec: Its partition spec.
    """

    overlaps = False  # the copies would take the cores that train

    def __init__(self, model: nn.Module, spec: PartitionSpec) -> None:
        self.model, self.spec = model, spec
        self._kept: dict[str, Tensor] = {}

    @property
    def has_kept(self) -> bool:
        """See :attr:`Store.has_kept`."""
        return bool(self._kept)

    @property
    def device(self) -> torch.device:
        """See :attr:`Store.device`."""
        return next(self.model.parameters()).device

    def open(self, assignment: Assignment) -> AbstractContextManager[RoundTransfer]:
        """See :meth:`Store.open`."""
        return nullcontext(_InMemory(model_tensors(self.model), self.spec, assignment))

    def reading(self) -> AbstractContextManager[None]:
        """See :meth:`Store.reading`."""
        return nullcontext()

    @torch.no_grad()
    def keep(self) -> None:
        """See :meth:`Store.keep`."""
        self._make_room()
        for name, tensor in model_tensors(self.model).items():
            self._kept[name].copy_(tensor)

    @torch.no_grad()
    def recall(self) -> None:
        """See :meth:`Store.recall`."""
        if self._kept:
            for name, tensor in model_tensors(self.model).items():
                tensor.copy_(self._kept[name])
        self._kept.clear()

    def write(self, path: Path) -> None:
        """See :meth:`Store.write`."""
        with replace_file(path) as new:
            write_tensors(new, model_tensors(self.model))

    def write_kept(self, path: Path) -> None:
        """See :meth:`Store.write_kept`."""
        write_tensors(path, self._kept)

    def write_part(self, path: Path) -> None:
        """See :meth:`Store.write_part`."""
        self.write(path)

    def read(self, paths: Sequence[Path]) -> None:
        """See :meth:`Store.read`."""
        read_whole(paths, model_tensors(self.model), self.spec)

    def read_kept(self, paths: Sequence[Path]) -> None:
        """See :meth:`Store.read_kept`."""
        self._make_room()
        read_whole(paths, self._kept, self.spec)

    def _make_room(self) -> None:
        if not self._kept:
            tensors = model_tensors(self.model)
            self._kept = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}


class _InMemory:
    def __init__(
        self, tensors: Mapping[str, Tensor], spec: PartitionSpec, assignment: Assignment
    ) -> None:
        self.tensors, self.spec = tensors, spec
        self.merging = Merge(tensors, spec, assignment)

    @torch.no_grad()
    def load(self, subnets: Sequence[int], out: Mapping[str, Tensor]) -> None:
        for name, kept in out.items():
            layout, tensor = self.spec.layouts[name], self.tensors[name].detach()
            for place, subnet in enumerate(subnets):
                gather(tensor, self.merging.selections[subnet].index(layout), out=kept[place])

    def save(self, part: Mapping[str, Tensor]) -> None:
        self.merging.add(part)

    def finish(self) -> None:
        self.merging.finish()
