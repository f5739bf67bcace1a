"""The round loop: assign, extract, train locally, merge, evaluate."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gist import checkpoint
from gist.agreement import check_workers, least_room, refuse_unlike, settle_capacities
from gist.batchnorm import recalibrate_batchnorm, tracks_statistics
from gist.checkpoint import write_atomically
from gist.config import GraphConfig, TrainConfig, split_settings
from gist.costs.room import Room, find_room
from gist.errors import CheckpointError, ConfigError, PartitionError
from gist.execution.allocator import gives_back_freed_memory, keeps_freed_memory
from gist.execution.auto import AutoExecutor
from gist.execution.comm import join, local_device
from gist.execution.distributed import ShardedStore
from gist.execution.executor import Executor
from gist.execution.initialise import has_no_memory
from gist.execution.local import make_optimizer
from gist.execution.make import make_executor, make_store
from gist.execution.mapped import MODEL_FILE
from gist.execution.memory import PeakMemory, free_memory, memory_in_use
from gist.execution.objective import Objective
from gist.execution.store import Store
from gist.execution.tensorfile import FileLayout, write_tensors
from gist.graph.batch import BatchRecipe, FullGraph
from gist.graph.clusters import Cluster
from gist.graph.data import GraphData
from gist.graph.dgl_graph import takes_dgl_graph
from gist.graph.inference import Inference, default_memory_limit
from gist.graph.layerwise import layerwise_obstacle
from gist.graph.link_objective import LinkObjective
from gist.graph.links import LinkData
from gist.graph.objective import GraphObjective
from gist.history import RoundRecord, TrainResult, write_history
from gist.modes import keeps_modes
from gist.partition.assignment import Assignment
from gist.partition.depth import block_shares, scaled_blocks
from gist.partition.spec import PartitionSpec, model_tensors
from gist.partition.transfer import held_entries
from gist.partition.wiring import Wiring, partition_spec
from gist.plan import RoundPlan, plan_rounds
from gist.progress import RoundProgress
from gist.samples.objective import SampleObjective
from gist.spread import SpreadEvaluation, is_spread
from gist.termination import Termination, restarts
from gist.verify import small_model, verify_grouping, verify_wiring

_FREE_ON_RESUME = (
    "out",
    "callbacks",
    "progress",
    "checkpoint_every",
    "early_stopping",
    "store",
    "backend",
    "worker_timeout",
)


class SubnetTrainer:
    """Independent subnet training of any model on any objective.

    The model is checked before anything is trained: its spec covers every parameter and buffer,
    its subnets compute what the masked whole model computes, it fits the data, and no phase has
    more subnets than the smallest group has units.

    Started by torchrun, the processes train together: each runs its share of the subnets, and keeps
    its share of the model (:class:`~gist.execution.distributed.ShardedStore`). Every method is then
    to be called by all of them.

    Args:
        model: The global model; trained in place, on the device it is on. For a store on disk, or
            under torchrun, it may be on the ``meta`` device: it is then initialised there. Under
            torchrun a model in memory starts from rank 0's values.
        objective: The data side.
        wiring: For a model whose wiring is not known; see
            :func:`~gist.partition.wiring.partition_spec`.
        config: Settings; or give them as keywords.
        **settings: The attributes of :class:`~gist.config.TrainConfig`.

    Attributes:
        model: The global model; after :meth:`fit`, in its best validation round, or in the last
            with ``keep_best=False``. Under torchrun it has no values: see :meth:`gather_model`.
        capacities: Relative speeds of the workers, where subnets are sized by them; else None.
        comm: The workers; this process alone where it was not started by torchrun.
        store: Where its tensors live.
        spec: Its partition spec.
        rounds: The plan of every round.
        room: What the run takes in memory, and what it may take; None where that is not known.
        most_stacked: Subnets that run side by side at most; None for any number.
        wiring_error: Largest relative difference between a subnet and the masked whole model that
            the verification saw; rounding, where the wiring is right.
        history: One record per round so far.
        result: What :meth:`fit` returned; None before.

    Raises:
        ConfigError: settings that cannot be used.
        PartitionError: a model that cannot be partitioned, or not into that many subnets.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        *,
        wiring: Wiring | None = None,
        config: TrainConfig | None = None,
        **settings: Any,
    ) -> None:
        if config is not None and settings:
            raise ConfigError("give either config or settings", got=sorted(settings))
        self.config = config or TrainConfig.from_settings(settings)
        self.device = device_of(model, self.config)
        self.comm = join(
            self.device, backend=self.config.backend, timeout=self.config.worker_timeout
        )
        self._check_workers()
        self.capacities: tuple[float, ...] | None = None
        self.model, self.objective = model, objective
        self.spec: PartitionSpec = partition_spec(model, wiring)
        self._check_subnets()
        small = small_model(model, self.spec, self.config.seed)
        objective.check(small)
        self.rounds = self._plan()
        self.room = least_room(self.comm, self._find_room())
        inputs, keywords = objective.sample_inputs(small)
        self.wiring_error = verify_wiring(
            model, inputs, keywords, wiring=wiring, seed=self.config.seed
        )
        make_optimizer(self.config, small.parameters())  # refuses one that cannot be made
        if self.config.out is not None:
            _make_folder(Path(self.config.out))
        self._check_alike()
        self.capacities = settle_capacities(self.config, self.comm, self.device, say=self._say)
        self.store = self._make_store()
        self.most_stacked = None if self.room is None else self.room.most
        self._make_executor = self._executor_maker(wiring)
        self.executor = self._make_executor(most=self.most_stacked)
        self.history: list[RoundRecord] = []
        self.best: RoundRecord | None = None
        self.result: TrainResult | None = None
        self._loaded_shares: dict[str, float] | None = None

    def fit(self, resume: str | Path | None = None) -> TrainResult:
        """Trains for the whole budget (GIST, Algorithm 1).

        Where torchrun has restarted the workers (``--max-restarts``), the run goes on from its own
        last checkpoint. At SIGTERM a run with ``out`` finishes its round, writes a checkpoint, and
        exits with status 143.

        Args:
            resume: A run's directory or a checkpoint of it: goes on from there, with the same bits
                as if it had never stopped, on any number of workers. ``"auto"``: from the last
                checkpoint in ``out``, or from the start where there is none.

        Returns:
            History, best round, metrics and costs; ``self.model`` holds the best round, or the last
            with ``keep_best=False``.

        Raises:
            ConfigError: it has run before.
            DivergedError: the loss is no longer finite.
            CheckpointError: ``resume`` is missing, damaged, or of another run.
            WorkerLostError: another worker died.
            SystemExit: SIGTERM came; the status is 143.
        """
        restarted = any(self.comm.gather_values(restarts()))
        if (restarted or resume == "auto") and self._has_checkpoints():
            resume = Path(str(self.config.out))
        elif resume == "auto":
            resume = None
        if resume is not None:
            self.load_checkpoint(resume)
        elif self.result is not None:
            raise ConfigError(
                "this trainer has been fitted already",
                got=f"{len(self.history)} of {len(self.rounds)} rounds done",
                remedy="make a new trainer, or give resume=... to go on from a checkpoint",
            )
        else:
            self._refuse_foreign_checkpoints()
        if restarted:
            self._say(f"the workers were started again; {len(self.history)} rounds are kept")
        memory = PeakMemory(self.device)
        pending = self.rounds[len(self.history) :]
        shown = self.config.progress if self.comm.is_main else False
        with (
            self._room_kept(),
            self._as_found(),
            Termination(watch=self.config.out is not None) as termination,
            RoundProgress(len(self.rounds), len(self.history), shown) as progress,
        ):
            for plan in pending:
                if self._is_stale():
                    break
                record = self._run_round(plan)
                progress.update(record, len(self.history))
                wanted = [callback(self, record) for callback in self.config.callbacks]
                wishes = self.comm.gather_values([any(wanted), termination.asked])
                if any(asked for _, asked in wishes):
                    every = self.config.checkpoint_every
                    if every is None or (plan.index + 1) % every:
                        self.save_checkpoint()
                    self._say(
                        f"stopped by SIGTERM after {len(self.history)} rounds; go on with "
                        f"fit(resume={self.config.out!r}), or --resume {self.config.out}"
                    )
                    raise SystemExit(termination.status)
                if any(stop for stop, _ in wishes):
                    break
            if self.history[-1].val_metric is None:  # stopped between two evaluations
                self._evaluate_round(self.rounds[self.history[-1].round])
            self.result = self._result(memory.bytes())
            self.store.recall()
            if self.config.out is not None:
                self.save(Path(self.config.out))
        if termination.asked:
            raise SystemExit(termination.status)
        return self.result

    def _run_round(self, plan: RoundPlan) -> RoundRecord:
        start = time.perf_counter()
        self._loaded_shares = None
        assignment = self.assign(plan)
        report = self.executor.run_round(plan, assignment)
        seconds = time.perf_counter() - start
        last = self.history[-1] if self.history else None
        record = RoundRecord(
            round=plan.index,
            num_subnets=plan.num_subnets,
            local_steps=plan.local_steps,
            epochs=plan.epochs_spent,
            learning_rate_factor=plan.rate_factors[-1],
            train_loss=report.train_loss,
            seconds=seconds + (last.seconds if last else 0.0),
            eval_seconds=last.eval_seconds if last else 0.0,
            repartition_seconds=report.repartition_seconds
            + (last.repartition_seconds if last else 0.0),
            bytes_sent=report.bytes_sent + (last.bytes_sent if last else 0),
            bytes_received=report.bytes_received + (last.bytes_received if last else 0),
            clock=report.clock,
        )
        self.history.append(record)
        is_last = plan.index == len(self.rounds) - 1
        if is_last or (plan.index + 1) % self.config.eval_every == 0:
            self._evaluate_round(plan)
        every = self.config.checkpoint_every
        if every is not None and (plan.index + 1) % every == 0:
            self.save_checkpoint()
        return self.history[-1]

    def _plan(self) -> list[RoundPlan]:
        """The plan of every round."""
        return plan_rounds(self.config, self.objective.steps_per_epoch)

    def assign(self, plan: RoundPlan) -> Assignment:
        """The assignment of a round: a function of (seed, round), and capacities, alone."""
        return self.config.sampler_for(self.capacities)(
            self.spec.sizes, plan.num_subnets, seed=self.config.seed, round=plan.index
        )

    def evaluate(self, split: str = "test") -> dict[str, float]:
        """Metric of the model as it is now.

        Args:
            split: ``"train"``, ``"val"`` or ``"test"``.

        Returns:
            One entry: the metric's name and its value.

        Raises:
            ConfigError: the split is unknown, or the metric is not defined on it.
        """
        if split not in ("train", "val", "test"):
            raise ConfigError("unknown split", got=repr(split), expected="'train', 'val' or 'test'")
        with self._as_found():
            metrics = self._metrics()
        if f"{split}_metric" not in metrics:
            raise ConfigError(f"{self.metric} is not defined on the {split} split")
        return {self.metric: metrics[f"{split}_metric"]}

    @property
    def metric(self) -> str:
        """Name of the metric."""
        return "metric"

    def _evaluate_round(self, plan: RoundPlan) -> None:
        """Adds the merged model's metrics to the last record, and keeps the model if it is best."""
        start = time.perf_counter()
        wanted = self.config.recalibrate_bn
        metrics = self._metrics(
            plan if (plan.num_subnets > 1 if wanted is None else wanted) else None
        )
        seconds = self.history[-1].eval_seconds + time.perf_counter() - start
        record = replace(self.history[-1], eval_seconds=seconds, **metrics)  # type: ignore[arg-type]
        self.history[-1] = record
        if record.is_better_than(self.best):
            self.best = record
            if self.config.keep_best:
                self.store.keep()

    def _metrics(self, recalibrate: RoundPlan | None = None) -> dict[str, float]:
        """Metrics of the model as it is now, its BatchNorm re-estimated first where asked for."""

        def measure(model: nn.Module) -> dict[str, float]:
            with self.depth_corrected(model):
                if recalibrate is not None:
                    batches = self._statistics_batches(recalibrate)
                    recalibrate_batchnorm(model, self.objective, batches)
                self._choose_inference(model.eval())
                return self.objective.evaluate(model)

        if not isinstance(self.store, ShardedStore):
            return measure(self.model)
        model = self.store.assembled()
        metrics: dict[str, float] = self.comm.on_main(lambda: measure(model))  # type: ignore[arg-type]
        if recalibrate is not None and tracks_statistics(self.model):
            self.store.take(model, [name for name, _ in self.model.named_buffers()])
        return metrics

    def _statistics_batches(self, plan: RoundPlan) -> Iterable[Any]:
        """Batches that BatchNorm statistics are re-estimated on."""
        steps = self.objective.steps_per_epoch
        return self.objective.batches(
            seed=self.config.seed, round=plan.index, subnet=0, steps=steps
        )

    def block_shares(self) -> dict[str, float]:
        """For each group of residual blocks, the share of them that a subnet holds on average.

        That of the round the model is from, also of one that was loaded; of the last round planned
        where that is not known.
        """
        if not self.config.depth_correction or not self.spec.blocks:
            return {}
        if self._loaded_shares is not None:
            return self._loaded_shares
        at = self.rounds[-1].index
        if self.result is not None and self.config.keep_best and self.best is not None:
            at = self.best.round
        elif self.history:
            at = self.history[-1].round
        return block_shares(self.spec, self.assign(self.rounds[at]))

    def depth_corrected(self, model: nn.Module) -> AbstractContextManager[None]:
        """While open, the whole model is as it is evaluated; see ``depth_correction``."""
        shares = self.block_shares()
        return scaled_blocks(model, self.spec, shares) if shares else nullcontext()

    def _choose_inference(self, model: nn.Module) -> None:
        """Decides how the whole model is evaluated, if that is still open."""

    def gather_model(self) -> nn.Module | None:
        """The whole model as it is now: under torchrun a new one on rank 0, and None elsewhere.

        Nothing else in a distributed run needs memory for all of it.
        """
        if not isinstance(self.store, ShardedStore):
            return self.model
        model = self.store.assembled()
        return None if model is None else model.eval()

    def _make_store(self) -> Store:
        """Where the global parameters live."""
        return make_store(self.model, self.spec, self.config, self.comm, self.device)

    def _executor_maker(self, wiring: Wiring | None) -> Callable[..., Executor]:
        """What makes the executor, given ``most``, the subnets that memory has room for at once."""
        return partial(
            make_executor,
            self.model,
            self.spec,
            self.objective,
            self.config,
            store=self.store,
            comm=self.comm,
            check_grouping=lambda: verify_grouping(
                self.model,
                self.objective.sample_inputs,
                loss=self._sample_loss,
                wiring=wiring,
                seed=self.config.seed,
            ),
            say=self._say,
        )

    def _check_workers(self) -> None:
        check_workers(self.config, self.comm, self.device, say=self._say)

    def _check_alike(self) -> None:
        """Refuses workers that were started on different runs."""
        own = json.loads(json.dumps(self.describe()))
        for name in ("callbacks", "progress"):
            del own["settings"][name]
        own["settings"]["out"] = self.config.out is not None
        own |= {"device": self.device.type}
        if self.comm.from_main(has_no_memory(self.model)):  # else rank 0's values are taken
            own |= {"in memory": not has_no_memory(self.model)}
        refuse_unlike(self.comm, {**own, **own["settings"]})

    def _find_room(self) -> Room | None:
        """What the run takes in memory, and what it may take; None where that is not known."""
        return self._room_for(self.config)

    def _room_for(self, config: TrainConfig, *, shards: bool = True) -> Room | None:
        """See :func:`~gist.costs.room.find_room`, which knows graphs and samples."""
        if not isinstance(self.objective, GraphObjective | SampleObjective):
            return None
        return find_room(
            self.model,
            self.spec,
            self.objective,
            config,
            self.device,
            comm=self.comm,
            shards=shards,
            say=self._say,
        )

    @contextmanager
    def _room_kept(self) -> Iterator[None]:
        """Keeps freed memory for the next step where there is room for that, else none of it."""
        if self.room is None or self.room.needed is None or self.device.type != "cpu":
            yield
            return
        with keeps_freed_memory(self.room.needed, self.room.limit) as kept, ExitStack() as stack:
            if not kept:
                stack.enter_context(gives_back_freed_memory())
            yield

    def _sample_loss(self, model: nn.Module) -> Tensor:
        (batch,) = self.objective.batches(seed=self.config.seed, round=0, subnet=0, steps=1)
        return self.objective.loss(model, batch)

    def _say(self, text: str) -> None:
        if self.config.progress is not False and self.comm.is_main:
            print(f"gist: {text}", file=sys.stderr)

    def _is_stale(self) -> bool:
        patience = self.config.early_stopping
        if patience is None or self.best is None:
            return False
        since = [r for r in self.history if r.round > self.best.round and r.val_metric is not None]
        return len(since) >= patience

    def _check_subnets(self) -> None:
        most = max(m for _, m in self.config.phases)
        if most > 1 and not self.spec.groups:
            raise PartitionError(
                f"{type(self.model).__name__} has no hidden units to partition",
                got=f"num_subnets={most}",
                remedy="use a model with at least one hidden layer, or num_subnets=1",
            )
        for _, m in self.config.phases:
            sampler = self.config.sampler_for(self.capacities)
            sampler(self.spec.sizes, m, seed=self.config.seed, round=0)

    def _result(self, peak_memory_bytes: int) -> TrainResult:
        assert self.best is not None, "the last round that ran is evaluated"
        evaluated = [r for r in self.history if r.test_metric is not None]
        last = self.history[-1]
        assignment = self.assign(self.rounds[last.round])
        trained = [n for n, p in self.model.named_parameters() if p.requires_grad]
        per_subnet = tuple(
            held_entries(self.spec, assignment, subnet, trained)
            for subnet in range(assignment.num_subnets)
        )
        return TrainResult(
            history=tuple(self.history),
            best=self.best,
            val_metric=_number(self.best.val_metric),
            test_metric=_number(self.best.test_metric),
            last_test_metric=_number(evaluated[-1].test_metric),
            seconds=last.seconds,
            eval_seconds=last.eval_seconds,
            repartition_seconds=last.repartition_seconds,
            bytes_sent=last.bytes_sent,
            bytes_received=last.bytes_received,
            peak_memory_bytes=peak_memory_bytes,
            num_parameters=sum(p.numel() for p in self.model.parameters()),
            parameters_per_subnet=per_subnet,
        )

    def save(self, folder: str | Path) -> None:
        """Writes the model, the settings and the history; each file appears complete or not at all.

        Args:
            folder: Receives ``model.safetensors``, ``config.json``, ``history.jsonl`` and, after
                :meth:`fit`, ``result.json``.
        """
        folder = Path(folder)
        self.store.write(folder / MODEL_FILE)
        if not self.comm.is_main:
            return
        picked = {
            "executor": self.executor.name,
            "executor_choices": self.executor_choices,
            "block_shares": self.block_shares(),
        }
        write_atomically(folder / "config.json", json.dumps(self.describe() | picked, indent=1))
        write_history(folder / "history.jsonl", self.history)
        if self.result is not None:
            write_atomically(folder / "result.json", json.dumps(self.result.to_json(), indent=1))

    def load(self, folder: str | Path) -> None:
        """Takes over the model that :meth:`save` wrote.

        Args:
            folder: A run's directory.

        Raises:
            CheckpointError: there is no model in it, or one of other tensors.
        """
        self.store.read([Path(folder) / MODEL_FILE])
        config = Path(folder) / "config.json"
        if self.spec.blocks and config.exists():
            self._loaded_shares = json.loads(config.read_text()).get("block_shares")

    def settings(self) -> dict[str, Any]:
        """The settings of the run, of training and data, as JSON values."""
        return self.config.to_json()

    def describe(self) -> dict[str, Any]:
        """The run as JSON values: model, groups, settings."""
        return {
            "model": type(self.model).__name__,
            "architecture": {
                path: f"{type(module).__qualname__}({module.extra_repr()})"
                for path, module in self.model.named_modules()
            },
            "tensors": {n: [str(t.dtype), *t.shape] for n, t in model_tensors(self.model).items()},
            "metric": self.metric,
            "groups": self.spec.sizes,
            "settings": self.config.to_json(),
            "data": self.objective.fingerprint(),
        }

    @property
    def executor_choices(self) -> dict[str, Any]:
        """What ``executor="auto"`` picked so far, by number of subnets, and what it measured."""
        return self.executor.choices if isinstance(self.executor, AutoExecutor) else {}

    def save_checkpoint(self) -> Path:
        """Writes a checkpoint below ``config.out``.

        Raises:
            ConfigError: ``out`` is not set.
        """
        if self.config.out is None:
            raise ConfigError("a checkpoint needs a directory", remedy="give out='runs/name'")
        files = {"model": self.store.write_part}
        if self.store.has_kept:
            files["best"] = self.store.write_kept
        state = self.executor.state_dict()
        if state:
            files["executor"] = partial(write_tensors, tensors=state)
        values = {
            "run": self.describe(),
            "history": [asdict(record) for record in self.history],
            "best_round": None if self.best is None else self.best.round,
            "executor_choices": self.executor_choices,
            "most_stacked": self.most_stacked,
            "capacities": self.capacities,
            **self._more_choices(),
        }
        return checkpoint.save_checkpoint(
            Path(self.config.out) / "checkpoints",
            len(self.history),
            files=files,
            state=values,
            nbytes=FileLayout.of(model_tensors(self.model)).nbytes * (1 + self.store.has_kept)
            + sum(tensor.nbytes for tensor in state.values()) * self.comm.size,
            comm=self.comm,
        )

    def more_results(self) -> dict[str, Any]:
        """What a run is judged by besides its :attr:`result`, as JSON values."""
        return {}

    def _more_choices(self) -> dict[str, Any]:
        """What else was decided on this machine and is to stay as it is when the run is resumed."""
        return {}

    def _restore_more(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`_more_choices` gave."""

    def load_checkpoint(self, path: str | Path) -> None:
        """Takes over the state of a checkpoint of the same run.

        Raises:
            CheckpointError: it is missing, damaged, or of another run; names what differs.
        """
        sound = self.comm.on_main(lambda: str(checkpoint.load_checkpoint(Path(path)).folder))
        found = checkpoint.open_checkpoint(Path(sound))
        theirs, ours = found.state["run"], json.loads(json.dumps(self.describe()))
        for run in (theirs, ours):
            run["settings"] = {
                key: "serial" if key == "executor" and value == "distributed" else value
                for key, value in run["settings"].items()
                if key not in _FREE_ON_RESUME
            }
        flat_theirs, flat_ours = {**theirs, **theirs["settings"]}, {**ours, **ours["settings"]}
        for flat in (flat_theirs, flat_ours):
            del flat["settings"]
        known = {name: flat_theirs.get(name) for name in flat_ours}
        if differ := _differences(flat_ours, known):
            raise CheckpointError(
                "the checkpoint is of another run",
                got=", ".join(f"{name}={own!r}" for name, own, _ in differ[:3]),
                expected=", ".join(f"{name}={other!r}" for name, _, other in differ[:3]),
                remedy="resume with the settings, model and data it was made with",
            )
        if not found.files("model"):
            raise CheckpointError(f"{found.folder} holds no model")
        self.store.read(found.files("model"))
        if found.files("best"):
            self.store.read_kept(found.files("best"))
        if self.config.capacities == "measured":
            self.capacities = tuple(found.state["capacities"])
        self._restore_most(found.state.get("most_stacked"))
        self.executor.read_state(found.files("executor"))
        if isinstance(self.executor, AutoExecutor):
            self.executor.restore_choices(found.state["executor_choices"])
        self._restore_more(found.state)
        self._loaded_shares = None
        self.history = [RoundRecord(**record) for record in found.state["history"]]
        best = found.state["best_round"]
        self.best = None if best is None else self.history[best]

    def _restore_most(self, most: int | None) -> None:
        """Stacks as many subnets as the run did so far: with others its bits would not be the same.

        Raises:
            CheckpointError: memory has no room for so many.
        """
        if most == self.most_stacked:
            return
        if self.most_stacked is not None and (most is None or most > self.most_stacked):
            raise CheckpointError(
                "the run had more subnets side by side than memory has room for now",
                got=f"room for {self.most_stacked}",
                expected="all of them" if most is None else most,
                remedy="free memory, or start anew",
            )
        self.most_stacked = most
        self.executor = self._make_executor(most=most)

    def _refuse_foreign_checkpoints(self) -> None:
        if self._has_checkpoints():
            raise ConfigError(
                "the directory holds checkpoints of an earlier run",
                got=self.config.out,
                remedy="go on from them with resume=..., give another out, or delete them",
            )

    def _has_checkpoints(self) -> bool:
        """Whether there are any in ``out``; as rank 0 sees it."""
        if self.config.out is None:
            return False
        folder = Path(self.config.out) / "checkpoints"
        found: bool = self.comm.on_main(lambda: any(folder.glob("round-*/manifest.json")))
        return found

    @contextmanager
    def _as_found(self) -> Iterator[None]:
        """Leaves training modes and the determinism switch as they were found."""
        deterministic = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(deterministic or self.config.deterministic)
        try:
            with keeps_modes(self.model), self.store.reading():
                yield
        finally:
            torch.use_deterministic_algorithms(deterministic)


class GISTTrainer(SubnetTrainer):
    """GIST: independent subnet training of graph networks (Wolfe et al., arXiv 2102.10424).

    >>> trainer = GISTTrainer(model, data, num_subnets=8, local_steps=20, epochs=400)
    >>> result = trainer.fit()
    >>> trainer.evaluate("test")

    Graphs larger than a step train on clusters: ``clusters=1500, clusters_per_batch=10``, or on
    other batches: ``batches=LADIES(nodes_per_layer=(512, 512))``.

    Under torchrun a large model, or with ``evaluation="layerwise"`` any, is evaluated layer by
    layer by all workers, and never assembled (:mod:`gist.spread`).

    Args:
        model: A :mod:`gist.nn` model, a PyG ``GCN``, ``GraphSAGE``, ``GAT`` or ``GIN``, or any
            module of ``(x, edge_index)``, or with layers of DGL of ``(graph, x)``, together with
            ``wiring``.
        data: A :class:`~gist.graph.data.GraphData`, or what :meth:`~gist.GraphData.of` takes; or a
            :class:`~gist.graph.links.LinkData`, to predict links: then the model puts out
            embeddings.
        wiring: See :class:`SubnetTrainer`.
        config: Settings of the training; or give them as keywords.
        **settings: The attributes of :class:`~gist.config.GraphConfig` and
            :class:`~gist.config.TrainConfig`.

    Attributes:
        spread: How all workers evaluate the model; None where one of them does.

    Raises:
        DataError: data that cannot be trained on.
        ConfigError: settings that cannot be used.
        PartitionError: a model that cannot be partitioned.
    """

    spread: SpreadEvaluation | None = None
    _spreads = False

    def __init__(
        self,
        model: nn.Module,
        data: GraphData | LinkData | Any,
        *,
        wiring: Wiring | None = None,
        config: TrainConfig | None = None,
        **settings: Any,
    ) -> None:
        if not isinstance(data, LinkData):
            data = GraphData.of(data)
        self.data = data
        graph, training = split_settings(settings, GraphConfig, TrainConfig)
        self.graph_config = GraphConfig(**graph)
        if config is None:  # checked before a graph is cut
            config, training = TrainConfig.from_settings(training), {}
        device = device_of(model, config)
        _check_kernels(model, config)
        kind: Any = LinkObjective if isinstance(data, LinkData) else GraphObjective
        objective: GraphObjective = kind(
            data,
            device,
            _recipe(self.graph_config),
            inductive=self.graph_config.inductive,
            evaluation=_evaluation(self.graph_config, config, model),
        )
        super().__init__(model, objective, wiring=wiring, config=config, **training)
        if not self.comm.is_distributed:  # else it is chosen when there is a model
            with self._as_found():
                objective.choose_inference(self.model, self._inference_limit())
        elif self._spreads:
            self._spread_evaluation(objective.data)

    def _make_store(self) -> Store:
        if self.comm.is_distributed:
            how = self.graph_config.evaluation
            self._spreads = is_spread(self.model, how, self.config, say=self._say)
        return super()._make_store()

    def _spread_evaluation(self, data: GraphData) -> None:
        """Makes all workers evaluate; refused where that has no room."""
        assert isinstance(self.store, ShardedStore)
        limit = min(self.comm.gather_values(self._inference_limit()))
        self.spread = SpreadEvaluation(
            store=self.store, x=data.x, graph=data.adjacency, memory_limit=limit
        )
        with self._as_found():
            self.spread.check()

    def _metrics(self, recalibrate: RoundPlan | None = None) -> dict[str, float]:
        if self.spread is None:
            return super()._metrics(recalibrate)
        assert isinstance(self.objective, GraphObjective)
        scores = self.spread.scores()
        measure = partial(self.objective.measure, scores)
        metrics: dict[str, float] = self.comm.on_main(measure)
        return metrics

    @property
    def metric(self) -> str:
        """Name of the data's metric."""
        return self.data.metric

    def settings(self) -> dict[str, Any]:
        """The settings of the run, of training and graph, as JSON values."""
        return {**super().settings(), **self.graph_config.to_json()}

    def describe(self) -> dict[str, Any]:
        """The run as JSON values: model, groups, settings, batches."""
        assert isinstance(self.objective, GraphObjective)
        return {**super().describe(), **self.objective.describe()}

    @torch.no_grad()
    def predict(self) -> Tensor:
        """Scores, or embeddings, of every node by the model as it is now: ``[N, num_classes]``."""
        assert isinstance(self.objective, GraphObjective)
        with self._as_found():
            if self.spread is not None:
                return self.spread.scores()
            if not isinstance(self.store, ShardedStore):
                return self.objective.predict(self.model.eval())
            model = self.store.assembled()
            scores = torch.empty(0, dtype=next(self.model.parameters()).dtype)

            def predict() -> list[int]:
                nonlocal scores
                assert model is not None, "there is one on rank 0"
                assert isinstance(self.objective, GraphObjective)
                self._choose_inference(model.eval())
                scores = self.objective.predict(model)
                return list(scores.shape)

            shape = self.comm.on_main(predict)
            counts = [shape[0] * shape[1]] + [0] * (self.comm.size - 1)
            own = scores.reshape(-1).to(self.comm.device)
            return self.comm.gather(own, counts)[0].view(shape).to(self.device)

    def _choose_inference(self, model: nn.Module) -> None:
        assert isinstance(self.objective, GraphObjective)
        if self.objective.inference is None:
            self.objective.choose_inference(model, self._inference_limit())

    def _more_choices(self) -> dict[str, Any]:
        assert isinstance(self.objective, GraphObjective)
        inference = self.objective.inference
        return {
            "inference": None if inference is None else asdict(inference),
            "spread_limit": None if self.spread is None else self.spread.memory_limit,
        }

    def _restore_more(self, state: dict[str, Any]) -> None:
        assert isinstance(self.objective, GraphObjective)
        chosen = state.get("inference")
        if chosen is not None and self._still_free(chosen["memory_limit"]):
            self.objective.inference = Inference(**chosen)
        limit = state.get("spread_limit")
        if limit is not None and self.spread is not None and self._still_free(limit):
            self.spread = replace(self.spread, memory_limit=limit)

    def _still_free(self, limit: int) -> bool:
        """Whether every worker may take as much for an evaluation as before; says so if not."""
        free = min(self.comm.gather_values(free_memory(self.device)))
        if limit > free:
            self._say(
                f"evaluation decides anew what to keep in memory: {limit:,} bytes "
                f"were allowed so far, {free:,} are free; metrics may differ by rounding"
            )
        return bool(limit <= free)

    def _inference_limit(self) -> int:
        """Bytes that an evaluation may take beside all that stays."""
        if self.room is not None and self.room.evaluation is not None:
            return self.room.evaluation
        limit = self.config.memory_limit
        if limit is None:
            sharing = self.comm.ranks_here if self.device.type == "cpu" else 1
            return default_memory_limit(self.device, free_memory(self.device) // sharing)
        assert isinstance(limit, int), "parsed by TrainConfig"
        return default_memory_limit(self.device, max(limit - memory_in_use(self.device), 0))


def _recipe(config: GraphConfig) -> BatchRecipe:
    if config.clusters is not None:
        return Cluster(num_parts=config.clusters, parts_per_batch=config.clusters_per_batch)
    recipe = FullGraph() if config.batches is None else config.batches
    if not isinstance(recipe, BatchRecipe):
        raise ConfigError(
            "batches must be a recipe",
            got=repr(recipe),
            expected="Cluster, LADIES, FastGCN, PyGLoader or a gist.BatchRecipe of your own",
            remedy="put a loader of PyTorch Geometric into gist.PyGLoader"
            if hasattr(recipe, "__iter__")
            else None,
        )
    return recipe


def _evaluation(config: GraphConfig, training: TrainConfig, model: nn.Module) -> str:
    """How to evaluate; a model on disk passes by in blocks, where it can."""
    on_disk = training.store == "disk" and layerwise_obstacle(model) is None
    return "layerwise" if config.evaluation == "auto" and on_disk else config.evaluation


def device_of(model: nn.Module, config: TrainConfig) -> torch.device:
    """Where a model is to be trained: where it is; without values, on the GPU for NCCL."""
    if not isinstance(model, nn.Module):
        raise ConfigError(
            "model must be a module", got=repr(model), remedy="call the class to make a model"
        )
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise PartitionError(f"{type(model).__name__} has no parameters to train")
    if not parameter.is_meta:
        return parameter.device
    return local_device() if config.backend == "nccl" else torch.device("cpu")


def _check_kernels(model: nn.Module, config: TrainConfig) -> None:
    """Refuses what DGL's kernels cannot do."""
    for name, plain in (("precision", "full"), ("compile", False)):
        if getattr(config, name) != plain and takes_dgl_graph(model):
            raise ConfigError(
                "DGL's kernels neither follow autocast nor can they be compiled",
                got=f"{name}={getattr(config, name)!r}",
                remedy=f"leave {name} out, or use layers of gist.nn or PyTorch Geometric",
            )


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            "out is no directory that can be written to", got=folder, expected=str(error)
        ) from error


def _number(value: float | None) -> float:
    assert value is not None
    return value


def _differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """What differs, by the path to it, with both values: None where there is none."""
    found: list[tuple[str, Any, Any]] = []
    for name in {**ours, **theirs}:
        own, other = ours.get(name), theirs.get(name)
        if isinstance(own, dict) and isinstance(other, dict):
            found += [(f"{name}.{path}", *both) for path, *both in _differences(own, other)]
        elif own != other:
            found.append((name, own, other))
    return found
