"""Counting live bytes against sizes known in advance."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gist.graph.live_bytes import LiveBytes, linear_bytes

KB = 1024
X = torch.zeros(4, 64)  # one kilobyte


def test_a_storage_counts_as_long_as_anything_views_it():
    with LiveBytes() as live:
        whole = X.clone()
        part = whole[:1].t()
        assert live.bytes == KB
        del whole
        assert live.bytes == KB
        del part
        assert live.bytes == 0
    assert live.peak == KB


def test_the_peak_is_what_lived_at_the_same_time():
    with LiveBytes() as live:
        y = X + 1
        for _ in range(5):
            y = y * 2  # the old one goes when the new one is there
        z = torch.cat([y, y])
    assert live.bytes == 3 * KB == live.peak
    del y, z


def test_what_is_written_in_place_or_was_there_before_does_not_count():
    out = torch.empty(4, 64)
    with LiveBytes() as live:
        torch.add(X, 1, out=out)
        out.mul_(2)
        view = out.view(-1)
        F.relu_(view)
    assert live.peak == 0


def test_a_file_mapped_into_memory_does_not_count(tmp_path):
    with LiveBytes() as live:
        mapped = torch.from_file(str(tmp_path / "x"), shared=True, size=256)
        mapped.fill_(1)
        assert live.peak == 0
        copy = mapped.clone()
    assert live.peak == copy.nbytes == KB


def test_linear_memory_is_found_exactly():
    def trial(rows: int) -> torch.Tensor:
        y = torch.relu(X.new_zeros(rows, 16))  # zeros and their relu: 2 x 64 bytes a row
        return torch.cat([y.sum()[None], X.flatten()])

    assert linear_bytes(trial, 256) == (0, 128)
    constant = X.numel() * 4 + 4
    fixed, each = linear_bytes(lambda rows: torch.cat([X.flatten(), X.new_zeros(1)]), 8)
    assert (fixed, each) == (constant + 4, 0)
