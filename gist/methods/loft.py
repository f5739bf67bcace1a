"""Independent subnet training of convolutional networks: subnets have fewer filters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from gist.methods.samples import SampleTrainer
from gist.partition.residual_wiring import wire_filters
from gist.partition.wiring import Wiring


class LoFTTrainer(SampleTrainer):
    """LoFT: filters of each block's first convolution are dealt anew in every round.

    Wang et al., "LOFT: Finding Lottery Tickets through Filter-wise Training", AISTATS 2023.

    The input channels of the second convolution, and norms between them, follow; inputs and outputs
    of blocks are whole. In a chain of convolutions the filters of all but the last layer are dealt.

    >>> model = gist.nn.preact_resnet18(num_classes=10)
    >>> trainer = LoFTTrainer(model, load_dataset("cifar10"), num_subnets=4, epochs=20)
    >>> trainer.fit()
    >>> smaller = find_ticket(trainer.model, trainer.spec, pruned=0.5).cut(trainer.model)

    Args:
        model: A :class:`gist.nn.PreActResNet` or :class:`gist.nn.VGG`; a ResNet or VGG of
            torchvision; a pre-activation ResNet of timm; a convolutional ``nn.Sequential``.
        data: As for :class:`SampleTrainer`.
        **settings: As for :class:`SampleTrainer`.
    """

    defaults: ClassVar[Mapping[str, Any]] = {
        "optimizer": "sgd",
        "lr": 0.1,
        "local_steps": 50,
        "epochs": 160,
    }

    @classmethod
    def wiring_for(cls, **own: Any) -> Wiring | None:
        """See :meth:`SampleTrainer.wiring_for`."""
        return wire_filters
