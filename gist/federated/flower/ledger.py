"""What a server leaves behind: records, events, the best model, and files."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from gist.checkpoint import write_atomically
from gist.config import TrainConfig
from gist.errors import ConfigError
from gist.execution.mapped import MODEL_FILE
from gist.execution.memory import PeakMemory
from gist.execution.store import MemoryStore
from gist.execution.tensorfile import replace_file
from gist.history import RoundRecord, TrainResult, write_history
from gist.partition.spec import PartitionSpec

Evaluate = Callable[[nn.Module], Mapping[str, float]]

_ORDINARY = ("sent", "merged")

_METRICS = ("train_metric", "val_metric", "test_metric", "val_loss")


class Ledger:
    """Evaluates the model now and then, keeps the best, and writes what there is into ``out``.

    Args:
        model: The global model.
        spec: Its partition spec.
        config: Settings of the training.
        evaluate: Metrics of a model, named as in :class:`~gist.history.RoundRecord`; it is called
            once before anything is trained, so that what is wrong with it shows.
        clock: Seconds since the start.
        describe: The run as JSON values.

    Attributes:
        history: One record per merge.
        events: What happened, in order, as JSON values.
        eval_seconds: Spent so far.

    Raises:
        ConfigError: metrics of other names.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: PartitionSpec,
        config: TrainConfig,
        *,
        evaluate: Evaluate | None,
        clock: Callable[[], float],
        describe: Mapping[str, Any],
    ) -> None:
        self.model, self.config, self.clock, self.description = model, config, clock, describe
        self.history: list[RoundRecord] = []
        self.events: list[dict[str, Any]] = []
        self.eval_seconds = 0.0
        self._store = MemoryStore(model, spec)
        self._memory = PeakMemory(self._store.device)
        self._measure = evaluate
        self._best: RoundRecord | None = None
        self._written: RoundRecord | None = None
        if evaluate is not None:
            self._metrics(evaluate)

    def log(self, event: str, client: int | None, **more: Any) -> None:
        """Takes down what happened, and says what is out of the ordinary."""
        self.events.append({"time": self.clock(), "event": event, "client": client, **more})
        if event not in _ORDINARY:
            what = f"client {client} {event}" if client is not None else event
            self._say(f"{what}: {more['reason']}" if "reason" in more else what)

    def add(self, record: RoundRecord, *, is_last: bool) -> None:
        """Takes the record of a merge, and evaluates the model if it is time to."""
        self.history.append(record)
        if is_last or len(self.history) % self.config.eval_every == 0:
            self.evaluate()
            self.write()
        record = self.history[-1]
        value = "" if record.val_metric is None else f", validation {record.val_metric:.4f}"
        self._say(f"merge {record.round}: training loss {record.train_loss:.4f}{value}")

    def evaluate(self) -> None:
        """Adds metrics to the last record, unless they are there."""
        if self._measure is None or not self.history or self.history[-1].val_loss is not None:
            return
        start = self.clock()
        metrics = self._metrics(self._measure)
        self.eval_seconds += self.clock() - start
        record = replace(self.history[-1], eval_seconds=self.eval_seconds, **metrics)  # type: ignore[arg-type]
        self.history[-1] = record
        if record.is_better_than(self._best):
            self._best = record
            if self.config.keep_best:
                self._store.keep()

    def finish(self, parameters_per_subnet: tuple[int, ...]) -> TrainResult | None:
        """Puts the best model back, and says how it went.

        Returns:
            As of every run; None where no evaluation had validation and test metrics.
        """
        self.evaluate()
        self._store.recall()
        best, tested = self._best, [r for r in self.history if r.test_metric is not None]
        result = None
        if best is not None and best.val_metric is not None and best.test_metric is not None:
            last = self.history[-1]
            assert tested[-1].test_metric is not None
            result = TrainResult(
                history=tuple(self.history),
                best=best,
                val_metric=best.val_metric,
                test_metric=best.test_metric,
                last_test_metric=tested[-1].test_metric,
                seconds=last.seconds,
                eval_seconds=last.eval_seconds,
                repartition_seconds=0.0,
                bytes_sent=last.bytes_sent,
                bytes_received=last.bytes_received,
                peak_memory_bytes=self._memory.bytes(),
                num_parameters=sum(p.numel() for p in self.model.parameters()),
                parameters_per_subnet=parameters_per_subnet,
            )
        self._written = None
        self.write(result)
        return result

    def write(self, result: TrainResult | None = None) -> None:
        """Writes what there is; each file appears complete or not at all."""
        if self.config.out is None:
            return
        folder = Path(self.config.out)
        if not self._store.has_kept:
            self._store.write(folder / MODEL_FILE)
        elif self._written is not self._best:
            with replace_file(folder / MODEL_FILE) as new:
                self._store.write_kept(new)
        self._written = self._best
        write_atomically(folder / "config.json", json.dumps(self.description, indent=1))
        write_history(folder / "history.jsonl", self.history)
        lines = (json.dumps(event) + "\n" for event in self.events)
        write_atomically(folder / "events.jsonl", "".join(lines))
        if result is not None:
            write_atomically(folder / "result.json", json.dumps(result.to_json(), indent=1))

    def _metrics(self, evaluate: Evaluate) -> dict[str, float]:
        metrics = dict(evaluate(self.model))
        if unknown := sorted(metrics.keys() - set(_METRICS)):
            raise ConfigError(
                "unknown metrics", got=", ".join(unknown), expected=" or ".join(_METRICS)
            )
        return metrics

    def _say(self, text: str) -> None:
        if self.config.progress is not False:
            print(f"gist: {text}", file=sys.stderr, flush=True)
