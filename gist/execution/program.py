"""What trains: one subnet, or several of one shape as one grouped model; built once, refilled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

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
        parameters: The module's, by full name.
        optimizer: Of those that want gradients.
    """

    def __init__(self, module: nn.Module, *, size: int, grouped: bool, config: TrainConfig) -> None:
        self.module, self.size, self.grouped, self.config = module, size, grouped, config
        self.parameters = dict(module.named_parameters())
        self.call: Any = torch.compile(module) if config.compile else module
        self.optimizer = self._make_optimizer()
        self._wanted = self._trainable()
        self._sets: list[dict[str, Tensor]] = []

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers by full name, each ``[size, *shape of one subnet's]``.

        Views of the module's own, as they are now: a layer may have put another buffer in place.
        """
        return {
            name: tensor.detach() if self.grouped else tensor.detach().unsqueeze(0)
            for name, tensor in model_tensors(self.module).items()
        }

    def parts(self) -> list[dict[str, Tensor]]:
        """Views of each subnet's tensors."""
        tensors = self.tensors
        return [{name: t[place] for name, t in tensors.items()} for place in range(self.size)]

    def buffers(self, turn: int) -> dict[str, Tensor]:
        """One of two sets of tensors, by ``turn % 2``, for one to be filled while the other trains.

        The first is what the module had; the second is made when it is first asked for.
        """
        if not self._sets:
            # .data: autograd must not take what is filled for what it has seen in training.
            self._sets.append({name: tensor.data for name, tensor in self.tensors.items()})
        if turn % 2 and len(self._sets) == 1:
            self._sets.append({name: torch.empty_like(t) for name, t in self._sets[0].items()})
        return self._sets[turn % 2]

    def use(self, tensors: Mapping[str, Tensor]) -> None:
        """Makes a set of tensors the module's own; the optimiser's state stays as it is."""
        for name, own in model_tensors(self.module).items():
            own.data = tensors[name] if self.grouped else tensors[name][0]

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
            self.optimizer = self._make_optimizer()
            self._wanted = self._trainable()
        else:
            self._zero_state()
        for name, parameter in self.parameters.items():
            entries = [entry for state in states or () if (entry := state.get(name))]
            if entries:
                self.optimizer.state[parameter] = {
                    key: self._joined(key, [entry[key] for entry in entries]) for key in entries[0]
                }

    def _make_optimizer(self) -> Optimizer:
        """A fresh one; a factory is shown parameters that are shaped as those of one subnet.

        So it may tell weights from biases by their dims, as many do, and sees what it would see
        in a subnet on its own.
        """
        if not (self.grouped and callable(self.config.optimizer)):
            return make_optimizer(self.config, self.parameters.values())
        whole: dict[Any, nn.Parameter] = {
            nn.Parameter(p.detach()[0], requires_grad=p.requires_grad): p
            for p in self.parameters.values()
        }
        optimizer = make_optimizer(self.config, whole)
        for group in optimizer.param_groups:
            group["params"] = [whole[p] for p in group["params"]]
        for one in list(optimizer.state):  # some have a state from the start, as Adagrad
            entry = optimizer.state.pop(one)
            optimizer.state[whole[one]] = {
                key: self._joined(key, [value] * self.size) for key, value in entry.items()
            }
        return optimizer

    def _zero_state(self) -> None:
        # In place: the memory of the moments is used again.
        for entry in self.optimizer.state.values():
            for value in entry.values():
                if isinstance(value, Tensor):
                    value.zero_()

    def _joined(self, key: str, values: list[Any]) -> Any:
        if not self.grouped or key == "step" or not isinstance(values[0], Tensor):
            return values[0]  # one for all subnets
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
