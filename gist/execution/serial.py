"""The serial executor: one subnet after the other. The reference for every other executor."""

from __future__ import annotations

import time
from collections.abc import Hashable, Mapping

from torch import Tensor, nn

from gist.config import TrainConfig
from gist.errors import DivergedError
from gist.execution.executor import RoundReport
from gist.execution.local import make_optimizer, train_locally
from gist.execution.objective import Objective
from gist.partition.assignment import Assignment
from gist.partition.optim_state import CarriedState, State
from gist.partition.spec import PartitionSpec, model_tensors
from gist.partition.streams import seeded
from gist.partition.subnet import build_subnet, extract, merge
from gist.plan import RoundPlan

_KEPT_SHAPES = 16
"""Narrow modules that are kept for reuse; samplers with random sizes give ever new shapes."""


class SerialExecutor:
    """Runs the subnets of a round one after the other, on the model's own device.

    Subnets of equal shape share one narrow module, whose tensors are exchanged between rounds.

    Args:
        model: The global model; its parameters and buffers are updated in place.
        spec: Its partition spec.
        objective: Batches and loss.
        config: Run settings.
    """

    name = "serial"

    def __init__(
        self, model: nn.Module, spec: PartitionSpec, objective: Objective, config: TrainConfig
    ) -> None:
        self.spec, self.objective, self.config = spec, objective, config
        self.model = model
        self.tensors = model_tensors(model)
        self.device = next(model.parameters()).device
        self.carried: CarriedState | None = None
        if config.optimizer_state == "carry":
            self.carried = CarriedState(spec, dict(model.named_parameters()))
        self._modules: dict[Hashable, nn.Module] = {}

    def run_round(self, plan: RoundPlan, assignment: Assignment) -> RoundReport:
        """Extracts, trains and merges every subnet of one round.

        Raises:
            DivergedError: a subnet's loss is not finite; names the round and the subnet.
        """
        repartition = 0.0
        losses: list[float] = []
        parts: list[dict[str, Tensor]] = []
        states: list[State] = []
        for subnet in range(plan.num_subnets):
            start = time.perf_counter()
            module = self._load(assignment, subnet)
            repartition += time.perf_counter() - start
            losses.append(self._train(module, plan, assignment, subnet, states))
            parts.append({name: tensor.detach() for name, tensor in model_tensors(module).items()})

        start = time.perf_counter()
        merge(self.tensors, self.spec, assignment, parts)
        if self.carried is not None:
            self.carried.merge(assignment, states)
        repartition += time.perf_counter() - start
        loss = sum(losses) / len(losses)
        return RoundReport(train_loss=loss, repartition_seconds=repartition)

    def state_dict(self) -> dict[str, Tensor]:
        """The carried optimiser state; empty where it is reset."""
        return {} if self.carried is None else self.carried.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes what :meth:`state_dict` gave."""
        if self.carried is not None:
            self.carried.load_state_dict(state)

    def _load(self, assignment: Assignment, subnet: int) -> nn.Module:
        absent = [
            path
            for path, (group, unit) in self.spec.blocks.items()
            if subnet not in assignment.holders(group, unit)
        ]
        shape = (*sorted(assignment.widths(subnet).items()), *absent)
        if shape not in self._modules:
            if len(self._modules) >= _KEPT_SHAPES:
                self._modules.pop(next(iter(self._modules)))
            self._modules[shape] = build_subnet(
                self.model,
                self.spec,
                assignment,
                subnet,
                width_correction=self.config.width_correction,
            )
        module = self._modules[shape].train()
        parts = extract(self.tensors, self.spec, assignment, subnet)
        for name, tensor in model_tensors(module).items():
            tensor.data = parts[name]
            tensor.requires_grad_(self.tensors[name].requires_grad)
        return module

    def _train(
        self,
        module: nn.Module,
        plan: RoundPlan,
        assignment: Assignment,
        subnet: int,
        states: list[State],
    ) -> float:
        seed = self.config.seed
        optimizer = make_optimizer(self.config, module.parameters())
        parameters = dict(module.named_parameters())
        if self.carried is not None:
            for name, entry in self.carried.cut(assignment, subnet).items():
                optimizer.state[parameters[name]] = entry
        batches = self.objective.batches(
            seed=seed, round=plan.index, subnet=subnet, steps=plan.local_steps
        )
        with seeded("train", seed, plan.index, subnet, device=self.device):
            try:
                loss = train_locally(
                    module,
                    optimizer,
                    self.objective,
                    batches,
                    plan.rate_factors,
                    self.config.clip_norm,
                )
            except DivergedError as error:
                raise DivergedError(
                    f"round {plan.index}, subnet {subnet}: {error.what}",
                    got=error.got,
                    remedy=error.remedy,
                ) from None
        if self.carried is not None:
            states.append({n: dict(optimizer.state[p]) for n, p in parameters.items()})
        return loss
