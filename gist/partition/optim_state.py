"""Optimiser state between rounds: dropped (the papers), or carried along with its parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gist.errors import ConfigError
from gist.partition.assignment import Assignment
from gist.partition.spec import PartitionSpec
from gist.partition.transfer import extract, merge

State = dict[str, dict[str, Any]]
"""Optimiser state of one subnet: parameter name -> key (``exp_avg``, ``step``, …) -> value."""

_SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg")


class CarriedState:
    """The optimiser state of the global model, cut and merged like the parameters it belongs to.

    Tensors shaped like their parameter (moments, momentum) follow its layout; a ``step`` count is
    one number per parameter, which all subnets share. An entry that no subnet has held yet has no
    second moment, and a step count that says otherwise: Adam would take over-long first steps there
    (a factor of ``(1-β1)/sqrt(1-β2)``). It starts from the mean of the subnet's entries that have
    one.

    Args:
        spec: The partition spec of the model.
        parameters: The global parameters by full name.
        device: Where the state lives; by default where the parameters are.

    Attributes:
        tensors: By ``key/name`` of the parameter, such as ``exp_avg/convs.0.bias``; ``seen/name``
            says which entries a subnet has held so far.
    """

    def __init__(
        self,
        spec: PartitionSpec,
        parameters: Mapping[str, Tensor],
        device: torch.device | None = None,
    ) -> None:
        self.parameters = parameters
        self.device = device or next(iter(parameters.values())).device
        self.model_spec = self.spec = spec
        self.tensors: dict[str, Tensor] = {}
        self.assignment: Assignment | None = None

    def open(self, assignment: Assignment) -> None:
        """Begins a round: what is cut and merged next is of this assignment."""
        self.assignment = assignment

    def cut(self, subnet: int) -> State:
        """The state of one subnet's parameters; empty before the first merge."""
        part = self._part(subnet)
        state: State = {}
        for full, value in part.items():
            key, _, name = full.partition("/")
            if key == "seen":
                continue
            seen = part[f"seen/{name}"]
            if key in _SECOND_MOMENTS and not bool(seen.all()):
                value = torch.where(seen, value, value[seen].mean() if bool(seen.any()) else 0.0)
            state.setdefault(name, {})[key] = value.to(self.device)
        return state

    def merge(self, states: Sequence[State]) -> None:
        """Takes back the trained subnets' states, in the order of the subnets.

        Raises:
            ConfigError: the optimiser keeps state that is neither a step count nor shaped like its
                parameter.
        """
        parts = []
        for state in states:
            part: dict[str, Tensor] = {}
            for name, entry in state.items():
                for key, value in entry.items():
                    part[f"{key}/{name}"] = self._checked(key, name, value)
                    if key != "step":
                        part[f"seen/{name}"] = torch.ones_like(value, dtype=torch.bool)
            parts.append(part)
        self._grow({full for part in parts for full in part})
        self._merge(parts)

    def _checked(self, key: str, name: str, value: Any) -> Tensor:
        if key == "step":
            return torch.as_tensor(value, dtype=torch.float32).detach().to(self.device)
        if not isinstance(value, Tensor) or value.dim() != self.parameters[name].dim():
            raise ConfigError(
                f"optimizer_state='carry' cannot carry {key!r} of {name}",
                got=tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__,
                expected="a step count, or a tensor shaped like its parameter",
                remedy="use optimizer_state='reset' with this optimiser",
            )
        return value

    def _part(self, subnet: int) -> Mapping[str, Tensor]:
        """What a subnet holds of :attr:`tensors`, fresh."""
        assert self.assignment is not None, "a round is open"
        return extract(self.tensors, self.spec, self.assignment, subnet)

    def _merge(self, parts: Sequence[Mapping[str, Tensor]]) -> None:
        """Puts back what subnets hold of :attr:`tensors`."""
        assert self.assignment is not None, "a round is open"
        merge(self.tensors, self.spec, self.assignment, parts)

    def _grow(self, names: Iterable[str]) -> None:
        """Makes room for tensors of these names, where there is none yet."""
        new = sorted(set(names) - self.tensors.keys())
        if new:
            self.spec = self._spec_of([*self.tensors, *new])
            for full in new:
                shape, dtype = self.spec.layouts[full].shape, self._dtype(full)
                like = self.parameters[full.partition("/")[2]]
                self.tensors[full] = like.new_zeros(shape, dtype=dtype, device=self.device)

    def _spec_of(self, names: Iterable[str]) -> PartitionSpec:
        """How such tensors follow the units."""
        layouts = {}
        for full in names:
            key, _, name = full.partition("/")
            layout = replace(self.model_spec.layouts[name], name=full)
            layouts[full] = replace(layout, shape=(), slots=()) if key == "step" else layout
        used = {group for layout in layouts.values() for group in layout.groups}
        groups = {name: group for name, group in self.model_spec.groups.items() if name in used}
        return PartitionSpec(groups=groups, layouts=layouts)

    def _dtype(self, full: str) -> torch.dtype:
        key, _, name = full.partition("/")
        known = {"step": torch.float32, "seen": torch.bool}
        return known.get(key, self.parameters[name].dtype)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything, for a checkpoint."""
        return dict(self.tensors)

    def room_for(self, names: Iterable[str]) -> None:
        """Starts anew, with room for tensors of these names, for a checkpoint to be read."""
        self.tensors = {}
        self._grow(names)
