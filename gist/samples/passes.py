"""Shuffled passes over training samples, cut into batches.

Shape legend: ``N`` training samples, ``B`` samples of a batch, ``m`` shards, ``K`` clients, ζ local
steps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gist.errors import ConfigError, DataError
from gist.partition.streams import stream


class Passes:
    """Which samples every subnet sees in every step.

    The passes of a subnet go on from round to round: step ``k`` of a round is step ``round * ζ +
    k`` of an endless series of passes over the samples that the subnet sees, and every pass has an
    order of its own, named by (seed, subnet, pass). All batches have ``B`` samples, so that none is
    too small for BatchNorm: what is left of a pass is left out, other samples in each. Only where a
    subnet sees fewer than ``B`` samples, these are one batch.

    With given parts a subnet is a client, and a round one of this client's own tasks, counted from
    0: its batches depend on (seed, client, own task) alone, and cost what its own part costs.

    Args:
        samples: ``[N]`` int64 sample numbers.
        batch_size: ``B``.
        local_steps: ζ of the run, which a last round may fall short of.
        shards: ``m``: the samples are dealt into so many parts, whose sizes differ by at most one,
            at random by the seed of the run; subnet ``i`` sees part ``i % m`` alone in all rounds.
            None lets every subnet see all samples.
        parts: Instead of shards, those of ``K`` clients: positions in ``samples``, which may be in
            several parts, or in none; subnet ``i`` sees part ``i % K`` alone.

    Attributes:
        steps_per_epoch: Batches of one pass over all ``N`` samples, sharded or not.
        client_samples: ``[K]`` int64, samples of each client; None without parts.

    Raises:
        ConfigError: more shards than samples.
        DataError: a client without samples, or positions out of range.
    """

    client_samples: Tensor | None = None

    def __init__(
        self,
        samples: Tensor,
        batch_size: int,
        *,
        local_steps: int,
        shards: int | None = None,
        parts: Sequence[Tensor] | None = None,
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
        if parts is not None:
            assert shards is None, "clients have their own parts"
            self._take_parts(parts)

    @property
    def smallest_batch(self) -> int:
        """Samples of the smallest batch of any subnet."""
        fewest = len(self.samples) // (self.shards or 1)
        if self.client_samples is not None:
            fewest = int(self.client_samples.min())
        return min(self.batch_size, fewest)

    def seen_by(self, subnet: int, *, seed: int) -> Tensor:
        """The sample numbers that a subnet sees."""
        if self.client_samples is not None:
            client = subnet % len(self.client_samples)
            first, last = self._bounds[client : client + 2].tolist()
            return self._own[first:last]
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
        """Settings as JSON values; parts by a digest."""
        settings = {"batch_size": self.batch_size, "shards": self.shards}
        if self.client_samples is None:
            return settings
        digest = hashlib.sha256()
        for tensor in (self.client_samples, self._own):
            digest.update(tensor.numpy().data)
        return {**settings, "parts": digest.hexdigest()[:16]}

    def _take_parts(self, parts: Sequence[Tensor]) -> None:
        """Puts the samples of all clients one after the other."""
        sizes = torch.tensor([len(part) for part in parts])
        if not len(sizes) or not int(sizes.min()):
            raise DataError(
                "there are clients without samples",
                got=f"{int((sizes == 0).sum()):,} of {len(sizes):,} clients",
                expected="at least one sample for each",
                remedy="fewer clients, or another split",
            )
        positions = torch.cat([part.cpu() for part in parts])
        low, high = int(positions.min()), int(positions.max())
        if low < 0 or high >= len(self.samples):
            raise DataError(
                "a client's part names samples that do not exist",
                got=f"positions between {low} and {high}",
                expected=f"0 to {len(self.samples) - 1}",
            )
        self.client_samples = sizes
        self._bounds = F.pad(sizes.cumsum(0), (1, 0))
        self._own = self.samples[positions]

    def _steps(self, samples: int) -> int:
        return max(samples // self.batch_size, 1)
