"""An ensemble of subnets that are cut out once and never merged (GIST, table 7).

Shape legend: ``N`` nodes, ``C`` output columns, ``m`` members, ``W`` ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gist.baselines.memory import require_memory
from gist.config import TrainConfig
from gist.errors import ConfigError
from gist.execution.executor import Executor
from gist.execution.members import MemberStates, MemberStore
from gist.graph.data import GraphData
from gist.graph.links import LinkData
from gist.graph.objective import GraphObjective
from gist.history import TrainResult
from gist.metrics import mean_prediction
from gist.partition.samplers import Fixed
from gist.partition.subnet import build_subnet
from gist.partition.transfer import held_entries
from gist.partition.wiring import Wiring
from gist.plan import RoundPlan
from gist.trainer import GISTTrainer


def ensemble_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run, changed so that the units are dealt once and no optimiser is reset."""
    return {**settings, "sampler": Fixed(), "optimizer_state": "carry"}


class EnsembleTrainer(GISTTrainer):
    """Trains ``num_subnets`` narrow models apart, and predicts with all of them.

    The members are the subnets of round 0. Each trains as a subnet does, with its share of the
    budget, but nothing is ever merged: a round only says when the ensemble is evaluated. Its
    prediction is the mean of the members' class probabilities, summed in their order. Under
    torchrun, rank ``r`` trains and keeps the members ``r, r + W, ...``; what comes out does not
    depend on ``W``.

    A saved ``model.safetensors`` has the tensors of all members, named ``members.i.NAME``.

    Args:
        model: What the members are cut from, and left as it is; under torchrun rank 0's values are
            taken.
        data: As for :class:`~gist.trainer.GISTTrainer`.
        wiring: Likewise.
        config: Likewise; changed by :func:`ensemble_settings`.
        **settings: Likewise.

    Attributes:
        store: The members' tensors.

    Raises:
        ConfigError: a schedule of subnets, links to predict, or as for
            :class:`~gist.trainer.GISTTrainer`.
    """

    store: MemberStore
    data: GraphData

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        *,
        wiring: Wiring | None = None,
        config: TrainConfig | None = None,
        **settings: Any,
    ) -> None:
        if isinstance(data, LinkData):
            raise ConfigError(
                "an ensemble averages class probabilities, and members that never meet put out "
                "embeddings that have nothing in common",
                got="LinkData",
                remedy="use GISTTrainer, also for the full model and local SGD",
            )
        if config is None:
            settings = ensemble_settings(settings)
        else:
            config = replace(config, **ensemble_settings({}))
        super().__init__(model, data, wiring=wiring, config=config, **settings)
        assert isinstance(self.objective, GraphObjective)
        with self._as_found():  # members are narrower than the model, and may be scaled
            self.objective.choose_inference(self._subnet(0, filled=True), self._inference_limit())

    def member(self, index: int) -> nn.Module:
        """One of this worker's members as it is now: a new model, in evaluation mode.

        Raises:
            ConfigError: this worker has no such member.
        """
        if index not in self.store.members:
            raise ConfigError(
                "this worker has no such member",
                got=index,
                expected=", ".join(map(str, self.store.members)),
            )
        module = self._subnet(index, filled=False)
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        with torch.no_grad():
            for name, tensor in self.store.members[index].items():
                tensors[name].copy_(tensor)
        return module.eval()

    def _subnet(self, index: int, *, filled: bool) -> nn.Module:
        return build_subnet(
            self.model,
            self.spec,
            self.store.assignment,
            index,
            width_correction=self.config.width_correction,
            filled=filled,
        )

    @torch.no_grad()
    def predict(self) -> Tensor:
        """Logits of every node by the mean of the members' probabilities: ``[N, C]``."""
        with self._as_found():
            return mean_prediction(self.data.task, self._scores())

    def gather_model(self) -> nn.Module | None:
        """Refused.

        Raises:
            ConfigError: an ensemble is not one model.
        """
        raise ConfigError("an ensemble is not one model", remedy="ask for its member(i)")

    def _scores(self) -> Iterator[Tensor]:
        """Each member's scores ``[N, C]``, in order, on every rank."""
        assert isinstance(self.objective, GraphObjective)
        m, size = self.store.assignment.num_subnets, self.comm.size
        for first in range(0, m, size):
            there = min(size, m - first)
            index = first + self.comm.rank
            own = torch.empty(0, dtype=next(self.model.parameters()).dtype)
            if index < m:
                own = self.objective.predict(self.member(index))
            if size == 1:
                yield own
                continue
            shape = self.comm.from_main(list(own.shape))
            counts = [shape[0] * shape[1] if rank < there else 0 for rank in range(size)]
            own = own.to(self.comm.device).reshape(-1)
            for part in self.comm.gather(own, counts)[:there]:
                yield part.view(shape).to(self.device)

    def _metrics(self, recalibrate: RoundPlan | None = None) -> dict[str, float]:
        """Of the ensemble; BatchNorm statistics are the members' own, for nothing was merged."""
        assert isinstance(self.objective, GraphObjective)
        with torch.no_grad():
            scores = mean_prediction(self.data.task, self._scores())
        metrics: dict[str, float] = self.comm.on_main(partial(self.objective.measure, scores))
        return metrics

    def _check_subnets(self) -> None:
        if not isinstance(self.config.num_subnets, int):
            raise ConfigError(
                "an ensemble has one number of members",
                got=f"num_subnets={self.config.num_subnets}",
                expected="a number",
            )
        super()._check_subnets()

    def _make_store(self) -> MemberStore:
        require_memory(self.model, self.config)
        assert isinstance(self.config.num_subnets, int)
        assignment = self.config.sampler(
            self.spec.sizes, self.config.num_subnets, seed=self.config.seed, round=0
        )
        return MemberStore(self.model, self.spec, assignment, self.comm)

    def _executor_maker(self, wiring: Wiring | None) -> Callable[..., Executor]:
        parameters = dict(self.model.named_parameters())
        own = list(self.store.members)
        states = MemberStates(self.spec, parameters, self.device, own)
        return partial(super()._executor_maker(wiring), carried=states)

    def _result(self, peak_memory_bytes: int) -> TrainResult:
        names = [name for name, _ in self.model.named_parameters()]
        assignment = self.store.assignment
        total = sum(
            held_entries(self.spec, assignment, i, names) for i in range(assignment.num_subnets)
        )
        return replace(super()._result(peak_memory_bytes), num_parameters=total)
