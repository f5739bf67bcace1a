"""Optimiser state between rounds: dropped (the papers), or carried along with its parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

    Tensors shaped like their parameter (moments, momentum) follow its layout; ``step`` counts are
    one number per parameter, the largest of its subnets. An entry that no subnet has held yet has
    no second moment, and a step count that says otherwise: Adam would take over-long first steps
    there (a factor of ``(1-β1)/sqrt(1-β2)``). It starts from the mean of the entries that have one.

    Args:
        spec: The partition spec of the model.
        parameters: The global parameters by full name.
    """

    def __init__(self, spec: PartitionSpec, parameters: Mapping[str, Tensor]) -> None:
        self.spec = spec
        self.parameters = parameters
        self.moments: dict[str, dict[str, Tensor]] = {}
        self.steps: dict[str, Tensor] = {}
        self.seen: dict[str, Tensor] = {}

    def cut(self, assignment: Assignment, subnet: int) -> State:
        """The state of one subnet's parameters; empty before the first merge."""
        state: State = {
            name: {"step": step.to(self.parameters[name].device, copy=True)}
            for name, step in self.steps.items()
        }
        seen = extract(self.seen, self.spec, assignment, subnet)
        for key, tensors in self.moments.items():
            for name, part in extract(tensors, self.spec, assignment, subnet).items():
                if key in _SECOND_MOMENTS and not bool(seen[name].all()):
                    part = torch.where(seen[name], part, tensors[name][self.seen[name]].mean())
                state.setdefault(name, {})[key] = part
        return {name: entry for name, entry in state.items() if name in seen}

    def merge(self, assignment: Assignment, parts: Sequence[State]) -> None:
        """Takes back the trained subnets' states, in the order of the subnets.

        Raises:
            ConfigError: the optimiser keeps state that is neither a step count nor shaped like its
                parameter.
        """
        keys = {key for part in parts for entry in part.values() for key in entry}
        for key in sorted(keys):
            held = [{n: e[key] for n, e in part.items() if key in e} for part in parts]
            if key == "step":
                for part in held:
                    for name, step in part.items():
                        step = torch.as_tensor(step, dtype=torch.float32).detach().cpu()
                        self.steps[name] = torch.maximum(step, self.steps.get(name, step))
                continue
            tensors = self.moments.setdefault(key, {})
            named: list[str] = []
            for name, value in {n: v for part in held for n, v in part.items()}.items():
                whole = self.parameters[name]
                if not isinstance(value, Tensor) or value.dim() != whole.dim():
                    shape = (
                        tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                    )
                    raise ConfigError(
                        f"optimizer_state='carry' cannot carry {key!r} of {name}",
                        got=shape,
                        expected="a step count, or a tensor shaped like its parameter",
                        remedy="use optimizer_state='reset' with this optimiser",
                    )
                named.append(name)
                tensors.setdefault(name, torch.zeros_like(whole))
                self.seen.setdefault(name, torch.zeros_like(whole, dtype=torch.bool))
            merge({name: tensors[name] for name in named}, self.spec, assignment, held)
            trained = [
                {n: torch.ones_like(t, dtype=torch.bool) for n, t in p.items()} for p in held
            ]
            merge({name: self.seen[name] for name in named}, self.spec, assignment, trained)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything as flat named tensors, for a checkpoint."""
        flat = {f"{key}/{n}": t for key, part in self.moments.items() for n, t in part.items()}
        flat |= {f"step/{name}": step for name, step in self.steps.items()}
        return flat | {f"seen/{name}": seen for name, seen in self.seen.items()}

    def load_state_dict(self, flat: Mapping[str, Tensor]) -> None:
        """Takes what :meth:`state_dict` gave."""
        self.moments, self.steps, self.seen = {}, {}, {}
        for full, tensor in flat.items():
            key, _, name = full.partition("/")
            if key == "step":
                self.steps[name] = tensor
                continue
            tensor = tensor.to(self.parameters[name].device)
            kept = self.seen if key == "seen" else self.moments.setdefault(key, {})
            kept[name] = tensor
