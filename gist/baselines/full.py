"""The full model: ordinary training."""

from __future__ import annotations

from typing import Any


def full_model_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run, changed so that it is ordinary training of the whole model.

    One subnet that holds every unit, and an optimiser that is never reset: bit for bit the loop
    that one would write by hand (with PyTorch's fused optimiser), evaluated every ``local_steps``
    steps.
    """
    return {**settings, "num_subnets": 1, "optimizer_state": "carry"}
