import pytest
import torch
import torch_geometric.nn as pyg
from torch.optim import Adam

from gist import Fixed, GISTTrainer, load_dataset
from gist.baselines import EnsembleTrainer, full_model_settings
from gist.errors import CheckpointError, ConfigError
from gist.execution.comm import Comm
from gist.execution.members import MemberStore
from gist.metrics import mean_prediction
from gist.nn import GAT, GCN
from gist.partition.spec import model_tensors
from gist.partition.streams import seeded
from gist.partition.subnet import build_subnet
from gist.partition.wiring import partition_spec

DATA = load_dataset("csbm", num_nodes=120, num_features=7, num_classes=3, seed=1)
SETTINGS = {"clusters": 6, "clusters_per_batch": 2, "local_steps": 2, "progress": False}


def gcn(**more):
    torch.manual_seed(0)
    return GCN(7, 16, 3, num_layers=3, **more)


def copies(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(t, other[n]) for n, t in one.items())


@pytest.mark.parametrize("norm", ["layer", "batch", None])
def test_one_member_is_the_full_model(norm):
    settings = {**SETTINGS, "epochs": 6}
    full = GISTTrainer(gcn(norm=norm), DATA, **full_model_settings(settings))
    ensemble = EnsembleTrainer(gcn(norm=norm), DATA, num_subnets=1, **settings)
    assert full.fit().val_metric == ensemble.fit().val_metric
    assert torch.equal(full.predict(), ensemble.predict())
    assert full.evaluate("test") == ensemble.evaluate("test")


def test_members_are_subnets_of_round_0_each_trained_on_its_own():
    m, rounds = 3, 3
    trainer = EnsembleTrainer(
        gcn(norm=None), DATA, num_subnets=m, rounds=rounds, executor="serial", keep_best=False,
        weight_decay=0.0, schedule="constant", **SETTINGS,
    )  # fmt: skip
    before = copies(model_tensors(trainer.model))
    trainer.fit()
    assert equal(model_tensors(trainer.model), before)
    assignment = trainer.assign(trainer.rounds[0])
    objective = trainer.objective
    for i in range(m):
        alone = build_subnet(gcn(norm=None), trainer.spec, assignment, i).train()
        optimizer = Adam(alone.parameters(), lr=0.01, fused=True)
        for round in range(rounds):
            with seeded("train", 0, round, i):
                for batch in objective.batches(seed=0, round=round, subnet=i, steps=2):
                    optimizer.zero_grad()
                    objective.loss(alone, batch).backward()
                    optimizer.step()
        assert equal(model_tensors(trainer.member(i)), model_tensors(alone))


def test_what_one_member_saves_changes_no_other():
    model = gcn()
    spec = partition_spec(model)
    assignment = Fixed()(spec.sizes, 3, seed=0, round=0)
    store = MemberStore(model, spec, assignment, Comm())
    before = {i: copies(member) for i, member in store.members.items()}
    assert store.members[0]["convs.2.bias"].shape == store.members[1]["convs.2.bias"].shape
    with store.open(assignment) as transfer:
        transfer.save({name: tensor + 1 for name, tensor in before[0].items()})
    assert not equal(store.members[0], before[0])
    assert equal(store.members[1], before[1])
    assert equal(store.members[2], before[2])


def test_the_partition_is_that_of_round_0_in_every_round():
    deals = [Fixed()({"a": 7}, 3, seed=1, round=r) for r in range(3)]
    assert [deal.round for deal in deals] == [0, 1, 2]
    first = deals[0].held["a"]
    for deal in deals[1:]:
        assert all(torch.equal(a, b) for a, b in zip(deal.held["a"], first, strict=True))


def test_the_prediction_is_the_mean_of_the_members_probabilities():
    trainer = EnsembleTrainer(gcn(), DATA, num_subnets=4, rounds=2, **SETTINGS)
    result = trainer.fit()
    scores = [trainer.member(i)(DATA.x, DATA.adjacency) for i in range(4)]
    mean = torch.stack([each.softmax(1) for each in scores]).mean(0)
    torch.testing.assert_close(trainer.predict().softmax(1), mean)
    right = (mean.argmax(1) == DATA.y)[DATA.test_mask].float().mean()
    assert float(right) == pytest.approx(result.test_metric)
    assert result.val_metric == max(record.val_metric for record in result.history)


@pytest.mark.parametrize("task", ["multiclass", "multilabel", "binary"])
def test_mean_prediction(task):
    logits = [torch.randn(6, 1 if task == "binary" else 3) * 5 for _ in range(4)]
    assert mean_prediction(task, logits[:1]) is logits[0]
    to = (lambda z: z.softmax(1)) if task == "multiclass" else torch.sigmoid
    mean = torch.stack([to(each) for each in logits]).mean(0)
    torch.testing.assert_close(to(mean_prediction(task, iter(logits))), mean)
    far = [torch.tensor([[400.0, -400.0, 0.0]]), torch.tensor([[300.0, -500.0, 0.0]])]
    assert torch.isfinite(mean_prediction(task, far)).all()


def test_the_budget_is_shared_by_the_members():
    result = EnsembleTrainer(gcn(), DATA, num_subnets=4, epochs=12, **SETTINGS).fit()
    assert sum(record.local_steps for record in result.history) == 12 * 3 / 4
    assert result.history[-1].epochs == 12
    assert result.num_parameters == sum(result.parameters_per_subnet)
    assert result.num_parameters < sum(p.numel() for p in gcn().parameters())


def test_other_models_and_uneven_widths():
    for model in (GAT(7, 16, 3, 2, heads=4), pyg.GCN(7, 17, 2, 3, norm="batch_norm")):
        result = EnsembleTrainer(model, DATA, num_subnets=4, rounds=1, **SETTINGS).fit()
        assert len(result.parameters_per_subnet) == 4


@pytest.mark.parametrize("executor", ["serial", "stacked"])
def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(executor, tmp_path):
    settings = {**SETTINGS, "num_subnets": 3, "rounds": 4, "executor": executor}
    through = EnsembleTrainer(gcn(), DATA, **settings)
    through.fit()
    cut = EnsembleTrainer(
        gcn(), DATA, **settings, out=tmp_path, checkpoint_every=1,
        callbacks=(lambda trainer, record: record.round == 1,),
    )  # fmt: skip
    cut.fit()
    resumed = EnsembleTrainer(gcn(), DATA, **settings)
    resumed.fit(resume=tmp_path)
    assert torch.equal(through.predict(), resumed.predict())
    again = EnsembleTrainer(gcn(), DATA, **settings)
    again.load(tmp_path)
    assert torch.equal(again.predict(), cut.predict())
    with pytest.raises(CheckpointError, match="another ensemble"):
        EnsembleTrainer(gcn(), DATA, **{**settings, "num_subnets": 2}).load(tmp_path)


def test_what_an_ensemble_cannot_do_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="one number of members"):
        EnsembleTrainer(gcn(), DATA, num_subnets=[(0.5, 4), (0.5, 1)])
    with pytest.raises(ConfigError, match="in memory"):
        EnsembleTrainer(gcn(), DATA, num_subnets=2, store="disk", out=tmp_path)
    trainer = EnsembleTrainer(gcn(), DATA, num_subnets=2)
    with pytest.raises(ConfigError, match="no such member"):
        trainer.member(2)
    with pytest.raises(ConfigError, match="not one model"):
        trainer.gather_model()
