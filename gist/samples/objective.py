"""The data side of a run on independent samples, as the trainer and the executors see it.

Shape legend: ``n`` samples, ``C`` output columns, ``m`` stacked subnets.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gist.config import SampleConfig
from gist.csr import csr_tensor, is_csr, take_rows
from gist.errors import ConfigError, PartitionError
from gist.metrics import RunningMetric, loss
from gist.modes import keeps_modes
from gist.partition.streams import stream
from gist.samples.batches import SampleBatch, SampleSource, TensorSource
from gist.samples.convert import SPLITS, as_sample_tensor
from gist.samples.data import SampleData
from gist.samples.loader_data import LoaderData
from gist.samples.loader_source import loader_source
from gist.samples.sampled_outputs import SampledOutputs

_SAMPLES = 8
_SAMPLE_FEATURES = 16
_SAMPLE_OUTPUTS = 64


class SampleObjective:
    """Batches of samples, the loss over them, and metrics on every split.

    A model is called as ``model(x)`` and puts out ``[n, num_classes]``. With ``sampled_outputs`` it
    is called as ``model(x, outputs=columns)`` in training, and puts out these columns alone; it
    says that it can by ``accepts_outputs = True``.

    Args:
        data: The samples.
        device: Where the model lives.
        config: Settings; batch sizes of loaders are their own.
        num_subnets: m, the most of the run.
        local_steps: ζ.
        parts: Of each client of a federated run, positions among the training samples.

    Attributes:
        data: The samples, on ``device`` if they are tensors.
        source: Batches of the training samples.

    Raises:
        ConfigError: settings that do not fit the data.
    """

    def __init__(
        self,
        data: SampleData | LoaderData,
        device: torch.device,
        config: SampleConfig,
        *,
        num_subnets: int,
        local_steps: int,
        parts: Sequence[Tensor] | None = None,
    ) -> None:
        self.device, self.config = device, config
        self.data = data.to(device) if isinstance(data, SampleData) else data
        self.source = self._source(num_subnets, local_steps, parts)
        self.sampled: SampledOutputs | None = None
        if config.sampled_outputs is not None:
            _, y = next(self.data.scored("train", batch_size=1))
            if y.dim() == 2 and not is_csr(y):
                raise ConfigError(
                    "sampled_outputs needs class numbers or sparse labels: their loss is a softmax",
                    got=f"dense labels in {y.size(1)} columns",
                    remedy="y.to_sparse_csr(), or leave sampled_outputs out",
                )
            self.sampled = SampledOutputs(data.num_classes, config.sampled_outputs)

    @property
    def steps_per_epoch(self) -> int:
        """Batches that make one pass over the training samples."""
        return self.source.steps_per_epoch

    def batches(self, *, seed: int, round: int, subnet: int, steps: int) -> Iterator[SampleBatch]:
        """The ``steps`` batches of one subnet in one round."""
        every = self.source.batches(seed=seed, round=round, subnet=subnet, steps=steps)
        if (sampled := self.sampled) is None:
            return every
        return (sampled.restrict(b, seed, round, subnet, step) for step, b in enumerate(every))

    def loss(self, model: nn.Module, batch: SampleBatch) -> Tensor:
        """Mean loss over a batch: a scalar, or ``[m]`` for ``m`` stacked subnets."""
        if batch.outputs is None:
            return loss(self.data.task, model(batch.x), batch.y)
        scores = model(batch.x, outputs=batch.outputs)
        return loss(self.data.task, scores + batch.correction, batch.y)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Metric on every split, and the validation loss, in evaluation mode.

        The training metric is taken over ``train_eval_samples`` of the training samples, always the
        same ones, without augmentation.
        """
        out: dict[str, float] = {}
        with keeps_modes(model):
            model.eval()
            for split in SPLITS:
                metric, mean = self._measure(model, split)
                if metric is not None:
                    out[f"{split}_metric"] = metric
                if split == "val":
                    out["val_loss"] = mean
        return out

    @torch.no_grad()
    def predict(self, model: nn.Module, samples: Tensor | str | Any = "test") -> Tensor:
        """Scores in evaluation mode: ``[n, num_classes]``.

        Args:
            model: The model; its modes are left as they are.
            samples: A split; or samples ``[n, ...]`` of the form in which the data hold theirs:
                a tensor, or what :meth:`SampleData.of` takes. Floats get the data's precision.

        Raises:
            ConfigError: samples of another form, or an unknown split.
            DataError: no array of numbers.
        """
        with keeps_modes(model):
            model.eval()
            if isinstance(samples, str):
                inputs: Iterable[Tensor] = (x for x, _ in self._scored(samples))
            else:
                inputs = self._prepared(self._as_stored(samples).to(self.device))
            return torch.cat([model(x) for x in inputs])

    def sample_inputs(self, model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A few random inputs of the right shape, dtype and layout."""
        del model
        like, generator = self.data.example(), stream("sample inputs")
        if is_csr(like):
            return (_random_bags(like, generator).to(self.device),), {}
        if like.is_floating_point():
            x = torch.randn(_SAMPLES, *like.shape[1:], generator=generator, dtype=like.dtype)
        else:
            x = like.expand(_SAMPLES, *like.shape[1:]).clone()
        return (x.to(self.device),), {}

    def check(self, model: nn.Module) -> None:
        """Refuses a model that does not fit the data.

        Raises:
            ConfigError: it cannot put out some columns alone, as ``sampled_outputs`` wants it to;
                or batches are of one sample, of which BatchNorm has no variance.
            PartitionError: it cannot run on this data, or puts out another width.
        """
        (x,), _ = self.sample_inputs(model)
        if self.sampled is not None and not getattr(model, "accepts_outputs", False):
            raise ConfigError(
                f"{type(model).__name__} cannot put out some of its columns alone",
                got=f"sampled_outputs={self.config.sampled_outputs}",
                expected="a model with accepts_outputs=True, called as model(x, outputs=columns)",
                remedy="leave sampled_outputs out, or use gist.nn.MLP",
            )
        out = self._tried(model, x)
        if not isinstance(out, Tensor):
            raise PartitionError(
                f"{type(model).__name__} must put out one tensor", got=type(out).__name__
            )
        if tuple(out.shape) != (_SAMPLES, self.data.num_classes):
            lowest = self._lowest_class()
            raise PartitionError(
                f"{type(model).__name__} puts out another width than the data needs",
                got=f"{tuple(out.shape)} for {_SAMPLES} samples",
                expected=f"({_SAMPLES}, {self.data.num_classes}): data.num_classes columns",
                remedy="build the model with as many outputs as the data has classes"
                + f"; or give y - {lowest}: classes count from 0, and {lowest} is the lowest here"
                * bool(lowest),
            )
        if self.source.smallest_batch < 2:
            self._check_single(model, x[:1])
        if self.sampled is not None:
            step = max(self.data.num_classes // _SAMPLE_OUTPUTS, 1)
            columns = torch.arange(0, self.data.num_classes, step, device=x.device).flip(0)
            some = self._tried(model, x, outputs=columns)
            if not torch.allclose(some, out[:, columns], rtol=1e-3, atol=1e-5):
                raise PartitionError(
                    f"{type(model).__name__} puts out other columns than it is asked for",
                    got="model(x, outputs=columns)",
                    expected="model(x)[:, columns]",
                )

    def fingerprint(self) -> str:
        """Identifies the data."""
        return self._fingerprint

    def describe(self) -> dict[str, Any]:
        """What is trained on, as JSON values: a run is resumed on the same."""
        return {
            "batches": self.source.describe(),
            "sampled_outputs": self.config.sampled_outputs,
            "train_eval_samples": self.config.train_eval_samples,
        }

    @cached_property
    def _fingerprint(self) -> str:
        data = self.data
        if isinstance(data, SampleData):
            return data.fingerprint()
        return hashlib.sha256(str(data.fingerprint).encode()).hexdigest()

    def _source(
        self, num_subnets: int, local_steps: int, parts: Sequence[Tensor] | None
    ) -> SampleSource:
        data, config = self.data, self.config
        if isinstance(data, LoaderData):
            return loader_source(
                data.train,
                self.device,
                local_steps=local_steps,
                num_subnets=num_subnets,
                num_classes=data.num_classes,
                shards=config.shards,
                steps_per_epoch=config.steps_per_epoch,
            )
        if config.steps_per_epoch is not None:
            raise ConfigError(
                "steps_per_epoch is for loaders without len",
                got=f"steps_per_epoch={config.steps_per_epoch}",
                expected=f"{len(data.train):,} training samples in batches of {config.batch_size}",
                remedy="leave it out",
            )
        shards = num_subnets if config.shards else None
        return TensorSource(
            data, config.batch_size, shards=shards, local_steps=local_steps, parts=parts
        )

    def _scored(self, split: str, most: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        size = self.config.eval_batch_size
        for x, y in self.data.scored(split, batch_size=size, most=most):
            yield x.to(self.device), y.to(self.device)

    def _as_stored(self, given: Any) -> Tensor:
        """Samples as the data hold theirs; refuses those of another form."""
        stored = self.data.x if isinstance(self.data, SampleData) else self.data.example()
        samples = as_sample_tensor(given, like=stored)
        got, expected = (
            f"{x.layout} {x.dtype} of shape {('n', *x.shape[1:])}" for x in (samples, stored)
        )
        if got != expected:
            raise ConfigError(
                "these samples have another form than those that the model was trained on",
                got=got,
                expected=f"{expected}, as they are stored, not yet transformed",
                remedy="x[None] is one sample" if samples.shape == stored.shape[1:] else None,
            )
        return samples

    def _prepared(self, samples: Tensor) -> Iterator[Tensor]:
        """The model's inputs of samples ``[n, ...]``, some at a time."""
        numbers = torch.arange(len(samples), device=self.device)
        for some in torch.split(numbers, self.config.eval_batch_size):
            stored = take_rows(samples, some)
            if isinstance(self.data, SampleData):
                drawn = stream("predict")
                stored = self.data.prepared(stored, training=False, generator=drawn)
            yield stored

    def _measure(self, model: nn.Module, split: str) -> tuple[float | None, float]:
        """Metric of a split, None where its labels do not define it, and the mean loss."""
        metric, total, count = RunningMetric(self.data.metric), 0.0, 0
        most = self.config.train_eval_samples if split == "train" else None
        for x, y in self._scored(split, most):
            scores = model(x)
            metric.add(scores, y)
            total += float(loss(self.data.task, scores, y)) * len(y)
            count += len(y)
        defined = split != "train" or metric.is_defined
        return metric.result() if defined else None, total / count

    def _lowest_class(self) -> int:
        """The lowest class number that there is; 0 where labels are none, or not known."""
        if not isinstance(self.data, SampleData) or self.data.task != "multiclass":
            return 0
        return min(int(self.data.labels(self.data.split(split)).min()) for split in SPLITS)

    def _check_single(self, model: nn.Module, x: Tensor) -> None:
        """Refuses batches of one sample, of which a BatchNorm would see one value per feature."""

        def check(path: str, norm: nn.Module, args: tuple[Tensor, ...]) -> None:
            if args and args[0].numel() == args[0].size(1):
                raise ConfigError(
                    "BatchNorm cannot be trained on a single sample: it has no variance",
                    got=f"batches of one sample, of which {path} sees one value per feature",
                    expected="at least two samples in every batch",
                    remedy="a larger batch_size, fewer shards or clients, drop_last=True of a "
                    "loader whose last batch is one sample; or LayerNorm",
                )

        norms = ((n, m) for n, m in model.named_modules() if isinstance(m, _BatchNorm))
        hooks = [norm.register_forward_pre_hook(partial(check, path)) for path, norm in norms]
        try:
            with torch.no_grad(), keeps_modes(model):
                model.eval()(x)
        finally:
            for hook in hooks:
                hook.remove()

    def _tried(self, model: nn.Module, x: Tensor, **keywords: Tensor) -> Any:
        name = type(model).__name__
        kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
        try:
            with torch.no_grad(), keeps_modes(model):
                return model.eval()(x, **keywords)
        except Exception as error:  # a forward pass of the user's may raise anything
            differ = x.is_floating_point() and kinds and kinds != {x.dtype}
            got = f"{type(error).__name__}: {error}".splitlines()[0].removesuffix(": ")
            shape = ("n", *x.shape[1:])
            kind = "sparse CSR" if is_csr(x) else "dense"
            raise PartitionError(
                f"{name} cannot run on this data" + (": their precision differs" if differ else ""),
                got=got,
                expected=f"a model that takes {kind} samples of shape {shape} and {x.dtype}",
                remedy=f"model.to({x.dtype})" if differ else None,
            ) from error


def _random_bags(like: Tensor, generator: Generator) -> Tensor:
    """A few bags of a few random features: ``[n, F]``, as ``like`` is stored."""
    features = like.size(1)
    size = min(features, _SAMPLE_FEATURES)
    columns = (
        torch.randint(features, (_SAMPLES, size), generator=generator).sort(1).values.flatten()
    )
    values = torch.rand(_SAMPLES * size, generator=generator, dtype=like.dtype)
    kind = like.crow_indices().dtype
    indptr = torch.arange(0, _SAMPLES * size + 1, size, dtype=kind)
    return csr_tensor(indptr, columns.to(kind), values, features)
