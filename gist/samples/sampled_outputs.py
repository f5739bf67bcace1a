"""The loss over some of very many outputs.

Shape legend: ``B`` samples of a batch, ``C`` output columns, ``P`` of them labels of the batch,
``k`` drawn ones, ``S = P + k``.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from gist.csr import csr_tensor, is_csr, parts
from gist.partition.streams import stream_seed
from gist.samples.batches import SampleBatch


class SampledOutputs:
    """Sampled softmax: the labels of the batch, and ``k`` other outputs, drawn uniformly.

    The ``k`` columns ``D`` are drawn without replacement among the ``C - P`` that are no label of
    any sample of the batch. With ``L`` the labels of the batch and ``Y`` those of a sample, its
    loss is::

        log( Σ_{j in L} exp(z_j) + (C - P)/k Σ_{j in D} exp(z_j) ) - 1/|Y| Σ_{c in Y} z_c

    The sum in the logarithm is an unbiased estimate of the whole one, since each column outside
    ``L`` is in ``D`` with probability ``k / (C - P)``: the correction of sampled softmax (Jean et
    al., 2015) for labels that are always there. With ``k = C - P`` it is the whole loss. In code,
    ``log((C - P)/k)`` is added to the scores of ``D``.

    Args:
        num_outputs: ``C``.
        count: ``k``; all ``C - P`` where there are fewer.
    """

    def __init__(self, num_outputs: int, count: int) -> None:
        self.num_outputs, self.count = num_outputs, count

    def restrict(self, batch: SampleBatch, *key: int) -> SampleBatch:
        """The same batch with the columns that its loss is taken over, drawn under the key."""
        named = parts(batch.y)[1].long() if is_csr(batch.y) else batch.y
        labels, places = torch.unique(named, return_inverse=True)
        rest = self.num_outputs - len(labels)
        count = min(self.count, rest)
        drawn = self._drawn(labels.cpu(), rest, count, *key).to(labels)
        correction = torch.zeros(len(labels) + count, device=labels.device)
        correction[len(labels) :] = math.log(rest / count) if count else 0.0
        y = places
        if is_csr(batch.y):
            indptr, _, values = parts(batch.y)
            y = csr_tensor(indptr, places.to(indptr), values, len(correction))
        return replace(batch, y=y, outputs=torch.cat([labels, drawn]), correction=correction)

    @staticmethod
    def _drawn(labels: Tensor, rest: int, count: int, *key: int) -> Tensor:
        """``[count]`` different columns that are none of the sorted ``labels``."""
        numbers = np.random.default_rng(stream_seed("outputs", *key))
        ranks = torch.from_numpy(numbers.choice(rest, count, replace=False, shuffle=False))
        # the columns before label i that are no label number labels[i] - i
        before = labels - torch.arange(len(labels))
        return ranks + torch.searchsorted(before, ranks, right=True)
