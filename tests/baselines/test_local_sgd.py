from dataclasses import replace

import pytest
import torch

from gist import GISTTrainer, Whole, load_dataset
from gist.baselines import DataParallelTrainer, full_model_settings, local_sgd_settings
from gist.nn import GCN
from gist.partition.spec import model_tensors

DATA = load_dataset("csbm", num_nodes=120, num_features=7, num_classes=3, seed=1)
CLUSTERS = {"clusters": 6, "clusters_per_batch": 2, "progress": False}


def gcn(**more):
    torch.manual_seed(0)
    return GCN(7, 16, 3, num_layers=3, **more)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def test_every_subnet_holds_every_unit():
    assignment = Whole()({"a": 5, "b": 2}, 3, seed=0, round=4)
    assert assignment.round == 4
    assert all(
        units.tolist() == list(range(assignment.sizes[group]))
        for group, deal in assignment.held.items()
        for units in deal
    )
    assert assignment.coverage("b").tolist() == [3, 3]  # more subnets than units


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_replicas_that_see_the_same_are_plain_training(norm):
    common = {**CLUSTERS, "rounds": 3, "local_steps": 4, "executor": "serial"}
    plain = GISTTrainer(gcn(dropout=0, norm=norm), DATA, **full_model_settings(common))
    same = {"num_subnets": 3, "optimizer_state": "carry", "shared_batches": True}
    replicas = GISTTrainer(
        gcn(dropout=0, norm=norm), DATA, **local_sgd_settings({**common, **same}),
        recalibrate_bn=False,
    )  # fmt: skip
    for trainer in (plain, replicas):
        trainer.fit()
    expected = model_tensors(plain.model)
    assert all(torch.equal(t, expected[n]) for n, t in model_tensors(replicas.model).items())
    assert [r.val_loss for r in plain.history] == [r.val_loss for r in replicas.history]


@pytest.mark.parametrize("m", [2, 3])
def test_averaging_after_every_step_is_averaging_gradients(m):
    data = replace(DATA, x=DATA.x.double())
    settings = {
        **CLUSTERS,
        "num_subnets": m,
        "rounds": 6,
        "local_steps": 1,
        "optimizer": sgd,
        "keep_best": False,
    }
    local = GISTTrainer(gcn().double(), data, **local_sgd_settings(settings))
    parallel = DataParallelTrainer(gcn().double(), data, **settings)
    for trainer in (local, parallel):
        trainer.fit()
    start, expected = model_tensors(gcn().double()), model_tensors(local.model)
    for name, tensor in model_tensors(parallel.model).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-9, atol=1e-12)
        assert not torch.equal(tensor, start[name])


def test_replicas_see_batches_of_their_own():
    assert local_sgd_settings(CLUSTERS)["shared_batches"] is False
    assert local_sgd_settings({**CLUSTERS, "shared_batches": True})["shared_batches"] is True
    for settings in ({}, {**CLUSTERS, "executor": "stacked"}):  # the whole graph; stacked
        assert "shared_batches" not in local_sgd_settings(settings)


def test_the_budget_is_shared_by_the_replicas():
    settings = {**CLUSTERS, "epochs": 12, "local_steps": 2, "num_subnets": 4}
    result = GISTTrainer(gcn(), DATA, **local_sgd_settings(settings)).fit()
    steps = sum(record.local_steps for record in result.history)
    assert steps == 12 * 3 / 4  # three batches are an epoch
    assert result.history[-1].epochs == 12
    assert result.parameters_per_subnet == (result.num_parameters,) * 4
