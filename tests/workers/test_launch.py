"""``gist train --workers`` and what is refused before any worker is started."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gist import ConfigError, GISTTrainer, load_dataset
from gist.cli import app
from gist.execution.comm import Comm, join, listen
from gist.nn import GCN
from gist.termination import Termination
from tests.workers.spawn import environment, run_workers

TRAIN = ["train", "digits", "--rounds", "2", "--local-steps", "2", "--executor", "serial"]
DATA = load_dataset("csbm", num_nodes=60, num_features=5, num_classes=3, seed=1)


def gist(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gist", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(),
        check=False,
    )


def test_workers_leave_behind_what_one_process_does(tmp_path: Path):
    alone, two = (
        ["--out", str(tmp_path / name), "--json", str(tmp_path / f"{name}.json")]
        for name in ("alone", "two")
    )
    assert CliRunner().invoke(app, [*TRAIN, *alone]).exit_code == 0
    done = gist(*TRAIN, "--workers", "2", *two)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("test") == 1, "one worker reports for all"
    alone, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("alone", "two"))
    assert (alone["workers"], two["workers"]) == (1, 2)
    assert two["bytes_sent"] > 0
    for key in ("test_metric", "val_metric", "last_test_metric", "best_round", "num_parameters"):
        assert alone[key] == two[key]
    models = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("alone", "two")]
    assert models[0] == models[1]
    assert {p.name for p in (tmp_path / "two").iterdir()} == {
        *("model.safetensors", "config.json", "history.jsonl", "result.json")
    }


def test_a_mistake_is_one_line_of_each_worker(tmp_path: Path):
    done = gist(*TRAIN, "--workers", "2", "--data", "num_classes=5")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "error of worker" in done.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--workers", "5"], ["more workers than subnets", "5 workers, num_subnets=4"]),
        (["--workers", "5", "--method", "local-sgd"], ["more workers than subnets"]),
        (["--workers", "2", "--capacities", "1,x"], ["cannot read capacities", "1,x"]),
        (["--workers", "2", "--capacities", "1,-1"], ["capacities must be positive"]),
        (["--workers", "2", "--backend", "mpi"], ["backend", "nccl", "gloo"]),
        (["--workers", "2", "--worker-timeout", "0"], ["worker_timeout must be a positive"]),
        (["--executor", "distributed"], ["executor='distributed' needs workers", "torchrun"]),
    ],
)
def test_what_cannot_be_is_refused_at_once(options: list[str], words: list[str]):
    done = CliRunner().invoke(app, ["train", "digits", "--subnets", "4", *options])
    assert isinstance(done.exception, ConfigError), done.output
    for word in words:
        assert word in str(done.exception)


def test_capacities_need_a_random_partition():
    from gist import Overlapping

    with pytest.raises(ConfigError, match="capacities size the subnets of a random partition"):
        GISTTrainer(GCN(5, 8, 3, 2), DATA, sampler=Overlapping(2), capacities=(1.0, 2.0))


def test_measured_capacities_are_kept_when_a_run_goes_on(tmp_path: Path, monkeypatch):
    def trainer(speed: float, **more: object) -> GISTTrainer:
        monkeypatch.setattr("gist.agreement.measure_speed", lambda device: speed)
        model = GCN(5, 8, 3, 2)
        return GISTTrainer(
            *(model, DATA),
            **{"num_subnets": 2, "rounds": 2, "local_steps": 1, "capacities": "measured", **more},
        )

    first = trainer(3.0, out=tmp_path, checkpoint_every=1)
    assert first.capacities == (1.0,)
    first.capacities = (1.0, 0.3)  # as two workers would have found
    first.fit()
    again = trainer(1.0)
    again.load_checkpoint(tmp_path / "checkpoints" / "round-000001")
    assert again.capacities == (1.0, 0.3)
    widths = [again.assign(again.rounds[1]).widths(i)["hidden.0"] for i in range(2)]
    assert widths[0] > widths[1]


def test_a_process_on_its_own_is_alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    comm = join(__import__("torch").device("cpu"))
    assert (comm.rank, comm.size, comm.is_distributed, comm.ranks_here) == (0, 1, False, 1)
    assert comm.gather_values({"a": 1}) == [{"a": 1}]
    assert comm.on_main(lambda: 3) == 3
    assert Comm().sent == 0


def test_a_socket_listens_on_the_address_that_it_was_given():
    with listen("127.0.0.1") as listener:
        assert listener.getsockname()[0] == "127.0.0.1"


def test_sigterm_is_left_alone_where_nothing_is_kept():
    import signal

    before = signal.getsignal(signal.SIGTERM)
    with Termination(watch=False):
        assert signal.getsignal(signal.SIGTERM) is before
    with Termination(watch=True) as termination:
        signal.raise_signal(signal.SIGTERM)
        assert termination.asked
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.xdist_group("workers")
def test_a_script_goes_on_after_a_distributed_run(tmp_path: Path):
    ended = run_workers("after.py", str(tmp_path), workers=2)
    assert all(f"OK {rank}" in done.stdout.split("\n") for rank, done in enumerate(ended))
