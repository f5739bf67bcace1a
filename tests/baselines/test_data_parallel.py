import pytest
import torch
from torch import nn

from gist import GISTTrainer, TrainConfig, load_dataset
from gist.baselines import DataParallelTrainer, full_model_settings
from gist.baselines.data_parallel import require_even_shares
from gist.errors import ConfigError, DivergedError
from gist.nn import GCN, GraphSAGE
from gist.partition.spec import model_tensors
from gist.partition.streams import ResumedStream, seeded

DATA = load_dataset("csbm", num_nodes=120, num_features=7, num_classes=3, seed=1)
SETTINGS = {"clusters": 6, "clusters_per_batch": 2, "local_steps": 2, "progress": False}


def gcn(**more):
    torch.manual_seed(0)
    return GCN(7, 16, 3, num_layers=3, **more)


def same(a, b):
    tensors = model_tensors(b.model)
    return all(torch.equal(t, tensors[n]) for n, t in model_tensors(a.model).items())


@pytest.mark.parametrize("norm", ["layer", "batch", None])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_one_batch_per_step_is_the_full_model(norm, optimizer):
    settings = {**SETTINGS, "epochs": 6, "optimizer": optimizer}
    full = GISTTrainer(gcn(norm=norm), DATA, **full_model_settings(settings))
    parallel = DataParallelTrainer(gcn(norm=norm), DATA, num_subnets=1, **settings)
    assert full.fit().history[-1].val_loss == parallel.fit().history[-1].val_loss
    assert same(full, parallel)


def test_the_gradients_of_a_step_are_the_mean_over_the_batches_of_the_subnets():
    rate, m = 0.1, 3
    trainer = DataParallelTrainer(
        gcn(), DATA, num_subnets=m, optimizer=lambda p: torch.optim.SGD(p, lr=rate),
        schedule="constant", rounds=2, **{**SETTINGS, "local_steps": 1},
    )  # fmt: skip
    trainer.fit()
    model, objective = gcn(), trainer.objective
    for round in range(2):
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        optimizer.zero_grad()
        for i in range(m):
            (batch,) = objective.batches(seed=0, round=round, subnet=i, steps=1)
            with seeded("train", 0, round, i):
                (objective.loss(model.train(), batch) / m).backward()
        optimizer.step()
        if trainer.result.best.round == round:
            expected = {name: t.clone() for name, t in model_tensors(model).items()}
    for name, tensor in model_tensors(trainer.model).items():
        torch.testing.assert_close(tensor, expected[name])


def test_the_budget_is_shared_by_the_batches():
    result = DataParallelTrainer(gcn(), DATA, num_subnets=4, epochs=12, **SETTINGS).fit()
    assert sum(record.local_steps for record in result.history) == 12 * 3 / 4
    assert result.history[-1].epochs == 12
    assert result.parameters_per_subnet == (result.num_parameters,) * 4
    assert result.bytes_sent == 0


def test_a_config_is_changed_too():
    config = TrainConfig(num_subnets=20, epochs=40, progress=False)  # more than there are units
    result = DataParallelTrainer(gcn(), DATA, config=config).fit()
    assert result.parameters_per_subnet == (result.num_parameters,) * 20


def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(tmp_path):
    settings = {**SETTINGS, "num_subnets": 2, "rounds": 4}
    through = DataParallelTrainer(gcn(), DATA, **settings)
    through.fit()
    cut = DataParallelTrainer(
        gcn(), DATA, **settings, out=tmp_path, checkpoint_every=1,
        callbacks=(lambda trainer, record: record.round == 1,),
    )  # fmt: skip
    cut.fit()
    resumed = DataParallelTrainer(gcn(), DATA, **settings)
    resumed.fit(resume=tmp_path)
    assert same(through, resumed)


def test_statistics_are_those_of_the_first_batch_and_those_of_others_leave_no_trace():
    norms = [m for m in gcn(norm="batch").modules() if isinstance(m, nn.BatchNorm1d)]
    assert norms
    trainer = DataParallelTrainer(gcn(norm="batch"), DATA, num_subnets=3, rounds=2, **SETTINGS)
    trainer.fit()
    counts = [
        t for n, t in model_tensors(trainer.model).items() if n.endswith("num_batches_tracked")
    ]
    assert counts
    assert all(int(count) == 2 * (trainer.result.best.round + 1) for count in counts)


def test_a_phase_with_fewer_batches_and_other_models_train():
    model = GraphSAGE(7, 16, 3, num_layers=2)
    schedule = [(0.5, 4), (0.5, 1)]
    result = DataParallelTrainer(model, DATA, num_subnets=schedule, epochs=8, **SETTINGS).fit()
    assert [r.num_subnets for r in result.history] == [4] * 2 + [1] * 6


def test_an_infinite_loss_names_the_batch():
    settings = {**SETTINGS, "local_steps": 1}
    trainer = DataParallelTrainer(gcn(), DATA, num_subnets=3, rounds=1, **settings)
    loss, seen = trainer.objective.loss, []

    def breaks_at_the_second(model, batch):
        seen.append(batch)
        return loss(model, batch) * (float("inf") if len(seen) == 2 else 1.0)

    trainer.objective.loss = breaks_at_the_second
    with pytest.raises(DivergedError, match="round 0, subnet 1"):
        trainer.fit()


def test_uneven_shares_and_a_store_on_disk_are_refused(tmp_path):
    require_even_shares(TrainConfig(num_subnets=6), 3)
    with pytest.raises(ConfigError, match="num_subnets=8"):
        require_even_shares(TrainConfig(num_subnets=6), 4)
    with pytest.raises(ConfigError, match="num_subnets=1, 2 workers"):
        require_even_shares(TrainConfig(num_subnets=[(0.5, 4), (0.5, 1)]), 2)
    with pytest.raises(ConfigError, match="in memory"):
        DataParallelTrainer(gcn(), DATA, num_subnets=2, store="disk", out=tmp_path)
    with torch.device("meta"):
        empty = gcn()
    with pytest.raises(ConfigError, match="meta"):
        DataParallelTrainer(empty, DATA, num_subnets=2)


def test_a_stream_goes_on_where_it_was_left():
    with seeded("a", 1):
        expected = torch.rand(6)
    before = torch.get_rng_state()
    one, other = ResumedStream("a", 1), ResumedStream("b")
    got = []
    for _ in range(3):
        with one.resumed():
            got.append(torch.rand(2))
        with other.resumed():
            torch.rand(5)
    assert torch.equal(torch.cat(got), expected)
    assert torch.equal(torch.get_rng_state(), before)
