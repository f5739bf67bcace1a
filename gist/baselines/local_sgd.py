"""Local SGD: replicas of the whole model that train apart and are averaged every ζ steps."""

from __future__ import annotations

from typing import Any

from gist.partition.samplers import Whole


def local_sgd_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run, changed so that each subnet is a replica of the whole model.

    ``num_subnets`` is the number of replicas, which share the budget as subnets do; merging takes
    their mean (GIST, table 6; Stich, arXiv 1805.09767). Replicas that saw the same batches would be
    one model but for dropout: where there are batches, each gets its own, unless the settings say
    otherwise.
    """
    batches = any(settings.get(name) is not None for name in ("clusters", "batches"))
    if batches and settings.get("executor") != "stacked":
        settings = {"shared_batches": False, **settings}
    return {**settings, "sampler": Whole()}
