"""Shuffled passes over training samples, cut into batches.

Shape legend: ``N`` training samples, ``B`` samples of a batch, ``m`` shards, ζ local steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gist.errors import ConfigError
from gist.partition.streams import stream


class Passes:
    """Which samples every subnet sees in every step.

    The passes of a subnet go on from round to round: step ``k`` of a round is step ``round * ζ +
    k`` of an endless series of passes over the samples that the subnet sees, and every pass has an
    order of its own, named by (seed, subnet, pass). All batches have ``B`` samples, so that none is
    too small for BatchNorm: what is left of a pass is left out, other samples in each. Only where a
    subnet sees fewer than ``B`` samples, these are one batch.

    Args:
        samples: ``[N]`` int64 sample numbers.
        batch_size: ``B``.
        local_steps: ζ of the run, which a last round may fall short of.
        shards: ``m``: the samples are dealt into so many parts, whose sizes differ by at most one,
            at random by the seed of the run; subnet ``i`` sees part ``i % m`` alone in all rounds.
            None lets every subnet see all samples.

    Attributes:
        steps_per_epoch: Batches of one pass over all ``N`` samples, sharded or not.

    Raises:
        ConfigError: more shards than samples.
    """

    def __init__(
        self, samples: Tensor, batch_size: int, *, local_steps: int, shards: int | None = None
    ) -> None:
        if shards is not None and shards > len(samples):
            raise ConfigError(
                "there are more shards than training samples",
                got=f"{shards} shards of {len(samples)} samples",
                remedy="shards=False, or fewer subnets",
            )
        self.samples, self.batch_size = samples.cpu(), batch_size
        self.local_steps, self.shards = local_steps, shards
        self.steps_per_epoch = self._steps(len(samples))

    def seen_by(self, subnet: int, *, seed: int) -> Tensor:
        """The sample numbers that a subnet sees."""
        if self.shards is None:
            return self.samples
        order = torch.randperm(len(self.samples), generator=stream("shards", seed))
        return self.samples[order[subnet % self.shards :: self.shards]]

    def batches(self, *, seed: int, round: int, subnet: int, steps: int) -> Iterator[Tensor]:
        """Sample numbers ``[B]`` of the ``steps`` batches of one subnet in one round."""
        seen = self.seen_by(subnet, seed=seed)
        length, position = self._steps(len(seen)), round * self.local_steps
        while steps > 0:
            number, first = divmod(position, length)
            order = torch.randperm(len(seen), generator=stream("pass", seed, subnet, number))
            here = min(length - first, steps)
            for step in range(first, first + here):
                yield seen[order[step * self.batch_size : (step + 1) * self.batch_size]]
            position, steps = position + here, steps - here

    def describe(self) -> dict[str, Any]:
        """Settings as JSON values."""
        return {"batch_size": self.batch_size, "shards": self.shards}

    def _steps(self, samples: int) -> int:
        return max(samples // self.batch_size, 1)
