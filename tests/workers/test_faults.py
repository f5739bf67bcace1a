"""Nothing is lost: killed workers, cut files, SIGTERM, other numbers of workers."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from gist.checkpoint import load_checkpoint
from gist.errors import CheckpointError
from gist.execution.comm import listen
from tests.workers import faults
from tests.workers.equal import digest
from tests.workers.spawn import SCRIPTS, environment, run_workers, torchrun


@pytest.fixture(scope="module")
def undisturbed() -> str:
    """The final weights of the run in one process."""
    run = faults.trainer()
    run.fit()
    return digest(run.model)


def settings(**given: Any) -> str:
    return json.dumps({k: str(v) if isinstance(v, Path) else v for k, v in given.items()})


@pytest.fixture(scope="module")
def halfway(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of four workers that stopped after three rounds of six."""
    out = tmp_path_factory.mktemp("halfway") / "run"
    run_workers("faults.py", settings(out=out, stop_after=3), workers=4)
    return out


@contextmanager
def running(command: list[str], **env: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**env),
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            for child in [*psutil.Process(process.pid).children(recursive=True), process]:
                child.kill()
            process.communicate()


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"no {text!r}:\n{process.communicate()[1]}")


def test_killed_workers_change_nothing(undisturbed: str, tmp_path: Path):
    result = tmp_path / "digest"
    kill = [[0, 1, 2], [1, 0, 4]]
    done = torchrun(
        "faults.py",
        settings(out=tmp_path / "run", result=result, kill=kill),
        workers=2,
        max_restarts=2,
    )
    assert "round 3 of attempt 1 is over" in done.stdout
    assert "round 2 of attempt 0 is over" not in done.stdout
    assert "round 5 of attempt 2 is over" in done.stdout
    assert result.read_text() == undisturbed


@pytest.mark.slow
def test_two_agents_restart_together(undisturbed: str, tmp_path: Path):
    """Agents of torchrun count restarts apart: only that of the dead worker's counts one."""
    listener = listen("127.0.0.1")
    port = listener.getsockname()[1]
    listener.close()
    result = tmp_path / "digest"
    given = settings(out=tmp_path / "run", result=result, kill=[[0, 1, 2]])
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"),
        *("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=two"),
        *("--local-addr=127.0.0.1", "--max-restarts=2", "--monitor-interval=0.1"),
        *(str(SCRIPTS / "faults.py"), given),
    ]
    agents = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
        )
        for _ in range(2)
    ]
    try:
        outputs = [agent.communicate(timeout=180) for agent in agents]
    finally:
        for agent in agents:
            if agent.poll() is None:
                for child in [*psutil.Process(agent.pid).children(recursive=True), agent]:
                    child.kill()
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert result.read_text() == undisturbed


@pytest.mark.xdist_group("workers")
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_run_goes_on_with_other_numbers_of_workers(
    halfway: Path, undisturbed: str, workers: int, tmp_path: Path
):
    given = settings(resume=halfway, result=tmp_path / "digest")
    run_workers("faults.py", given, workers=workers)
    assert (tmp_path / "digest").read_text() == undisturbed


@pytest.mark.xdist_group("workers")
def test_a_run_of_workers_goes_on_in_one_process(halfway: Path, undisturbed: str):
    run = faults.trainer()
    run.fit(resume=halfway)
    assert digest(run.model) == undisturbed


@pytest.mark.xdist_group("workers")
def test_a_run_of_one_process_goes_on_with_workers(undisturbed: str, tmp_path: Path):
    run = faults.trainer(
        out=tmp_path / "run", checkpoint_every=1, callbacks=(lambda _, r: r.round == 2,)
    )
    run.fit()
    given = settings(resume=tmp_path / "run", result=tmp_path / "digest")
    run_workers("faults.py", given, workers=2)
    assert (tmp_path / "digest").read_text() == undisturbed


@pytest.mark.xdist_group("workers")
def test_every_rank_wrote_its_part(halfway: Path):
    checkpoint = load_checkpoint(halfway)
    assert checkpoint.folder.name == "round-000003"
    for name in ("model", "best", "executor"):
        files = checkpoint.files(name)
        assert len(files) == 4
        sizes = [file.stat().st_size for file in files]
        assert max(sizes) < 0.5 * sum(sizes)


@pytest.mark.xdist_group("workers")
def test_a_checkpoint_cut_short_anywhere_is_passed_over(halfway: Path, tmp_path: Path):
    newest = load_checkpoint(halfway).folder
    for file in sorted(newest.iterdir()):
        data = file.read_bytes()
        step = max(len(data) // 12, 1)
        for cut in [*range(0, len(data), step), len(data) - 1, None]:
            copy = tmp_path / "run"
            shutil.copytree(halfway, copy)
            damaged = copy / "checkpoints" / newest.name / file.name
            damaged.unlink() if cut is None else damaged.write_bytes(data[:cut])
            assert load_checkpoint(copy).folder.name == "round-000002", (file.name, cut)
            shutil.rmtree(copy)


@pytest.mark.xdist_group("workers")
def test_a_write_that_was_interrupted_is_no_checkpoint(halfway: Path, tmp_path: Path):
    copy = tmp_path / "run"
    shutil.copytree(halfway, copy)
    for folder in (copy / "checkpoints").iterdir():
        folder.rename(folder.with_name(f".writing-{folder.name}"))
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        load_checkpoint(copy)


@pytest.mark.xdist_group("workers")
@pytest.mark.parametrize("lost", [0, 2])
def test_the_others_name_the_worker_that_died(lost: int):
    listener = listen("127.0.0.1")
    port = str(listener.getsockname()[1])
    listener.close()
    given = settings(kill=[[0, lost, 2]], worker_timeout=900)
    no_agent = {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": port}
    ended = run_workers("faults.py", given, workers=3, timeout=240, check=False, **no_agent)
    for rank, done in enumerate(ended):  # long before the worker_timeout
        if rank == lost:
            assert done.returncode == -signal.SIGKILL
        else:
            assert done.returncode == 1, done.stderr
            assert f"WorkerLostError: rank {rank} stops, because rank {lost} is gone" in done.stderr


@pytest.mark.parametrize("workers", [1, 2])
def test_sigterm_ends_the_round_and_keeps_it(workers: int, undisturbed: str, tmp_path: Path):
    out = tmp_path / "run"
    script = [str(SCRIPTS / "faults.py"), settings(out=out, slow=0.3)]
    command = [sys.executable, *script]
    if workers > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
        command = [sys.executable, *launcher, *script]
    with running(command) as process:
        wait_for(process, "round 1 of")
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=60)
        assert process.returncode == (143 if workers == 1 else 1), output
        assert not psutil.wait_procs(children, timeout=10)[1], "no process is left"
    rounds = len(load_checkpoint(out).state["history"])
    assert 2 <= rounds < faults.ROUNDS
    run = faults.trainer()
    run.fit(resume=out)
    assert digest(run.model) == undisturbed


@pytest.mark.xdist_group("workers")
def test_workers_that_differ_are_refused():
    ended = run_workers("odd.py", workers=2)
    for what, named in (
        ("subnets", "num_subnets"),
        ("out", "out"),
        ("patience", "early_stopping"),
        ("capacities", "capacities"),
        ("memory", "in memory"),
    ):
        for rank, done in enumerate(ended):
            (said,) = [line for line in done.stdout.splitlines() if f"{rank} {what}:" in line]
            assert "the workers were started on different runs" in said
            assert ("differs from rank 0 in " in said) == (rank == 1)
            assert named in said or rank == 0


def test_nothing_listens_on_other_addresses(tmp_path: Path):
    """``gist train --workers``: neither stores nor Gloo are reachable from outside."""
    train = ["digits", "--subnets", "2", "--epochs", "100000", "--workers", "2"]
    kept = ["--checkpoint-every", "1", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "gist", "train", *train, *kept]
    with running(command) as process:
        parent, seen = psutil.Process(process.pid), set[str]()
        deadline = time.monotonic() + 90
        while not list(tmp_path.glob("checkpoints/round-*")):
            assert time.monotonic() < deadline, "no round was ever over"
            for each in [parent, *parent.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    connections = each.net_connections("tcp")
                    seen |= {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}
            time.sleep(0.1)
        assert len(parent.children()) == 2
        assert seen == {"127.0.0.1"}
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=60)
        assert process.returncode == 143, output
    assert load_checkpoint(tmp_path).state["history"]
