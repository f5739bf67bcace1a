"""The data side of a run on samples: loss, metrics, and the models that it refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from gist.config import SampleConfig
from gist.csr import is_csr
from gist.errors import ConfigError, PartitionError
from gist.metrics import METRICS, compute_metric, loss
from gist.partition.streams import stream
from gist.samples.data import SampleData
from gist.samples.loader_data import LoaderData
from gist.samples.objective import SampleObjective
from gist.samples.transforms import ImageTransform, Scale

CPU = torch.device("cpu")
ONE = {"seed": 0, "round": 0, "subnet": 0}


class Net(nn.Module):
    """Linear scores of dense or sparse samples, or of some outputs alone."""

    accepts_outputs = True

    def __init__(self, inputs: int, outputs: int, dropout: float = 0.5) -> None:
        super().__init__()
        generator = stream("net", inputs, outputs)
        self.weight = nn.Parameter(torch.randn(inputs, outputs, generator=generator))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, outputs: Tensor | None = None) -> Tensor:
        weight = self.weight if outputs is None else self.weight[:, outputs]
        if is_csr(x):
            return x @ weight
        return self.dropout(x.flatten(1)) @ weight


def rows(count: int = 60) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 4, generator=stream("rows")), torch.arange(count) % 3


def labels(columns: int = 6) -> Tensor:
    return (torch.rand(60, columns, generator=stream("labels")) < 0.4).float()


def images() -> Tensor:
    return torch.randint(256, (60, 1, 4, 4), generator=stream("images")).to(torch.uint8)


KINDS = {
    "rows": lambda: SampleData.of(rows(), transform=Scale(mean=0.5, std=2.0)),
    "images": lambda: SampleData.of(
        (images(), rows()[1]), transform=ImageTransform(pad=2, flip=True)
    ),
    "bags": lambda: SampleData.of((rows()[0].relu().to_sparse_csr(), rows()[1])),
    "labels": lambda: SampleData.of((rows()[0], labels()), metric="roc_auc"),
    "many": lambda: SampleData.of((rows()[0], labels().to_sparse_csr()), metric="precision@3"),
    "loaders": lambda: loaders(),
}


def loaders() -> LoaderData:
    parts = [TensorDataset(*(t[a:b] for t in rows())) for a, b in ((0, 40), (40, 50), (50, 60))]
    train, val, test = (DataLoader(part, batch_size=8, shuffle=True) for part in parts)
    return LoaderData(train=train, val=val, test=test, num_classes=3)


def made(data: SampleData | LoaderData, **settings) -> SampleObjective:
    config = SampleConfig(**{"batch_size": 8, "eval_batch_size": 7, **settings})
    return SampleObjective(data, CPU, config, num_subnets=2, local_steps=3)


def net(data: SampleData | LoaderData) -> Net:
    return Net(data.example()[0].numel(), data.num_classes)


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_are_those_of_all_scores_at_once(kind):
    data = KINDS[kind]()
    objective, model = made(data), net(data)
    before = torch.get_rng_state()
    found = objective.evaluate(model)
    assert model.training
    assert model.dropout.training
    assert torch.equal(torch.get_rng_state(), before)
    assert set(found) == {"train_metric", "val_metric", "test_metric", "val_loss"}
    for split in ("train", "val", "test"):
        y = torch.cat([_dense(y) for _, y in data.scored(split, batch_size=9)])
        scores = objective.predict(model, split)
        assert not scores.requires_grad
        assert found[f"{split}_metric"] == compute_metric(data.metric, scores, y)
        if split == "val":
            y = y.to_sparse_csr() if kind == "many" else y
            assert found["val_loss"] == pytest.approx(float(loss(data.task, scores, y)), rel=1e-5)


def _dense(y: Tensor) -> Tensor:
    return y.to_dense() if is_csr(y) else y


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_the_scores_and_learns(kind):
    data = KINDS[kind]()
    objective = made(data)
    model = Net(data.example()[0].numel(), data.num_classes, dropout=0.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = []
    for batch in objective.batches(**ONE, steps=40):
        value = objective.loss(model, batch)
        assert torch.equal(value, loss(data.task, model(batch.x), batch.y))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert sum(losses[-6:]) < sum(losses[:6])


@pytest.mark.parametrize("kind", [*KINDS])
def test_stacked_outputs_have_the_loss_of_each(kind):
    data = KINDS[kind]()
    objective = made(data)
    (batch,) = objective.batches(**ONE, steps=1)
    scores = torch.randn(8, 3, data.num_classes, dtype=torch.float64)
    alone = [objective.loss(lambda x, i=i: scores[:, i], batch) for i in range(3)]
    assert torch.allclose(objective.loss(lambda x: scores, batch), torch.stack(alone))


@pytest.mark.parametrize("kind", KINDS)
def test_sample_inputs_are_small_and_like_the_data(kind):
    data = KINDS[kind]()
    objective = made(data)
    (x,), keywords = objective.sample_inputs(net(data))
    (again,), _ = objective.sample_inputs(net(data))
    like = data.example()
    assert keywords == {}
    assert x.shape == (8, *like.shape[1:])
    assert (x.dtype, x.layout) == (like.dtype, like.layout)
    assert torch.equal(_dense(x), _dense(again))
    objective.check(net(data))


def test_scores_of_given_samples_are_those_of_the_split():
    for kind in ("rows", "images", "bags"):
        data = KINDS[kind]()
        objective, model = made(data), net(data)
        whole = objective.predict(model, data.x)
        assert torch.equal(whole[data.test], objective.predict(model))
    data = loaders()
    x, _ = data.test.dataset.tensors
    assert torch.equal(made(data).predict(net(data), x), made(data).predict(net(data)))


def test_arrays_lists_and_other_floats_are_scored_as_tensors():
    def scores(kind, x) -> Tensor:
        data = KINDS[kind]()
        return made(data).predict(net(data), x)

    for kind in ("rows", "loaders"):
        x = rows()[0]
        whole = scores(kind, x)
        for given in (x.double(), x.numpy(), x.double().numpy(), x.tolist()):
            assert torch.equal(scores(kind, given), whole)
    assert torch.equal(scores("images", images().numpy()), scores("images", images()))
    x = rows()[0].relu()
    sparse = scores("bags", sp.csr_matrix(x.double().numpy()))
    assert torch.equal(sparse, scores("bags", x.to_sparse_csr()))
    precise = SampleData.of((rows()[0].double(), rows()[1]))
    numbers = np.random.default_rng(0).normal(size=(5, 4))
    model = net(precise).double()
    expected = model.eval()(torch.from_numpy(numbers))
    assert torch.equal(made(precise).predict(model, numbers), expected)


@pytest.mark.parametrize(
    ("kind", "x", "message"),
    [
        ("rows", "all", "unknown split; got: 'all'"),
        ("rows", torch.zeros(4), r"got: .*\('n',\); .*remedy: x\[None\] is one sample"),
        ("images", np.zeros((3, 1, 4, 4), np.int64), "got: .*int64.*expected: .*uint8"),
        ("rows", torch.zeros(3, 5), r"got: .*\('n', 5\); expected.*\('n', 4\)"),
        ("rows", torch.zeros(3, 4).to_sparse_csr(), "got: torch.sparse_csr.*: torch.strided"),
        ("images", torch.zeros(3, 1, 4, 4), r"got: .*float32.*expected: .*uint8.*not yet transf"),
        ("bags", torch.zeros(3, 4), r"got: torch.strided.*expected: torch.sparse_csr"),
        ("loaders", torch.zeros(3, 5), r"got: .*\('n', 5\); expected.*\('n', 4\)"),
    ],
)
def test_given_samples_of_another_form_are_refused(kind, x, message):
    data = KINDS[kind]()
    with pytest.raises(ConfigError, match=message):
        made(data).predict(net(data), x)


def test_the_training_metric_is_that_of_some_samples():
    data = KINDS["rows"]()
    seen = []

    class Counting(Net):
        def forward(self, x: Tensor, outputs: Tensor | None = None) -> Tensor:
            seen.append(len(x))
            return super().forward(x, outputs)

    made(data, train_eval_samples=10).evaluate(Counting(4, 3))
    assert seen == [7, 3, 6, 6]


def test_a_metric_that_the_training_labels_do_not_define_is_left_out():
    y = torch.zeros(60, 1)
    y[40::2] = 1
    splits = {"train": range(40), "val": range(40, 50), "test": range(50, 60)}
    data = SampleData.of((rows()[0], y.expand(60, 2)), metric="roc_auc", **splits)
    found = made(data).evaluate(Net(4, 2))
    assert set(found) == {"val_metric", "test_metric", "val_loss"}


@pytest.mark.parametrize("kind", ["rows", "bags", "many", "loaders"])
def test_sampled_outputs_are_asked_of_the_model(kind):
    data = KINDS[kind]()
    objective = made(data, sampled_outputs=1)
    model = Net(4, data.num_classes, dropout=0.0)
    objective.check(model)
    for batch in objective.batches(**ONE, steps=3):
        expected = model(batch.x)[:, batch.outputs] + batch.correction
        assert torch.allclose(
            objective.loss(model, batch), loss(data.task, expected, batch.y), rtol=1e-5
        )
    one, two = (
        [b.outputs for b in objective.batches(seed=0, round=3, subnet=1, steps=3)] for _ in range(2)
    )
    assert all(map(torch.equal, one, two))
    whole = made(data, sampled_outputs=data.num_classes)
    (batch,), (plain,) = (o.batches(**ONE, steps=1) for o in (whole, made(data)))
    expected = made(data).loss(model, plain).item()
    assert whole.loss(model, batch).item() == pytest.approx(expected)


def test_sampled_outputs_need_a_softmax_and_a_model_that_can():
    with pytest.raises(ConfigError, match=r"needs class numbers or sparse labels.*6 columns"):
        made(KINDS["labels"](), sampled_outputs=2)
    objective = made(KINDS["rows"](), sampled_outputs=2)
    with pytest.raises(ConfigError, match=r"Linear cannot put out some.*accepts_outputs=True"):
        objective.check(nn.Linear(4, 3))

    class Wrong(Net):
        def forward(self, x: Tensor, outputs: Tensor | None = None) -> Tensor:
            return super().forward(x, None if outputs is None else outputs.flip(0))

    with pytest.raises(PartitionError, match="Wrong puts out other columns than it is asked"):
        objective.check(Wrong(4, 3))


class Two(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


@pytest.mark.parametrize(
    ("kind", "model", "message"),
    [
        ("rows", nn.Linear(4, 2), r"another width.*got: \(8, 2\).*expected: \(8, 3\)"),
        ("rows", nn.Linear(5, 3), r"cannot run on this data; got: RuntimeError.*\('n', 4\)"),
        ("rows", nn.Linear(4, 3).double(), "precision differs.*remedy: model.to.torch.float32"),
        ("rows", Two(), "must put out one tensor; got: tuple"),
        ("images", nn.Linear(4, 3), r"another width.*got: \(8, 1, 4, 3\)"),
        ("images", nn.Conv2d(3, 3, 1), r"cannot run.*dense samples of shape \('n', 1, 4, 4\)"),
        ("bags", nn.Conv1d(4, 3, 1), r"cannot run.*sparse CSR samples of shape \('n', 4\)"),
        ("loaders", nn.Linear(4, 2), "another width"),
    ],
)
def test_models_that_do_not_fit_are_refused(kind, model, message):
    with pytest.raises(PartitionError, match=message):
        made(KINDS[kind]()).check(model.train())
    assert model.training


def test_labels_that_start_at_1_are_told():
    x, y = rows()
    message = r"got: \(8, 3\).*expected: \(8, 4\).*give y - 1: classes count from 0"
    with pytest.raises(PartitionError, match=message):
        made(SampleData.of((x, y + 1))).check(nn.Linear(4, 3))


NORMED = nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))


@pytest.mark.parametrize("kind", ["sizes", "shards", "series", "last of a series"])
def test_batches_of_one_sample_are_refused_with_batchnorm(kind):
    data, settings = KINDS["images"](), {"batch_size": 1} if kind == "sizes" else {}
    if kind == "shards":
        data = SampleData.of((data.x, data.y), train=[0, 1], val=[2], test=[3], num_classes=3)
        settings = {"shards": True}
    if "series" in kind:
        dataset = TensorDataset(images() / 255, rows()[1])
        every = DataLoader(dataset, sampler=range(60), batch_size=1 if kind == "series" else 59)
        data, settings = LoaderData(train=every, val=every, test=every, num_classes=3), {}
    objective = made(data, **settings)
    with pytest.raises(ConfigError, match=r"BatchNorm cannot be trained on a single.*which 2 sees"):
        objective.check(NORMED.train())
    assert NORMED.training
    pixels = nn.Sequential(
        nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    objective.check(pixels)  # each has values enough
    objective.check(nn.Sequential(nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 3)))


def test_models_that_fit_are_left_in_their_mode():
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.BatchNorm1d(3)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made(KINDS["images"]()).check(model)
    assert model[2].training
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_described_and_identified(kind):
    objective = made(KINDS[kind](), train_eval_samples=30)
    described = objective.describe()
    assert json.loads(json.dumps(described)) == described
    assert described["train_eval_samples"] == 30
    assert described["batches"]["batch_size"] == 8
    assert len(objective.fingerprint()) == 64
    assert objective.fingerprint() == made(KINDS[kind](), batch_size=9).fingerprint()


def test_fingerprints_differ_from_data_to_data():
    assert len({made(make()).fingerprint() for make in KINDS.values()}) == len(KINDS)


def test_settings_reach_the_batches():
    data = KINDS["rows"]()
    objective = made(data, shards=True)
    seen = [
        {tuple(row) for b in objective.batches(seed=0, round=0, subnet=i, steps=3) for row in b.x}
        for i in (0, 1)
    ]
    assert not seen[0] & seen[1]
    assert objective.describe()["batches"]["shards"] == 2
    assert objective.steps_per_epoch == 6
    with pytest.raises(ConfigError, match="steps_per_epoch is for loaders without len"):
        made(data, steps_per_epoch=3)


def test_every_metric_of_labels_can_be_measured():
    for metric in METRICS["multilabel"]:
        data = SampleData.of((rows()[0], labels()), metric=metric)
        assert 0 <= made(data).evaluate(net(data))["val_metric"] <= 1
