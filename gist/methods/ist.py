"""Independent subnet training of fully connected networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from gist.methods.samples import SampleTrainer


class ISTTrainer(SampleTrainer):
    """IST: hidden neurons are dealt anew in every round (Yuan et al., VLDB 15(8), 2022).

    Neurons of every hidden layer are split without replacement; biases and BatchNorm entries follow
    their neuron, input and output layer are whole. Trained parameters are put back, not averaged.

    >>> model = gist.nn.MLP(784, 4096, 10, num_layers=3)
    >>> trainer = ISTTrainer(model, load_dataset("mnist"), num_subnets=4, epochs=20)
    >>> result = trainer.fit()

    Args:
        model: A :class:`gist.nn.MLP`, any ``nn.Sequential`` of linear layers, norms, activations
            and dropout, or another model with ``wiring``.
        data: As for :class:`SampleTrainer`, like everything else.
    """

    defaults: ClassVar[Mapping[str, Any]] = {"optimizer": "sgd", "lr": 0.1, "epochs": 20}
