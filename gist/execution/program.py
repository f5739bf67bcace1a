"""What trains: one subnet, or several of one shape as one grouped model; built once, refilled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gist.config import TrainConfig
from gist.execution.local import make_optimizer
from gist.partition.optim_state import State
from gist.partition.spec import model_tensors

_ZEROED = ("adam", "adamw", "sgd")
"""Optimisers whose state is all zeros at the start."""


class Program:
    """A narrow or grouped model with its optimiser, whose tensors are refilled round by round.

    Args:
        module: One subnet, or the grouped form of ``size`` subnets.
        size: Subnets that are trained at once.
        grouped: Whether the tensors of ``module`` have a leading dim over the subnets.
        config: Run settings.

    Attributes:
        tensors: Parameters and buffers by full name, each ``[size, *shape of one subnet's]``;
            views of the module's own.
    """

    def __init__(self, module: nn.Module, *, size: int, grouped: bool, config: TrainConfig) -> None:
        self.module, self.size, self.grouped, self.config = module, size, grouped, config
        self.parameters = dict(module.named_parameters())
        self.tensors: dict[str, Tensor] = {
            name: tensor.detach() if grouped else tensor.detach().unsqueeze(0)
            for name, tensor in model_tensors(module).items()
        }
        self.call: Any = torch.compile(module) if config.compile else module
        self.optimizer = make_optimizer(config, module.parameters())
        self._wanted = self._trainable()

    def part(self, index: int) -> dict[str, Tensor]:
        """Views of one subnet's tensors."""
        return {name: tensor[index] for name, tensor in self.tensors.items()}

    def _trainable(self) -> list[str]:
        return [name for name, p in self.parameters.items() if p.requires_grad]

    def restart(self, like: Mapping[str, Tensor], states: Sequence[State] | None) -> None:
        """Starts a round: training mode, a fresh optimiser or one with the given states.

        Args:
            like: The global tensors, whose ``requires_grad`` is taken over.
            states: Optimiser states of the subnets, or None for a fresh start.
        """
        self.module.train()
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(like[name].requires_grad)
        if self._trainable() != self._wanted or self.config.optimizer not in _ZEROED:
            self.optimizer = make_optimizer(self.config, self.module.parameters())
            self._wanted = self._trainable()
        if states is None:
            self._zero_state()
        else:
            for name, parameter in self.parameters.items():
                entries = [state.get(name) for state in states]
                self.optimizer.state[parameter] = {
                    key: self._joined(parameter, [entry[key] for entry in entries if entry])
                    for key in entries[0] or ()
                }

    def _zero_state(self) -> None:
        # In place: the memory of the moments is used again.
        for entry in self.optimizer.state.values():
            for value in entry.values():
                if isinstance(value, Tensor):
                    value.zero_()

    def _joined(self, parameter: Tensor, values: list[Any]) -> Any:
        if not self.grouped or not isinstance(values[0], Tensor) or values[0].dim() == 0:
            return values[0]  # one for all subnets, such as a step count
        return torch.stack(values)

    def state(self, index: int) -> State:
        """A copy of one subnet's optimiser state."""

        def own(value: Any, parameter: Tensor) -> Any:
            if not isinstance(value, Tensor):
                return value
            stacked = self.grouped and value.shape == parameter.shape
            return (value[index] if stacked else value).clone()

        return {
            name: {key: own(v, parameter) for key, v in self.optimizer.state[parameter].items()}
            for name, parameter in self.parameters.items()
        }
