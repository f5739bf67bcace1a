"""Data-parallel training: every worker a batch per step, gradients averaged, one optimiser.

Shape legend: ``m`` batches per step, ``W`` ranks, ``P`` bytes of the trained parameters.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gist.baselines.memory import require_memory
from gist.config import TrainConfig
from gist.costs.room import Room
from gist.errors import ConfigError
from gist.execution.comm import Comm
from gist.execution.executor import Executor, RoundReport
from gist.execution.local import autocast, train_locally
from gist.execution.objective import Objective
from gist.execution.program import Program
from gist.execution.serial import SerialExecutor
from gist.execution.store import MemoryStore
from gist.execution.tensorfile import write_tensors
from gist.methods.samples import SampleTrainer
from gist.partition.assignment import Assignment
from gist.partition.samplers import Whole
from gist.partition.spec import PartitionSpec, model_tensors
from gist.partition.streams import ResumedStream
from gist.partition.wiring import Wiring
from gist.plan import RoundPlan
from gist.trainer import GISTTrainer, SubnetTrainer

_SYNC_BUFFERS = "broadcast_buffers"
if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters:
    _SYNC_BUFFERS = "forward_sync_buffers"  # the newer name, since PyTorch 2.13


def data_parallel_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run, changed so that there is one model and one optimiser, never reset."""
    return {**settings, "sampler": Whole(), "optimizer_state": "carry"}


class _DataParallel(SubnetTrainer):
    """What data-parallel training is on any kind of data; comes before the trainer of that kind."""

    def __init__(self, model: nn.Module, data: Any, **settings: Any) -> None:
        config = settings.get("config")
        if config is None:
            settings = data_parallel_settings(settings)
        else:
            settings["config"] = replace(config, **data_parallel_settings({}))
        super().__init__(model, data, **settings)

    def _check_workers(self) -> None:
        super()._check_workers()
        require_even_shares(self.config, self.comm.size)

    def _find_room(self) -> Room | None:
        return self._room_for(replace(self.config, num_subnets=1), shards=False)

    def _make_store(self) -> ReplicatedStore:
        require_memory(self.model, self.config)
        return ReplicatedStore(self.model, self.spec, self.comm)

    def _executor_maker(self, wiring: Wiring | None) -> Callable[..., Executor]:
        def make(most: int | None) -> Executor:
            return DataParallelExecutor(
                self.model, self.spec, self.objective, self.config, self.store, self.comm
            )

        return make

    def _metrics(self, recalibrate: RoundPlan | None = None) -> dict[str, float]:
        """Rank 0's; statistics are re-estimated where asked for alone: nothing was merged."""
        wanted = recalibrate if self.config.recalibrate_bn else None
        metrics: dict[str, float] = self.comm.on_main(partial(super()._metrics, wanted))
        if wanted is not None:
            self.comm.fill_from_main(self.model.buffers())
        return metrics


class DataParallelTrainer(_DataParallel, GISTTrainer):
    """Trains the whole model on the gradients of ``num_subnets`` batches per step.

    Batch ``i`` of a step, and what is drawn at random with it, is that of subnet ``i``; the budget
    is split over the batches, as over subnets. In one process a step takes its batches one after
    the other. Under torchrun every rank has the whole model, and averages the gradients of its
    ``m / W`` batches with those of the others by
    :class:`~torch.nn.parallel.DistributedDataParallel`: the same run, to rounding. BatchNorm tracks
    the statistics of the first batch of each step.

    Args:
        model: As for :class:`~gist.trainer.GISTTrainer`; under torchrun rank 0's values are taken.
        data: Likewise.
        **settings: Likewise, also ``wiring`` and ``config``; changed by
            :func:`data_parallel_settings`.

    Raises:
        ConfigError: ``num_subnets`` is no multiple of the number of workers, or as for
            :class:`~gist.trainer.GISTTrainer`.
    """


class SampleDataParallelTrainer(_DataParallel, SampleTrainer):
    """The same on independent samples; see :class:`DataParallelTrainer`.

    Args:
        model: As for :class:`~gist.methods.samples.SampleTrainer`.
        data: Likewise.
        **settings: Likewise; changed by :func:`data_parallel_settings`.

    Raises:
        ConfigError: as for :class:`DataParallelTrainer`.
    """


def require_even_shares(config: TrainConfig, workers: int) -> None:
    """Refuses numbers of batches that are no multiple of the number of workers.

    Raises:
        ConfigError: see above.
    """
    for _, m in config.phases:
        if m % workers:
            raise ConfigError(
                "the batches of a step cannot be shared out evenly",
                got=f"num_subnets={m}, {workers} workers",
                expected="a multiple of the number of workers",
                remedy=f"use num_subnets={-(-m // workers) * workers}, or other workers",
            )


class ReplicatedStore(MemoryStore):
    """The whole model in the memory of every rank; rank 0 writes its files.

    Args:
        model: The model; rank 0's values are taken.
        spec: Its partition spec.
        comm: The ranks.
    """

    def __init__(self, model: nn.Module, spec: PartitionSpec, comm: Comm) -> None:
        super().__init__(model, spec)
        self.comm = comm
        comm.fill_from_main(model_tensors(model).values())

    def write(self, path: Path) -> None:
        """See :meth:`Store.write`."""
        self.comm.on_main(partial(super().write, path))

    def write_part(self, path: Path) -> None:
        """See :meth:`Store.write_part`: everything on rank 0, nothing on the others."""
        write_tensors(path, model_tensors(self.model) if self.comm.is_main else {})

    def write_kept(self, path: Path) -> None:
        """See :meth:`Store.write_kept`: everything on rank 0, nothing on the others."""
        write_tensors(path, self._kept if self.comm.is_main else {})


class DataParallelExecutor(SerialExecutor):
    """Trains one model on the mean gradient of several batches per step.

    Each rank takes every ``W``-th batch. Of what moves in a step, the gradients are counted as a
    ring moves them: ``2 (W - 1) / W`` of their bytes sent and received by each rank; buffers, once
    in a round, as they are. What DistributedDataParallel says to itself when it is made, and once
    more after its first step, is a few hundred bytes and is left out.

    Args:
        model: The model.
        spec: Its partition spec.
        objective: Batches and loss.
        config: Run settings.
        store: Where the model is.
        comm: The ranks.
    """

    name = "data-parallel"

    def __init__(
        self,
        model: nn.Module,
        spec: PartitionSpec,
        objective: Objective,
        config: TrainConfig,
        store: Any,
        comm: Comm,
    ) -> None:
        super().__init__(model, spec, objective, config, store)  # all of it is on every rank
        self.comm = comm
        self._whole = Whole()(spec.sizes, 1, seed=0, round=0)
        self._parallel: tuple[Program, list[str], nn.Module] | None = None

    def own(self, assignment: Assignment) -> range:
        """The one model."""
        return range(1)

    def run_round(self, plan: RoundPlan, assignment: Assignment) -> RoundReport:
        """Runs the steps of one round; all ranks take part.

        Raises:
            DivergedError: the loss of a batch is not finite; names the round and the batch.
            WorkerLostError: another rank died.
        """
        return super().run_round(plan, self._whole)

    def state_dict(self) -> dict[str, Tensor]:
        """The optimiser state, on rank 0; all ranks have the same."""
        return super().state_dict() if self.comm.is_main else {}

    def _losses_of_all(
        self, plan: RoundPlan, assignment: Assignment, losses: list[Tensor]
    ) -> Tensor:
        each = Whole()(self.spec.sizes, plan.num_subnets, seed=0, round=plan.index)
        return super()._losses_of_all(plan, each, losses)

    def _train(self, program: Program, plan: RoundPlan, subnets: range) -> Tensor:
        """Mean loss of each of this rank's batches: ``[m / W]``."""
        own = self.comm.subnets(plan.num_subnets)
        keys = [("train", self.config.seed, plan.index, i) for i in own]
        streams = [ResumedStream(*key, device=self.device) for key in keys]
        batches = [
            self.objective.batches(
                seed=self.config.seed,
                round=plan.index,
                subnet=0 if self.config.shared_batches else i,
                steps=plan.local_steps,
            )
            for i in own
        ]
        module = self._module(program)
        losses: list[Tensor] = []

        def gradients(batches: tuple[Any, ...]) -> Tensor:
            of_batch = []
            for i, stream, batch in zip(own, streams, batches, strict=True):
                with ExitStack() as stack:
                    stack.enter_context(stream.resumed())
                    stack.enter_context(_kept(program.module) if i else nullcontext())
                    if i != own[-1] and isinstance(module, DistributedDataParallel):
                        stack.enter_context(module.no_sync())
                    with autocast(program, self.config):
                        loss = module(batch)
                    with self.comm.guarded() if self.comm.size > 1 else nullcontext():
                        (loss / len(own)).backward()
                of_batch.append(loss.detach().reshape(-1))
            losses.append(torch.cat(of_batch))
            return losses[-1]

        step = zip(*batches, strict=True)
        train_locally(
            program, self.objective, step, plan.rate_factors, self.config, gradients=gradients
        )
        self.comm.fill_from_main(program.module.buffers())
        return self._means(plan, own, torch.stack(losses))

    def _module(self, program: Program) -> nn.Module:
        """The loss of a batch as a module; over several ranks one that averages gradients."""
        loss = _Loss(program, self.objective)
        if self.comm.size == 1:
            return loss
        wanted = [name for name, p in program.parameters.items() if p.requires_grad]
        if self._parallel is None or self._parallel[:2] != (program, wanted):
            parallel = DistributedDataParallel(
                loss,
                process_group=self.comm.group,
                init_sync=False,
                **{_SYNC_BUFFERS: False},  # type: ignore[arg-type]
            )
            # Without annotations: they would be text here, which PyTorch does not read.
            parallel.register_comm_hook(None, lambda state, bucket: self._average(bucket))
            self._parallel = (program, wanted, parallel)
        return self._parallel[2]

    def _average(self, bucket: Any) -> torch.futures.Future[Tensor]:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        size = self.comm.size
        moved = 2 * (size - 1) * bucket.buffer().nbytes // size
        self.comm.sent += moved
        self.comm.received += moved
        group = self.comm.group
        assert group is not None
        return allreduce_hook(group, bucket)


class _Loss(nn.Module):
    """The loss of a batch, as a module that DistributedDataParallel can wrap."""

    def __init__(self, program: Program, objective: Objective) -> None:
        super().__init__()
        self.module = program.module
        self._loss = partial(objective.loss, program.call)

    def forward(self, batch: Any) -> Tensor:
        return self._loss(batch)


@contextmanager
def _kept(module: nn.Module) -> Iterator[None]:
    """Leaves a module's buffers as they were found."""
    before = [buffer.clone() for buffer in module.buffers()]
    yield
    with torch.no_grad():
        for buffer, value in zip(module.buffers(), before, strict=True):
            buffer.copy_(value)
