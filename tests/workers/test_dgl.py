"""A model of DGL's layers gives the same bits on two workers as in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.workers.dgl_net import Net, train
from tests.workers.spawn import run_workers


@pytest.mark.xdist_group("workers")
def test_two_workers_give_the_bits_of_one_process(tmp_path: Path):
    path = tmp_path / "model.pt"
    run_workers("dgl_net.py", str(path), workers=2)
    got, alone = torch.load(path), train()
    assert alone is not None
    expected = alone.state_dict()
    assert got.keys() == expected.keys()
    assert [name for name in got if not torch.equal(got[name], expected[name])] == []
    torch.manual_seed(0)
    started = Net().state_dict()
    assert not any(torch.equal(got[n], started[n]) for n in got if n.endswith("weight"))
