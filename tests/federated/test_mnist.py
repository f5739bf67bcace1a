"""AsyncDrop on MNIST as its paper has it on CIFAR-10: 100 clients, two shards of labels each."""

from __future__ import annotations

from collections import Counter

import pytest

from gist import FederatedTrainer
from gist.experiment import Experiment

pytestmark = [pytest.mark.realdata, pytest.mark.slow]

SETTINGS = {
    "model": "mlp",
    "hidden": 128,
    "clients": 100,
    "in_flight": 10,
    "split": "label-shards",
    "fleet": "lognormal",
    "duration": 400.0,
    "local_steps": 20,
    "batch_size": 32,
    "lr": 0.05,
    "progress": False,
}


@pytest.fixture(scope="module")
def trained(real_data_root, tmp_path_factory):
    """Trainers after a run on the same clock, by strategy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GIST_DATA", str(real_data_root))
        data = Experiment(dataset="mnist", method="federated").load_data()
    runs: dict[str, FederatedTrainer] = {}
    for strategy in ("asyncdrop", "async-fedavg", "fedavg"):
        settings = {**SETTINGS, "strategy": strategy}
        experiment = Experiment(dataset="mnist", method="federated", settings=settings)
        runs[strategy] = experiment.trainer(data)
        runs[strategy].fit()
    return runs


def best(trainer: FederatedTrainer) -> float:
    return max(r.test_metric for r in trainer.history if r.test_metric is not None)


def test_the_asynchronous_ones_are_ahead_at_equal_time(trained):
    assert {t.history[-1].clock <= SETTINGS["duration"] for t in trained.values()} == {True}
    assert best(trained["asyncdrop"]) > best(trained["fedavg"]) + 0.05
    assert best(trained["asyncdrop"]) > 0.75


def test_narrower_subnets_are_merged_more_often_at_fewer_bytes_each(trained):
    narrow, whole = trained["asyncdrop"].report(), trained["async-fedavg"].report()
    assert narrow["merges"] > 1.2 * whole["merges"]
    each = [report["bytes_down"] / report["events"]["sent"] for report in (narrow, whole)]
    assert each[0] < 0.8 * each[1], "three quarters of the units of the only hidden layer"


def test_every_unit_is_trained_though_slow_clients_get_what_moved_most(trained):
    assert min(trained["asyncdrop"].report()["least_coverage"].values()) > 20
    events = Counter(e["event"] for e in trained["asyncdrop"].server.events)
    assert events["sent"] - events["merged"] <= SETTINGS["in_flight"]
