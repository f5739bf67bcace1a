"""Where the global parameters live, and how subnets' entries get out of there and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from gist.partition.assignment import Assignment
from gist.partition.spec import PartitionSpec, model_tensors
from gist.partition.transfer import Merge, gather


class RoundTransfer(Protocol):
    """One round's traffic between a store and the subnets."""

    def load(self, subnets: Sequence[int], out: Mapping[str, Tensor]) -> None:
        """Writes the entries of consecutive subnets of one shape.

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
    """Where the global parameters and buffers live between rounds."""

    def open(self, assignment: Assignment) -> RoundTransfer:
        """The traffic of one round."""


class MemoryStore:
    """The model's own tensors, in memory.

    Args:
        model: The global model; its tensors are read and changed in place.
        spec: Its partition spec.
    """

    def __init__(self, model: nn.Module, spec: PartitionSpec) -> None:
        self.tensors, self.spec = model_tensors(model), spec

    def open(self, assignment: Assignment) -> RoundTransfer:
        """See :meth:`Store.open`."""
        return _InMemory(self.tensors, self.spec, assignment)


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
