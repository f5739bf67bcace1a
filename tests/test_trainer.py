import json
import math

import numpy as np
import pytest
import torch
import torch_geometric.nn as pyg
from safetensors.torch import load_file
from torch import nn
from torch_geometric.data import Data

from gist import GISTTrainer, GraphData, load_dataset
from gist.config import TrainConfig
from gist.errors import CheckpointError, ConfigError, DataError, DivergedError, PartitionError
from gist.nn import GAT, GCN, GraphSAGE
from gist.partition.spec import model_tensors
from gist.runs import read_history

DATA = load_dataset(
    "csbm", num_nodes=150, num_features=8, num_classes=3, homophily=0.8, average_degree=8
)
SETTINGS = {"num_subnets": 2, "local_steps": 10, "epochs": 120}


def gcn(width: int = 16, **kwargs: object) -> GCN:
    torch.manual_seed(0)
    return GCN(DATA.num_features, width, DATA.num_classes, 3, **kwargs)


MODELS = {
    "gcn": lambda: gcn(),
    "gcn-batchnorm": lambda: gcn(norm="batch"),
    "gcn-plain": lambda: gcn(norm=None),
    "sage": lambda: GraphSAGE(8, 16, 3, 3),
    "sage-concat": lambda: GraphSAGE(8, 16, 3, 3, concat=True),
    "gat": lambda: GAT(8, 16, 3, 2, heads=4),
    "gat-heads": lambda: GAT(8, 32, 3, 2, heads=8, units="heads"),
    "pyg-gcn": lambda: pyg.GCN(8, 16, 2, 3, norm="batch_norm"),
    "pyg-gcn-cached": lambda: pyg.GCN(8, 16, 2, 3, cached=True),
    "pyg-sage": lambda: pyg.GraphSAGE(8, 16, 3, 3, jk="cat"),
    "pyg-gin": lambda: pyg.GIN(8, 16, 2, 3),
    "pyg-gat": lambda: pyg.GAT(8, 16, 2, 3, heads=2, v2=True),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_model_trains(name):
    torch.manual_seed(0)
    trainer = GISTTrainer(MODELS[name](), DATA, **SETTINGS)
    before = trainer.evaluate("train")["accuracy"]
    result = trainer.fit()
    assert result.history[-1].train_loss < result.history[0].train_loss
    assert trainer.evaluate("train")["accuracy"] > max(before, 0.5)
    assert trainer.evaluate("val")["accuracy"] == result.val_metric


@pytest.mark.parametrize("executor", ["serial", "stacked"])
def test_the_same_seed_gives_the_same_bits_and_another_does_not(executor):
    runs = []
    for seed in (0, 0, 1):
        trainer = GISTTrainer(gcn(), DATA, **SETTINGS, seed=seed, executor=executor)
        torch.rand(seed + 3)  # the global random state plays no part
        losses = [record.train_loss for record in trainer.fit().history]
        runs.append((losses, {n: t.clone() for n, t in model_tensors(trainer.model).items()}))
    assert runs[0][0] == runs[1][0]
    assert runs[0][0] != runs[2][0]
    assert all(torch.equal(t, runs[1][1][n]) for n, t in runs[0][1].items())


def test_the_global_random_state_and_the_modes_are_left_as_found():
    model = gcn().eval()
    model.convs[0].train()
    state = torch.get_rng_state()
    GISTTrainer(model, DATA, **SETTINGS).fit()
    assert torch.equal(state, torch.get_rng_state())
    assert not model.training
    assert model.convs[0].training


def test_the_model_holds_the_best_validation_round_at_the_end():
    trainer = GISTTrainer(gcn(), DATA, **SETTINGS, lr=0.05)
    result = trainer.fit()
    best = max(r.val_metric for r in result.history)
    assert result.val_metric == result.best.val_metric == best
    assert trainer.evaluate("test")["accuracy"] == result.test_metric
    assert result.last_test_metric == result.history[-1].test_metric


def test_the_result_counts_what_it_says():
    trainer = GISTTrainer(gcn(), DATA, **SETTINGS)
    result = trainer.fit()
    assert result.num_parameters == sum(p.numel() for p in trainer.model.parameters())
    half = 8 * 8 + 8 + 8 * 8 + 8 + 8 * 3 + 3  # both hidden layers 8 wide in each subnet
    assert result.parameters_per_subnet == (half, half)
    assert result.bytes_sent == result.bytes_received == 0
    assert 0 < result.repartition_seconds < result.seconds
    assert result.peak_memory_bytes > 50 * 2**20
    assert result.history[-1].epochs == 120


def test_saved_files_hold_the_run(tmp_path):
    trainer = GISTTrainer(gcn(), DATA, **SETTINGS, out=str(tmp_path))
    result = trainer.fit()
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors.keys() == model_tensors(trainer.model).keys()
    assert all(torch.equal(t, tensors[n]) for n, t in model_tensors(trainer.model).items())
    assert tuple(read_history(tmp_path / "history.jsonl")) == result.history
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["groups"] == {"hidden.0": 16, "hidden.1": 16}
    assert config["settings"]["num_subnets"] == 2
    assert json.loads((tmp_path / "result.json").read_text())["test_metric"] == result.test_metric
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_saved_run_can_be_loaded_into_a_fresh_trainer(tmp_path):
    trainer = GISTTrainer(gcn(), DATA, **SETTINGS)
    trainer.fit()
    trainer.save(tmp_path)
    fresh = GISTTrainer(gcn(), DATA, **SETTINGS)
    fresh.load(tmp_path)
    assert torch.equal(fresh.predict(), trainer.predict())
    other = GISTTrainer(gcn(width=12), DATA, **SETTINGS)
    with pytest.raises(CheckpointError, match=r"another model.*\(16.*\(12"):
        other.load(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        other.load(tmp_path / "nowhere")


def test_a_fresh_model_predicts_the_same_from_the_saved_file(tmp_path):
    trainer = GISTTrainer(gcn(), DATA, **SETTINGS, out=str(tmp_path))
    trainer.fit()
    fresh = pyg.GCN(8, 16, 3, 3, norm=nn.LayerNorm(16, elementwise_affine=False))
    fresh.load_state_dict(load_file(tmp_path / "model.safetensors"))
    expected = fresh.eval()(DATA.x, DATA.edge_index)
    assert torch.allclose(trainer.predict(), expected, atol=1e-5)


def test_annealing_runs_many_subnets_first():
    result = GISTTrainer(
        gcn(), DATA, num_subnets=[(0.5, 4), (0.25, 2), (0.25, 1)], local_steps=5, epochs=80
    ).fit()
    assert [r.num_subnets for r in result.history] == [4, 4, 2, 2, 1, 1, 1, 1]
    assert result.history[-1].epochs == 80
    assert len(result.parameters_per_subnet) == 1


def test_rounds_in_place_of_epochs():
    result = GISTTrainer(gcn(), DATA, num_subnets=4, local_steps=3, rounds=2).fit()
    assert [(r.local_steps, r.epochs) for r in result.history] == [(3, 12.0), (3, 24.0)]


def test_early_stopping_and_callbacks_and_sparse_evaluation():
    seen = []
    result = GISTTrainer(
        gcn(), DATA, num_subnets=2, local_steps=1, epochs=2000, early_stopping=4,
        callbacks=[lambda trainer, record: seen.append(record.round)],
    ).fit()  # fmt: skip
    assert len(result.history) == result.best.round + 1 + 4 < 1000
    assert seen == [r.round for r in result.history]

    sparse = GISTTrainer(gcn(), DATA, num_subnets=2, local_steps=5, epochs=70, eval_every=3).fit()
    assert [r.val_metric is not None for r in sparse.history] == [
        False, False, True, False, False, True, True,
    ]  # fmt: skip


def test_fitting_twice_is_refused_and_changes_nothing():
    trainer = GISTTrainer(gcn(), DATA, **SETTINGS)
    result = trainer.fit()
    with pytest.raises(ConfigError, match=r"fitted already.*resume"):
        trainer.fit()
    assert trainer.evaluate("test")["accuracy"] == result.test_metric


def test_fast_dev_run_is_two_steps():
    result = GISTTrainer(gcn(), DATA, num_subnets=4, fast_dev_run=True).fit()
    assert [r.local_steps for r in result.history] == [2]


@pytest.mark.parametrize(
    "optimizer", ["adam", "adamw", "sgd", lambda ps: torch.optim.RMSprop(ps, lr=2e-3)]
)
@pytest.mark.parametrize("state", ["reset", "carry"])
def test_optimizers(optimizer, state):
    lr = 0.1 if optimizer == "sgd" else 0.01
    result = GISTTrainer(
        gcn(), DATA, **SETTINGS, optimizer=optimizer, lr=lr, optimizer_state=state, clip_norm=1.0
    ).fit()
    assert result.history[-1].train_loss < result.history[0].train_loss


def test_the_schedule_reaches_the_optimizer():
    rates = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            rates.append([group["lr"] for group in self.param_groups])
            return super().step(closure)

    def factory(parameters):
        parameters = list(parameters)
        return Watched([{"params": parameters[:1], "lr": 2.0}, {"params": parameters[1:]}], lr=0.5)

    GISTTrainer(gcn(), DATA, num_subnets=1, local_steps=4, epochs=8, optimizer=factory).fit()
    factors = [1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01]
    assert rates == [[pytest.approx(2.0 * f), pytest.approx(0.5 * f)] for f in factors]


def test_batchnorm_statistics_are_those_of_the_merged_model():
    data = load_dataset("csbm", num_nodes=400, num_features=8, num_classes=3, seed=0)
    torch.manual_seed(0)
    model = GCN(8, 32, 3, 3, norm="batch", dropout=0.0)
    trainer = GISTTrainer(model, data, num_subnets=4, local_steps=5, epochs=80)
    trainer.fit()
    hidden = model.convs[0](data.x, data.adjacency)
    assert torch.allclose(model.norms[0].running_mean, hidden.mean(0), atol=1e-5)
    assert torch.allclose(model.norms[0].running_var, hidden.var(0), rtol=1e-3)


def test_recalibration_can_be_switched_off_and_keeps_momentum():
    model = gcn(norm="batch")
    GISTTrainer(model, DATA, **SETTINGS, recalibrate_bn=True).fit()
    assert model.norms[0].momentum == 0.1
    kept = gcn(norm="batch")
    GISTTrainer(kept, DATA, **SETTINGS, recalibrate_bn=False).fit()
    hidden = kept.convs[0](DATA.x, DATA.adjacency)
    assert not torch.allclose(kept.norms[0].running_var, hidden.var(0), rtol=1e-2)


def test_a_pyg_graph_can_be_handed_over():
    data = Data(
        x=DATA.x, edge_index=DATA.edge_index, y=DATA.y, train_mask=DATA.train_mask,
        val_mask=DATA.val_mask, test_mask=DATA.test_mask,
    )  # fmt: skip
    ours = GISTTrainer(gcn(), DATA, **SETTINGS, executor="stacked").fit()
    theirs = GISTTrainer(gcn(), data, **SETTINGS, executor="stacked").fit()
    assert [r.train_loss for r in ours.history] == [r.train_loss for r in theirs.history]


@pytest.mark.parametrize("task", ["binary", "multilabel"])
def test_other_tasks_train(task):
    y = (DATA.y == 0).float()
    if task == "multilabel":
        y = torch.stack([y, (DATA.y == 1).float()], dim=1)
    data = GraphData.from_edges(
        DATA.edge_index, DATA.x, y, train=DATA.train_mask, val=DATA.val_mask, test=DATA.test_mask,
        task=task, num_classes=None,
    )  # fmt: skip
    model = GraphSAGE(data.num_features, 16, data.num_classes, 2)
    trainer = GISTTrainer(model, data, **SETTINGS)
    result = trainer.fit()
    assert result.history[-1].train_loss < result.history[0].train_loss
    assert set(trainer.evaluate()) == {data.metric}
    assert trainer.predict().shape == (data.num_nodes, data.num_classes)


def test_a_training_split_without_both_labels_leaves_its_roc_auc_open():
    y = (DATA.y == 0).float()
    positive = DATA.train_mask & (DATA.y == 0)
    data = GraphData.from_edges(
        DATA.edge_index, DATA.x, y, train=positive, val=DATA.val_mask, test=DATA.test_mask,
        task="binary", metric="roc_auc",
    )  # fmt: skip
    trainer = GISTTrainer(GraphSAGE(8, 16, 1), data, num_subnets=2, fast_dev_run=True)
    assert trainer.fit().history[-1].train_metric is None
    assert 0 <= trainer.evaluate("test")["roc_auc"] <= 1
    with pytest.raises(ConfigError, match="roc_auc is not defined on the train split"):
        trainer.evaluate("train")


def test_divergence_names_round_and_subnet():
    with pytest.raises(DivergedError, match=r"round \d+, subnet \d+.*no longer finite.*lower lr"):
        GISTTrainer(gcn(norm=None), DATA, **SETTINGS, optimizer="sgd", lr=1e25).fit()


REFUSED = {
    "too many subnets": (lambda: GISTTrainer(gcn(), DATA, num_subnets=17), r"hidden\.0.*16 units"),
    "budget too small": (
        lambda: GISTTrainer(gcn(), DATA, num_subnets=8, epochs=4), r"budget is too small.*m=8",
    ),
    "no hidden layer": (
        lambda: GISTTrainer(pyg.GCN(8, 3, 1), DATA, num_subnets=2), "no hidden units",
    ),
    "wrong input width": (
        lambda: GISTTrainer(GCN(9, 16, 3), DATA, num_subnets=2), "cannot run on this data.*8",
    ),
    "other precision": (
        lambda: GISTTrainer(GCN(8, 16, 3).double(), DATA, num_subnets=2),
        r"got: model float64, features float32; remedy: model\.float\(\) or x\.double\(\)",
    ),
    "wrong output width": (
        lambda: GISTTrainer(GCN(8, 16, 4), DATA, num_subnets=2), r"another width.*4.*3",
    ),
    "lazy": (lambda: GISTTrainer(pyg.GCN(-1, 16, 2, 3), DATA, num_subnets=2), "lazy"),
    "unknown wiring": (
        lambda: GISTTrainer(nn.Linear(8, 3), DATA, num_subnets=2), r"wiring of Linear is not known",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_models_that_do_not_fit_are_refused_before_training(case):
    build, message = REFUSED[case]
    with pytest.raises((PartitionError, ConfigError), match=message):
        build()


def test_a_cache_of_another_graph_survives_the_checks_and_is_not_used_in_them():
    model = pyg.GCN(8, 16, 2, 3, cached=True)
    expected = model.eval()(DATA.x, DATA.edge_index)
    kept = model.convs[0]._cached_edge_index
    trainer = GISTTrainer(model, DATA, **SETTINGS)
    assert model.convs[0]._cached_edge_index is kept
    assert torch.equal(model(DATA.x, DATA.edge_index), expected)
    fresh = pyg.GCN(8, 16, 2, 3, cached=True)
    GISTTrainer(fresh, DATA, **SETTINGS)
    assert fresh.convs[0]._cached_edge_index is None
    assert trainer.fit().num_parameters


def test_a_directed_graph_is_refused_where_symmetry_is_needed():
    data = GraphData.from_edges(
        DATA.edge_index[:, ::2], DATA.x, DATA.y, train=DATA.train_mask, val=DATA.val_mask,
        test=DATA.test_mask, directed=True,
    )  # fmt: skip
    for model in (gcn(), pyg.GCN(8, 16, 2, 3)):
        with pytest.raises(DataError, match=r"GCN needs an undirected.*symmetrize=True"):
            GISTTrainer(model, data, num_subnets=2)
    GISTTrainer(GraphSAGE(8, 16, 3), data, num_subnets=2, fast_dev_run=True).fit()


def test_what_a_hurried_user_hands_over_is_refused_before_training(tmp_path):
    with pytest.raises(ConfigError, match="call the class"):
        GISTTrainer(GCN, DATA)
    with pytest.raises(PartitionError, match="no parameters"):
        GISTTrainer(nn.Identity(), DATA)
    frozen = gcn().requires_grad_(False)
    with pytest.raises(ConfigError, match="every parameter is frozen"):
        GISTTrainer(frozen, DATA, num_subnets=2)
    for optimizer in (lambda ps: None, torch.optim.LBFGS):
        with pytest.raises(ConfigError, match="without a closure"):
            GISTTrainer(gcn(), DATA, num_subnets=2, optimizer=optimizer)
    with pytest.raises(ConfigError, match="schedule must be a function"):
        GISTTrainer(gcn(), DATA, num_subnets=2, schedule=lambda share: None)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="out is no directory"):
        GISTTrainer(gcn(), DATA, num_subnets=2, out=tmp_path / "file")
    with pytest.raises(ConfigError, match="a checkpoint needs a directory"):
        GISTTrainer(gcn(), DATA, num_subnets=2).save_checkpoint()


def test_paths_numpy_numbers_and_one_callback_are_taken_as_they_are(tmp_path):
    seen = []
    trainer = GISTTrainer(
        gcn(), DATA, num_subnets=np.int64(2), local_steps=5, epochs=20, seed=np.int64(3),
        out=tmp_path / "run", callbacks=lambda trainer, record: seen.append(record.round),
    )  # fmt: skip
    trainer.fit()
    assert seen == [0, 1]
    assert (tmp_path / "run" / "result.json").exists()


def weighted(sign: float = 1.0) -> GraphData:
    return GraphData.from_edges(
        DATA.edge_index, DATA.x, DATA.y, train=DATA.train_mask, val=DATA.val_mask,
        test=DATA.test_mask, edge_weight=sign * torch.ones(DATA.num_edges),
    )  # fmt: skip


def test_edge_weights_are_used_or_refused():
    GISTTrainer(gcn(), weighted(), num_subnets=2, fast_dev_run=True).fit()
    GISTTrainer(pyg.GCN(8, 16, 2, 3), weighted(), num_subnets=2, fast_dev_run=True).fit()
    for model in (GraphSAGE(8, 16, 3, aggr="max"), pyg.GIN(8, 16, 2, 3), GAT(8, 16, 3)):
        with pytest.raises(DataError, match="does not use edge weights"):
            GISTTrainer(model, weighted(), num_subnets=2)
    with pytest.raises(DataError, match="edge weights of at least 0"):
        GISTTrainer(gcn(), weighted(-1.0), num_subnets=2)


def test_a_small_gin_keeps_its_last_inner_layer_whole():
    trainer = GISTTrainer(pyg.GIN(8, 16, 2, 3), DATA, num_subnets=8, fast_dev_run=True)
    assert min(trainer.spec.sizes.values()) == 16
    trainer.fit()


BAD_SETTINGS = {
    "num_subnets=0": {"num_subnets": 0},
    "num_subnets=1.5": {"num_subnets": 1.5},
    "shares": {"num_subnets": [(0.5, 2), (0.4, 1)]},
    "zero share": {"num_subnets": [(0.0, 2), (1.0, 1)]},
    "local_steps": {"local_steps": 0},
    "local_steps bool": {"local_steps": True},
    "epochs": {"epochs": -1},
    "epochs nan": {"epochs": math.nan},
    "both": {"epochs": 10, "rounds": 2},
    "lr": {"lr": 0},
    "weight_decay": {"weight_decay": -1e-3},
    "optimizer": {"optimizer": "adm"},
    "schedule": {"schedule": "linear"},
    "optimizer_state": {"optimizer_state": "keep"},
    "executor": {"executor": "stack"},
    "sampler": {"sampler": "uniform"},
    "clip_norm": {"clip_norm": 0},
    "eval_every": {"eval_every": 0},
    "early_stopping": {"early_stopping": 0},
    "checkpoint without out": {"checkpoint_every": 1},
    "seed": {"seed": "zero"},
    "lr none": {"lr": None},
    "deterministic": {"deterministic": "no"},
    "width_correction": {"width_correction": "x"},
    "progress": {"progress": 3},
    "callbacks": {"callbacks": [3]},
    "a callback": {"callbacks": 3},
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_settings_that_cannot_be_used_are_refused_by_name(case):
    settings = BAD_SETTINGS[case]
    with pytest.raises(ConfigError) as error:
        GISTTrainer(gcn(), DATA, **settings)
    named = next(iter(settings))
    assert named in str(error.value) or case == "both"


def test_an_unknown_setting_names_the_closest():
    with pytest.raises(ConfigError, match=r"'num_subnet'.*did you mean 'num_subnets'"):
        GISTTrainer(gcn(), DATA, num_subnet=2)
    with pytest.raises(ConfigError, match="either config or settings"):
        GISTTrainer(gcn(), DATA, config=TrainConfig(), lr=0.1)
    with pytest.raises(ConfigError, match="unknown split"):
        GISTTrainer(gcn(), DATA, num_subnets=2).evaluate("validation")
