"""Runs on independent samples: batches in training, and in an evaluation."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from gist.costs.run import Evaluation, RunOnStage
from gist.metrics import loss
from gist.modes import keeps_modes
from gist.partition.depth import block_shares, scaled_blocks
from gist.samples.outline import OutlineSamples


class SampleRun(RunOnStage[OutlineSamples]):
    """See :class:`~gist.costs.run.RunOnStage`."""

    def sizes(self) -> dict[str, int]:
        """Samples, and those of a step; outputs, and the sizes of one sample."""
        shape = self.objective.shape
        sizes = {
            "samples": shape.num_samples,
            "batch_samples": len(self.objective.batch.y),
            "outputs": shape.num_classes,
        }
        names = {1: ("features",), 3: ("channels", "height", "width")}.get(len(shape.sample_shape))
        names = names or tuple(f"size_{dim}" for dim in range(len(shape.sample_shape)))
        sizes |= dict(zip(names, shape.sample_shape, strict=True))
        return sizes if shape.bag_entries is None else {**sizes, "bag_entries": shape.bag_entries}

    def rehearse_evaluation(self) -> tuple[int, int]:
        """Some samples of one split; see :meth:`RunOnStage.rehearse_evaluation`."""
        objective, shape, tally = self.objective, self.objective.shape, self.stage.tally
        config = objective.config
        train = min(shape.training_samples, config.train_eval_samples)
        others = shape.num_samples - shape.training_samples
        largest = max(train, others)
        size = min(config.eval_batch_size, largest)
        # A ROC-AUC is taken over all scores of a split at once.
        together = 2 * largest if shape.metric == "roc_auc" else 0
        peaks: dict[str, int] = {}
        before, operations = tally.bytes, tally.flops
        with (
            self._depth_corrected(),
            self.stage.computing(),
            torch.no_grad(),
            keeps_modes(self.model),
            self.stage.peak(peaks, "evaluation"),
        ):
            self.model.eval()
            kept = torch.empty(together, shape.num_classes, device=self.device)
            batch = shape.batch(size, self.device)
            scores = self.model(batch.x)
            loss(shape.task, scores, batch.y)
            del kept, batch, scores
        flops = (tally.flops - operations) * (train + others) // size
        return peaks["evaluation"] - before, flops

    def rehearse_recalibration(self) -> int:
        """See :meth:`RunOnStage.rehearse_recalibration`; all layers are in training mode here."""
        peaks: dict[str, int] = {}
        before = self.stage.tally.bytes
        with (
            self._depth_corrected(),
            self.stage.computing(),
            torch.no_grad(),
            keeps_modes(self.model),
            self.stage.peak(peaks, "recalibration"),
        ):
            self.objective.loss(self.model.train(), self.objective.batch)
        return peaks["recalibration"] - before

    def _depth_corrected(self) -> AbstractContextManager[None]:
        """While open, the whole model is as it is evaluated."""
        last = self.rounds[-1]
        if not self.config.depth_correction or not self.spec.blocks:
            return nullcontext()
        assignment = self.assignment(last.num_subnets, last.index)
        return scaled_blocks(self.model, self.spec, block_shares(self.spec, assignment))

    def evaluation(self, standing: int) -> Evaluation:
        """See :meth:`RunOnStage.evaluation`."""
        left = max(self.limit - standing, 0)
        return Evaluation(how="batched", takes=self.one_pass, may_take=left)

    def activation_remedies(self, phase: str, evaluation: Evaluation) -> str:
        """See :meth:`RunOnStage.activation_remedies`."""
        return "a smaller eval_batch_size" if phase == "evaluation" else "a smaller batch_size"
