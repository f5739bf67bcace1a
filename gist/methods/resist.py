"""Independent subnet training of residual networks: subnets are shallower, not narrower."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

from torch import nn

from gist.config import TrainConfig
from gist.errors import ConfigError, PartitionError
from gist.methods.samples import SampleTrainer
from gist.partition.depth import fold_depth
from gist.partition.residual_wiring import units_by_stage, wire_blocks
from gist.partition.samplers import DisjointUniform, Overlapping, Whole
from gist.partition.wiring import Wiring
from gist.plan import RoundPlan


class ResISTTrainer(SampleTrainer):
    """ResIST: residual blocks are dealt anew in every round (Dun et al., UAI 2022).

    A block that a subnet does not hold is the identity there, and costs nothing. All else is held
    by every subnet, and averaged. Whenever the whole model is evaluated, the outputs of the dealt
    blocks are scaled by the mean share of their stage that a subnet held.

    >>> model = gist.nn.preact_resnet101(num_classes=10)
    >>> trainer = ResISTTrainer(model, load_dataset("cifar10"), num_subnets=4, epochs=160)
    >>> result = trainer.fit()

    Args:
        model: A :class:`gist.nn.PreActResNet`, a ResNet of torchvision, or a pre-activation one of
            timm.
        data: As for :class:`SampleTrainer`.
        stages: Sequence of the stages whose blocks are dealt, such as ``("stages.2",)``; by default
            the one with the most of them, as in the paper. The first block of a stage, and blocks
            that change shapes, are never dealt.
        min_blocks: Blocks of each stage that a subnet holds at least, its minimum depth; 1 by
            default, and less than the blocks of the stage that are dealt.
        warmup_rounds: In so many rounds at the start every subnet holds the whole model: a warm-up
            by local SGD; none by default, and never all.
        **settings: As for :class:`SampleTrainer`.

    Raises:
        ConfigError: settings that cannot be used.
        PartitionError: a model without such blocks.
    """

    defaults: ClassVar[Mapping[str, Any]] = {
        "optimizer": "sgd",
        "lr": 0.1,
        "local_steps": 50,
        "epochs": 160,
    }
    own_settings: ClassVar[tuple[str, ...]] = ("stages", "min_blocks", "warmup_rounds")

    @classmethod
    def wiring_for(cls, *, stages: Sequence[str] | None = None, **own: Any) -> Wiring | None:
        """See :meth:`SampleTrainer.wiring_for`."""
        if isinstance(stages, str):
            raise ConfigError(
                "stages must be a sequence of names", got=repr(stages), expected=f"({stages!r},)"
            )
        return partial(wire_blocks, stages=None if stages is None else tuple(stages))

    @classmethod
    def adapt(
        cls,
        config: TrainConfig,
        *,
        min_blocks: int = 1,
        warmup_rounds: int = 0,
        **own: Any,
    ) -> TrainConfig:
        """See :meth:`SampleTrainer.adapt`."""
        for name, value, least in (
            ("min_blocks", min_blocks, 1),
            ("warmup_rounds", warmup_rounds, 0),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"{name} must be a whole number from {least} on", got=repr(value))
        sampler = Overlapping(min_units=min_blocks, warmup_rounds=warmup_rounds)
        if type(config.sampler) is DisjointUniform:
            return replace(config, sampler=sampler)
        if sampler != Overlapping():
            raise ConfigError(
                "min_blocks and warmup_rounds make the sampler of ResIST",
                got=f"sampler={config.sampler} as well",
                remedy="leave sampler out, or the other two",
            )
        return config

    def _plan(self) -> list[RoundPlan]:
        """See :meth:`SubnetTrainer._plan`; refuses a run that deals no block in any round."""
        rounds, sampler = super()._plan(), self.config.sampler
        warm = sampler.warmup_rounds if isinstance(sampler, Overlapping) else 0
        last = max((plan.index for plan in rounds if plan.num_subnets > 1), default=warm)
        if last < warm and not self.config.fast_dev_run:
            raise ConfigError(
                "all rounds would be warm-up rounds, in which every subnet holds the whole model",
                got=f"warmup_rounds={warm}, {len(rounds)} rounds",
                expected=f"warmup_rounds of at most {last}",
                remedy="lower warmup_rounds or local_steps, or raise epochs",
            )
        return rounds

    def _check_subnets(self) -> None:
        super()._check_subnets()
        most, sampler = max(m for _, m in self.config.phases), self.config.sampler
        least = sampler.min_units if isinstance(sampler, Overlapping) else 1
        for group, size in self.spec.sizes.items():
            if most > 1 and size <= least and not isinstance(sampler, Whole):
                stages = units_by_stage(self.model).items()
                deeper = [stage for stage, blocks in stages if len(blocks) > least]
                raise PartitionError(
                    f"every subnet would hold all blocks of stage {group!r}, so that none is dealt",
                    got=f"{size} that could be, min_blocks={least}, num_subnets={most}",
                    expected=f"{least + 1} or more that keep their shape, behind the first one",
                    remedy="lower min_blocks, or " * (size > 1)
                    + f"choose stages={deeper}, or " * bool(deeper)
                    + "use a deeper model, or LoFT",
                )
            if most > size:
                self._say(f"{most} subnets share {size} blocks of {group}: several hold each")

    def folded_model(self) -> nn.Module | None:
        """A copy of the model that is by itself what the trainer evaluates, to be deployed.

        The scales of the dealt blocks are in the weights of their last layers. Under torchrun all
        workers call it: on rank 0 the model, None elsewhere.
        """
        model = self.gather_model()
        if model is None:
            return None
        folded = copy.deepcopy(model).eval()
        if shares := self.block_shares():
            fold_depth(folded, self.spec, shares)
        return folded
