"""Baselines over two workers are what they are in one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.baselines import runs
from tests.workers.spawn import run_workers

pytestmark = pytest.mark.xdist_group("workers")  # they share runs

AVERAGED = [case for case in runs.CASES if case.startswith("data-parallel")]
TO_ROUNDING = [*AVERAGED, "ensemble, stacked"]  # two stacked members are rounded as four are not
SAME_BITS = [case for case in runs.CASES if case not in TO_ROUNDING]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two workers wrote all that is looked at here."""
    folder = tmp_path_factory.mktemp("two")
    run_workers(str(Path(runs.__file__)), str(folder), workers=2, timeout=120)
    return folder


@pytest.fixture(scope="module")
def both(folder: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads((folder / "out.json").read_text())
    return found


def close(got: Any, expected: Any) -> bool:
    return torch.allclose(torch.tensor(got), torch.tensor(expected), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("case", SAME_BITS)
def test_two_workers_give_the_bits_of_one(both, case, folder, tmp_path):
    alone = json.loads(json.dumps(runs.outcome(case, out=tmp_path)))
    assert both[case]["workers"] == 2
    for what in ("weights", "rounds", "test"):
        assert both[case][what] == alone[what], what
    files = [load_file(path / "model.safetensors") for path in (tmp_path, folder / case)]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(tensor, files[1][name]) for name, tensor in files[0].items())


@pytest.mark.parametrize("case", TO_ROUNDING)
def test_two_workers_do_what_one_does(both, case, folder, tmp_path):
    alone = json.loads(json.dumps(runs.outcome(case, out=tmp_path)))
    assert both[case]["workers"] == 2
    assert close(both[case]["rounds"], alone["rounds"])
    for name, values in alone["weights"].items():
        assert close(both[case]["weights"][name], values), name
    assert both[case]["test"].keys() == alone["test"].keys()
    assert (folder / case / "model.safetensors").exists()


@pytest.mark.parametrize("case", AVERAGED)
def test_the_bytes_of_data_parallel_training_are_those_of_a_ring(both, case):
    model = runs.make(case).model
    gradients = sum(p.nbytes for p in model.parameters())
    buffers = sum(b.nbytes for b in model.buffers())
    steps = runs.SETTINGS["local_steps"]
    each = [steps * (2 * gradients * (2 - 1) // 2) * (r + 1) for r in range(3)]
    losses = 8 * runs.CASES[case]["num_subnets"] // 2  # as double precision numbers
    sent = [n + (buffers + losses) * (r + 1) for r, n in enumerate(each)]
    received = [n + losses * (r + 1) for r, n in enumerate(each)]  # rank 0's buffers count
    assert both[case]["bytes"] == [list(pair) for pair in zip(sent, received, strict=True)]


def test_an_ensemble_exchanges_losses_alone(both):
    assert both["ensemble"]["bytes"] == [[16, 8], [32, 16], [48, 24]]  # 2 and 1 of 3 members


@pytest.mark.parametrize("case", runs.CASES)
def test_a_checkpoint_of_two_workers_goes_on_in_one_process(both, case, folder, tmp_path):
    trainer = runs.make(case, out=tmp_path)
    result = trainer.fit(resume=folder / f"{case}, cut")
    assert len(result.history) == 3
    got = {name: tensor.tolist() for name, tensor in runs.weights(trainer).items()}
    if case in SAME_BITS:
        assert got == both[case]["weights"]
    else:
        assert all(close(got[name], values) for name, values in both[case]["weights"].items())


def test_batches_that_cannot_be_shared_out_are_refused(both):
    assert "num_subnets=3, 2 workers" in both["uneven"]
    assert "num_subnets=4" in both["uneven"]
