"""The rounds of a run: the budget rule, split over subnets and phases."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gist.config import DEFAULT_EPOCHS, TrainConfig, learning_rate_factor
from gist.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RoundPlan:
    """One round, before it runs.

    Attributes:
        index: Counted from 0 over the whole run.
        num_subnets: m.
        rate_factors: For each local step, the factor on the base learning rate.
        epochs_spent: Budget spent once the round is done, in epochs summed over the subnets.
    """

    index: int
    num_subnets: int
    rate_factors: tuple[float, ...]
    epochs_spent: float

    @property
    def local_steps(self) -> int:
        """ζ of this round; the last round of a phase may be shorter."""
        return len(self.rate_factors)


def plan_rounds(config: TrainConfig, steps_per_epoch: int) -> list[RoundPlan]:
    """Splits the budget into rounds (GIST, section 5: the total epochs over the sub-GCNs).

    A phase with share ``s`` and ``m`` subnets gives each of them ``s * epochs / m`` epochs, in
    rounds of ζ steps, of which the last may be shorter.

    Raises:
        ConfigError: a phase is too short for a single step.
    """
    if config.fast_dev_run:
        m = config.phases[0][1]
        factors = tuple(learning_rate_factor(config.schedule, share) for share in (0.0, 0.5))
        spent = 2 * m / steps_per_epoch
        return [RoundPlan(index=0, num_subnets=m, rate_factors=factors, epochs_spent=spent)]
    plans: list[RoundPlan] = []
    spent = before = 0.0
    for share, m in config.phases:
        if config.rounds is not None:
            start_round, stop_round = (
                math.floor(s * config.rounds + 0.5) for s in (before, before + share)
            )
            steps = (stop_round - start_round) * config.local_steps
        else:
            steps = int((config.epochs or DEFAULT_EPOCHS) * share * steps_per_epoch / m + 1e-9)
        if steps < 1:
            raise ConfigError(
                "the budget is too small for a single step of every subnet",
                got=f"share {share:g} of epochs={config.epochs}, rounds={config.rounds} at m={m}",
                remedy="raise epochs, or lower num_subnets",
            )
        for start in range(0, steps, config.local_steps):
            stop = min(start + config.local_steps, steps)
            factors = tuple(
                learning_rate_factor(config.schedule, before + share * step / steps)
                for step in range(start, stop)
            )
            spent += (stop - start) * m / steps_per_epoch
            plans.append(
                RoundPlan(index=len(plans), num_subnets=m, rate_factors=factors, epochs_spent=spent)
            )
        before += share
    return plans
