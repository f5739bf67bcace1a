"""Federated runs: what each keeps true, and what clients that misbehave change."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import gist
from gist import AsyncDropTrainer, ConfigError, DivergedError, FederatedTrainer, SampleTrainer
from gist.errors import CheckpointError, PartitionError
from gist.federated.faults import garbled
from gist.federated.fleet import Fleet
from gist.federated.strategies import STRATEGIES, Strategy, make_strategy
from gist.partition.merging import CohortDelta, Mix
from gist.partition.spec import model_tensors

CLIENTS = 12


@pytest.fixture(scope="module")
def digits():
    return gist.load_dataset("digits-images")


def model_of(norm=None, seed: int = 0, hidden: int = 24):
    torch.manual_seed(seed)
    return gist.nn.MLP(64, hidden, 10, 3, norm=norm)


def trainer_of(data, **settings) -> FederatedTrainer:
    given = {
        "clients": CLIENTS,
        "in_flight": 3,
        "local_steps": 4,
        "batch_size": 16,
        "lr": 0.05,
        "progress": False,
        "strategy": "asyncdrop",
    }
    given |= settings
    given.setdefault("rounds", 8)
    return FederatedTrainer(model_of(given.pop("norm", None)), data, **given)


def bits_of(trainer) -> dict[str, torch.Tensor]:
    return {name: t.detach().clone() for name, t in model_tensors(trainer.model).items()}


def same_bits(left, right) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


def records_of(trainer) -> list[dict]:
    measured = ("seconds", "eval_seconds", "repartition_seconds")
    return [
        {k: v for k, v in dataclasses.asdict(record).items() if k not in measured}
        for record in trainer.history
    ]


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_every_strategy_trains_and_counts(digits, name):
    trainer = trainer_of(digits, strategy=name, rounds=3, norm="batch")
    before = bits_of(trainer)
    trainer.fit()
    after = bits_of(trainer)
    assert not same_bits(before, after)
    assert all(torch.isfinite(t).all() for t in after.values())
    report = trainer.report()
    done = [n for merge in trainer.timeline.merges for n in merge.tasks]
    assert report["events"]["merged"] == len(done) == sum(report["merges_per_client"])
    started = [t for t in trainer.timeline.tasks if t.request.merges < 3]
    assert report["bytes_down"] == sum(task.cost.download for task in started)
    whole = sum(t.nbytes for t in before.values())
    assert all(task.cost.download <= whole for task in started)
    assert len(trainer.server._under_way) <= trainer.federated.in_flight


def test_samples_are_scored_as_the_data_hold_them(digits):
    trainer = trainer_of(digits)
    scores = trainer.predict()
    assert scores.shape == (len(digits.test), 10)
    assert torch.equal(trainer.predict(digits.x[digits.test].numpy()), scores)


@pytest.mark.parametrize("name", ["asyncdrop", "fedbuff", "heterofl"])
def test_the_loss_falls(digits, name):
    rounds = {"asyncdrop": 80, "fedbuff": 10, "heterofl": 25}[name]
    trainer = trainer_of(digits, strategy=name, rounds=rounds, split="iid", local_steps=8)
    trainer.fit()
    losses = [record.train_loss for record in trainer.history]
    part = max(len(losses) // 4, 1)
    assert sum(losses[-part:]) < 0.9 * sum(losses[:part])


@pytest.mark.parametrize("name", ["asyncdrop", "fedbuff", "afd", "prunefl"])
def test_the_same_seed_gives_the_same_history_event_by_event(digits, name):
    fleet = dataclasses.replace(Fleet.lognormal(CLIENTS), lost=0.1, repeated=0.1, corrupt=0.1)
    runs = [trainer_of(digits, strategy=name, fleet=fleet, seed=s) for s in (1, 1, 2)]
    for run in runs:
        run.fit()
    first, again, other = runs
    assert first.server.events == again.server.events
    assert records_of(first) == records_of(again)
    assert same_bits(bits_of(first), bits_of(again))
    assert first.server.events != other.server.events


@pytest.mark.parametrize("name", ["asyncdrop", "fedbuff", "prunefl", "helios"])
def test_a_run_that_is_resumed_is_the_same_bit_for_bit(digits, name, tmp_path):
    whole = trainer_of(digits, strategy=name, norm="batch")
    whole.fit()
    part = trainer_of(
        digits,
        strategy=name,
        norm="batch",
        out=str(tmp_path / "run"),
        checkpoint_every=3,
        callbacks=(lambda trainer, record: record.round == 4,),
    )
    part.fit()
    resumed = trainer_of(
        digits, strategy=name, norm="batch", out=str(tmp_path / "run"), checkpoint_every=3
    )
    resumed.fit(resume=tmp_path / "run")
    assert len(resumed.history) == len(whole.history) == 8
    assert same_bits(bits_of(resumed), bits_of(whole))
    assert resumed.server.events == whole.server.events
    assert records_of(resumed) == records_of(whole)
    for group, times in whole.server.global_model.covered.items():
        assert torch.equal(resumed.server.global_model.covered[group], times)


def test_a_checkpoint_of_another_strategy_is_refused(digits, tmp_path):
    trainer_of(digits, out=str(tmp_path), checkpoint_every=4).fit()
    with pytest.raises(CheckpointError, match="another run"):
        trainer_of(digits, strategy="fedavg").load_checkpoint(tmp_path)


@pytest.mark.parametrize("schedule", ["constant", "step"])
def test_one_client_with_everything_is_plain_training_bit_for_bit(schedule, digits):
    settings = {"local_steps": 5, "batch_size": 32, "lr": 0.05, "schedule": schedule}
    settings |= {"progress": False, "rounds": 8, "keep_best": False, "recalibrate_bn": False}
    plain = SampleTrainer(model_of("batch"), digits, num_subnets=1, optimizer="sgd", **settings)
    plain.fit()
    for strategy in ("fedavg", Strategy(rule=Mix(alpha=1.0))):
        alone = FederatedTrainer(
            model_of("batch"),
            digits,
            clients=1,
            in_flight=1,
            split="iid",
            strategy=strategy,
            **settings,
        )
        alone.fit()
        assert same_bits(bits_of(alone), bits_of(plain))


def test_what_a_client_did_not_hold_keeps_its_bits(digits):
    trainer = trainer_of(digits, rounds=1, in_flight=1, strategy="asyncdrop-uniform")
    before = bits_of(trainer)
    trainer.fit()
    after = bits_of(trainer)
    held = {group: times > 0 for group, times in trainer.server.global_model.covered.items()}
    rows, columns = held["hidden.1"], held["hidden.0"]
    assert 0 < int(rows.sum()) < len(rows)
    name = next(n for n, t in after.items() if tuple(t.shape) == (24, 24))
    changed = before[name] != after[name]
    assert not bool(changed[~rows].any())
    assert not bool(changed[:, ~columns].any())
    assert bool(changed[rows][:, columns].any())


def test_clients_work_on_what_they_were_sent(digits):
    versions = []
    trainer = trainer_of(
        digits,
        strategy=Strategy(rule=CohortDelta()),
        in_flight=4,
        callbacks=(lambda trainer, record: versions.append(bits_of(trainer)),),
        keep_best=False,
        recalibrate_bn=False,
    )
    versions.append(bits_of(trainer))
    stale = 0
    for plan in trainer.rounds:
        trainer._run_round(plan)
        versions.append(bits_of(trainer))
        for number, answer in trainer.server._under_way.items():
            sent = trainer.timeline.tasks[number].request.merges
            assert same_bits(answer.part.start, versions[sent])
            stale += sent < len(versions) - 1
    assert stale


def test_garbage_changes_nothing_and_is_logged(digits):
    fleet = dataclasses.replace(Fleet.uniform(CLIENTS), corrupt=0.5)
    trainer = trainer_of(digits, fleet=fleet, keep_best=False)
    trainer.fit()
    tasks, events = trainer.timeline.tasks, trainer.server.events
    refused = [event for event in events if event["event"] == "refused"]
    assert refused
    assert all(event["reason"] for event in refused)
    assert {tasks[event["task"]].fate for event in refused} == {"corrupt"}
    assert all(m.num_subnets == 1 for m in trainer.history), "garbage is no subnet of a round"


def test_garbage_is_refused_before_anything_learns_from_it(digits):
    trainer = trainer_of(digits, strategy="afd", in_flight=4)
    plan, *_ = trainer.rounds
    trainer._run_round(plan)
    server = trainer.server.global_model
    task = trainer.timeline.tasks[trainer.timeline.started[1][0]]
    sound = trainer.server._train_client(task, plan.local_steps)
    garbage = garbled(sound.part, seed=0, task=task.number)
    before, kept = bits_of(trainer), {k: dict(v) for k, v in server.kept().items()}
    with pytest.raises(PartitionError):
        server.take(task.request, dataclasses.replace(sound, part=garbage))
    assert same_bits(before, bits_of(trainer))
    assert {k: v.keys() for k, v in server.kept().items()} == {k: v.keys() for k, v in kept.items()}
    for kind, tensors in server.kept().items():
        assert same_bits(tensors, kept[kind])


@pytest.mark.parametrize("rounds", [4, 60])
def test_a_run_that_diverges_is_given_up(digits, rounds):
    trainer = trainer_of(digits, lr=1e30, rounds=rounds, local_steps=3)
    with pytest.raises(
        DivergedError, match=f"last {min(rounds, 20)} answers of clients were refused"
    ):
        trainer.fit()
    assert len(trainer.history) < 20


def test_an_answer_that_comes_twice_counts_once(digits):
    once = trainer_of(digits, fleet=Fleet.uniform(CLIENTS))
    fleet = dataclasses.replace(Fleet.uniform(CLIENTS), repeated=1.0)
    twice = trainer_of(digits, fleet=fleet)
    once.fit()
    twice.fit()
    assert same_bits(bits_of(once), bits_of(twice))
    assert twice.report()["events"]["repeated"] == 7  # that of the last merge is yet to come
    assert twice.report()["merges_per_client"] == once.report()["merges_per_client"]
    for one, other in zip(once.history, twice.history, strict=True):
        assert (one.epochs, one.num_subnets) == (other.epochs, other.num_subnets)


def test_events_are_in_order_of_time(digits):
    fleet = dataclasses.replace(Fleet.lognormal(CLIENTS), lost=0.2, repeated=0.1, corrupt=0.1)
    trainer = trainer_of(digits, strategy="fedbuff", fleet=fleet, in_flight=6, rounds=3)
    trainer.fit()
    times = [event["time"] for event in trainer.server.events]
    assert times == sorted(times)


def test_a_client_that_never_answers_is_logged_and_its_place_given_away(digits):
    fleet = dataclasses.replace(Fleet.uniform(CLIENTS), lost=0.5)
    trainer = trainer_of(digits, fleet=fleet, rounds=12)
    trainer.fit()
    lost = [e["task"] for e in trainer.server.events if e["event"] == "lost"]
    merged = [e["task"] for e in trainer.server.events if e["event"] == "merged"]
    assert lost
    assert not set(lost) & set(merged)
    assert len(merged) == 12


def test_hetero_selection_looks_at_what_moved(digits):
    trainer = trainer_of(digits, rounds=20, capacity=0.5, keep_best=False)
    trainer.fit()
    requests = [trainer.timeline.tasks[0].request] * 2
    fast, slow = (
        dataclasses.replace(request, rank=rank)
        for request, rank in zip(requests, (0, CLIENTS - 1), strict=True)
    )
    selection, server = trainer.strategy.selection, trainer.server.global_model
    of_fast = selection.select(trainer.spec.sizes, fast, server, {})
    of_slow = selection.select(trainer.spec.sizes, slow, server, {})
    moved = gist.partition.scores.unit_changes(server.tensors_now(), server.initial(), trainer.spec)
    for group, scores in moved.items():
        assert scores[of_fast[group]].sum() < scores[of_slow[group]].sum()


def test_fedprox_stays_nearer_to_where_it_started(digits):
    def moved(mu: float) -> float:
        trainer = trainer_of(
            digits, strategy=dataclasses.replace(STRATEGIES["fedprox"], proximal=mu), rounds=1
        )
        before = bits_of(trainer)
        trainer.fit()
        return sum(float((t - before[n]).abs().sum()) for n, t in bits_of(trainer).items())

    assert moved(5.0) < 0.8 * moved(0.0)


def test_masked_outputs_leave_other_classes_alone(digits):
    trainer = trainer_of(digits, strategy="heterofl", rounds=1, in_flight=1, capacity=1.0)
    name = next(n for n, t in model_tensors(trainer.model).items() if len(t) == 10)
    before = bits_of(trainer)[name]
    trainer.fit()
    client = trainer.timeline.tasks[0].request.client
    has = trainer.clients.classes[client]
    changed = (bits_of(trainer)[name] != before).reshape(10, -1).any(dim=1)
    assert not bool(has.all())
    assert torch.equal(changed, has)


def test_partial_tensors_train_some_and_send_back_less(digits):
    trainer = trainer_of(digits, strategy="pvt", rounds=1, in_flight=1)
    before = bits_of(trainer)
    trainer.fit()
    changed = [n for n, t in bits_of(trainer).items() if not torch.equal(t, before[n])]
    assert len(changed) == round(0.5 * len(before))


@pytest.mark.parametrize("split", ["clusters", "dirichlet", "label-shards", "iid"])
def test_clients_of_a_graph(split):
    data = gist.load_dataset("csbm", num_nodes=400, num_features=8, num_classes=4, seed=0)
    model = gist.nn.GraphSAGE(8, 16, 4, num_layers=2)
    trainer = AsyncDropTrainer(
        model, data, clients=8, in_flight=3, split=split, rounds=6, local_steps=3, progress=False
    )
    trainer.fit()
    assert trainer.predict().shape == (400, 4)
    nodes = torch.cat(list(trainer.clients.parts)).sort().values
    assert torch.equal(nodes, torch.arange(400))
    assert sum(trainer.clients.samples) == int(data.train_mask.sum())
    report = trainer.report()
    assert 0 <= report["client_metric"]["worst"] <= report["client_metric"]["mean"] <= 1


def test_asyncdrop_is_its_strategies(digits):
    common = {"clients": CLIENTS, "in_flight": 3, "rounds": 4, "local_steps": 4, "progress": False}
    for smart, name in ((True, "asyncdrop"), (False, "asyncdrop-uniform")):
        own = AsyncDropTrainer(model_of(), digits, smart=smart, **common)
        by_name = FederatedTrainer(model_of(), digits, strategy=name, **common)
        own.fit()
        by_name.fit()
        assert own.strategy == by_name.strategy
        assert same_bits(bits_of(own), bits_of(by_name))


def test_filters_within_blocks_are_dropped_from_a_residual_network(digits):
    torch.manual_seed(0)
    model = gist.nn.preact_resnet20(10, in_channels=1, width=4)
    trainer = AsyncDropTrainer(
        model, digits, clients=6, in_flight=2, rounds=2, local_steps=1, progress=False
    )
    trainer.fit()
    assert set(trainer.spec.sizes.values()) == {4, 8, 16}
    task = trainer.timeline.tasks[0]
    assert task.cost.download < sum(t.nbytes for t in model_tensors(model).values())


def test_narrower_models_take_less_time_as_operations_are_counted(digits):
    fleet = Fleet.uniform(CLIENTS)
    times = {
        capacity: trainer_of(digits, fleet=fleet, capacity=capacity).timeline.tasks[0].cost.seconds
        for capacity in (1.0, 0.5)
    }
    assert times[1.0] == 4.0
    counted = times[0.5] / times[1.0]
    whole, narrow = 64 * 24 + 24 * 24 + 24 * 10, 64 * 12 + 12 * 12 + 12 * 10
    backward = 2 * whole - 64 * 24, 2 * narrow - 64 * 12  # none into the input
    assert counted == pytest.approx((narrow + backward[1]) / (whole + backward[0]))


def test_files_of_a_run(digits, tmp_path):
    trainer = trainer_of(digits, out=str(tmp_path))
    trainer.fit()
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert events == trainer.server.events
    report = json.loads((tmp_path / "federated.json").read_text())
    assert report["merges"] == 8
    assert report["clock"] == trainer.history[-1].clock
    other = trainer_of(digits)
    other.load(tmp_path)
    assert same_bits(bits_of(other), bits_of(trainer))


def test_time_to_a_target(digits):
    trainer = trainer_of(digits, eval_every=1)
    trainer.fit()
    best = max(record.test_metric for record in trainer.history)
    first = next(r.clock for r in trainer.history if r.test_metric == best)
    assert trainer.time_to(best) == first
    assert best < 1
    assert trainer.time_to(1.0) is None
    for target, split in ((90, "test"), (0.9, "tset")):
        with pytest.raises(ConfigError, match=r"target must be|unknown split.*did you mean 'test'"):
            trainer.time_to(target, split)


@pytest.mark.parametrize(
    ("strategy", "name", "capacity"),
    [
        (STRATEGIES["fedbuff"], "fedbuff", 1.0),
        (STRATEGIES["fjord"], "fjord", [1.0, 0.5, 0.25, 0.125, 0.0625]),
        (dataclasses.replace(STRATEGIES["afd"], capacity=(1, 0.5)), "afd", [1.0, 0.5]),
        (dataclasses.replace(STRATEGIES["fedprox"], proximal=0.5), "Strategy(selection=", 1.0),
    ],
    ids=["named", "levels", "other-capacity", "own"],
)
def test_a_strategy_is_named_where_it_is_exactly_that(strategy, name, capacity):
    told = strategy.to_json()
    assert told["strategy"].startswith(name)
    assert told["capacity"] == capacity


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_subnets": 4}, "in_flight"),
        ({"sampler": gist.Bernoulli(keep=0.5)}, "strategy says"),
        ({"optimizer_state": "carry"}, "keeps none"),
        ({"duration": 5.0}, "given twice"),
        ({"in_flight": 40}, "than there are"),
        ({"strategy": "fedmagic"}, "unknown strategy"),
        ({"split": "by-colour"}, "unknown split"),
        ({"fleet": "fast"}, "unknown fleet"),
        ({"capacity": 1.5}, "capacity"),
        ({"clients": 5000, "in_flight": 3}, "too few samples"),
        ({"shards": True}, "split"),
        ({"timeout": -1.0}, "timeout"),
        ({"client": 3}, "unknown setting"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_be(digits, settings, said):
    with pytest.raises(ConfigError, match=said):
        trainer_of(digits, **settings)


def test_clients_with_a_single_sample_are_no_match_for_batchnorm(digits):
    with pytest.raises(ConfigError, match="single sample"):
        trainer_of(digits, clients=len(digits.train), split="iid", norm="batch")


def test_asyncdrop_settings_that_cannot_be(digits):
    with pytest.raises(ConfigError, match="makes AsyncDrop"):
        AsyncDropTrainer(model_of(), digits, strategy="fedavg")
    with pytest.raises(ConfigError, match="share in"):
        AsyncDropTrainer(model_of(), digits, drop=1.0)
    with pytest.raises(ConfigError, match="asynchronous servers"):
        Strategy(synchronous=True, per_merge=3)
    assert make_strategy("fedbuff") is STRATEGIES["fedbuff"]
