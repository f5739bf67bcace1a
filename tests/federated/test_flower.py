"""Server and clients that send each other messages: alone, in one process, and through Flower."""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gist
from gist import ConfigError, FederatedTrainer, GraphData, SampleData
from gist.errors import DataError, MissingDependencyError, PartitionError, WorkerLostError
from gist.federated.fleet import Fleet
from gist.federated.flower import client_app, evaluate_on, server_app
from gist.federated.flower.client import answer
from gist.federated.flower.coordinator import Coordinator
from gist.federated.flower.link import GridLink, Reply
from gist.federated.flower.messages import Outcome, Records, Work
from gist.federated.flower.records import from_content, size_of, to_content
from gist.federated.flower.server import read_settings
from gist.federated.selection import NestedPrefix
from gist.federated.strategies import STRATEGIES
from gist.partition.spec import model_tensors
from gist.runs import read_history, read_run

ROOT = Path(gist.__file__).parents[1]
EXAMPLE = ROOT / "examples" / "flower"
CLIENTS = 3
FIRST_NODE = 10


@pytest.fixture(scope="module")
def digits() -> SampleData:
    return gist.load_dataset("digits-images")


@pytest.fixture(scope="module")
def own(digits) -> list[SampleData]:
    """Data of each client."""
    return [dataclasses.replace(digits, train=digits.train[i::CLIENTS]) for i in range(CLIENTS)]


def model_of(hidden: int = 12) -> gist.nn.MLP:
    torch.manual_seed(0)
    return gist.nn.MLP(64, hidden, 10, 3, norm="batch")


def tensors_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model_tensors(model).items()}


def unequal(left, right) -> list[str]:
    assert left.keys() == right.keys()
    return [name for name in left if not torch.equal(left[name], right[name])]


class Loopback:
    """Clients in this process, which answer in the order in which they were sent work.

    ``changed`` may put something else in the place of an answer, by client and own task; None for
    no answer.
    """

    def __init__(
        self, data, *, make=model_of, changed=lambda client, own, reply: reply, **settings
    ):
        self.data, self.make, self.settings = data, make, settings
        self.changed = changed or (lambda client, own, reply: reply)
        self.here = list(range(FIRST_NODE, FIRST_NODE + len(data)))
        self.time = 0.0
        self.works: list[Work] = []
        self.waiting: list[tuple[float, Reply]] = []

    def clock(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds

    def nodes(self):
        return self.here

    def send(self, node, records, *, seconds, group):
        work = Work.unpack(records)
        self.works.append(work)
        message = str(len(self.works))
        done = answer(work, self.make(), self.data[node - FIRST_NODE], **self.settings)
        back = dataclasses.replace(done, seconds=0.0).pack()
        reply = Reply(message=message, node=node, nbytes=back.nbytes, read=lambda: back)
        replies = self.changed(work.client, work.own, reply)
        for each in replies if isinstance(replies, list) else [replies]:
            if each is not None:
                due, one = each if isinstance(each, tuple) else (0.0, each)
                self.waiting.append((self.time + due, one))
        return message

    def receive(self, messages):
        for place, (due, reply) in enumerate(self.waiting):
            if due <= self.time:
                del self.waiting[place]
                return [reply]
        return []


def coordinator_of(link, *, evaluate=None, model=None, **settings) -> Coordinator:
    given = {"local_steps": 3, "lr": 0.05, "rounds": 6, "progress": False, "keep_best": False}
    config, deployment = read_settings({**given, **settings})
    return Coordinator(
        model or link.make(),
        link,
        config,
        deployment,
        evaluate=evaluate,
        clock=link.clock,
        sleep=link.sleep,
    )


def told(coordinator) -> list[tuple[str, int]]:
    return [(event["event"], event["client"]) for event in coordinator.ledger.events]


# Messages

_KINDS = (
    *(torch.float32, torch.float64, torch.bfloat16, torch.float16),
    *(torch.int64, torch.uint8, torch.bool, torch.complex64),
)
_tensors = st.dictionaries(
    st.text("ab./", min_size=1, max_size=4),
    st.tuples(st.sampled_from(_KINDS), st.lists(st.integers(0, 3), max_size=3)).map(
        lambda drawn: (torch.rand(drawn[1]) * 3).to(drawn[0])
    ),
    max_size=4,
)
_names = st.lists(st.text("ab.", min_size=1, max_size=3), max_size=3).map(tuple)


def bits(tensors) -> dict[str, tuple]:
    return {n: (t.dtype, t.shape, t.flatten().tolist()) for n, t in tensors.items()}


def work_of(**given) -> Work:
    plain = {"client": 1, "task": 2, "own": 0, "seed": 3, "steps": 4, "rate": 0.5, "proximal": 0.0}
    named = {"masked_outputs": False, "verify": True, "model": "m"}
    named |= {"settings": {"lr": 0.1, "optimizer": "sgd"}}
    rest = {"trained": ("w",), "units": {"g": torch.arange(3)}, "tensors": {"w": torch.ones(2)}}
    return Work(**{**plain, **named, **rest, **given})


def outcome_of(**given) -> Outcome:
    plain = {"samples": 7, "losses": (2.0, 1.0), "passes": 0.5, "seconds": 1.5}
    return Outcome(**{"tensors": {"w": torch.ones(2)}, **plain, **given})


@given(tensors=_tensors, trained=_names, rate=st.floats(0, 1), masked=st.booleans())
def test_a_work_comes_back_as_it_was_packed(tensors, trained, rate, masked):
    units = {"hidden.0": torch.tensor([0, 2, 5]), "a/b": torch.arange(4)}
    sent = work_of(tensors=tensors, trained=trained, rate=rate, masked_outputs=masked, units=units)
    got = Work.unpack(sent.pack())
    assert bits(got.tensors) == bits(tensors)
    assert bits(got.units) == bits(units)
    plain = {entry.name for entry in dataclasses.fields(Work)} - {"tensors", "units"}
    assert {n: getattr(got, n) for n in plain} == {n: getattr(sent, n) for n in plain}


@given(tensors=_tensors, classes=st.sampled_from([None, [], [1, 4]]))
def test_an_outcome_comes_back_as_it_was_packed(tensors, classes):
    classes = None if classes is None else torch.tensor(classes, dtype=torch.int64)
    got = Outcome.unpack(outcome_of(tensors=tensors, classes=classes).pack())
    assert bits(got.tensors) == bits(tensors)
    assert (got.classes is None) == (classes is None)
    assert classes is None or torch.equal(got.classes, classes)
    assert (got.samples, got.losses, got.passes, got.seconds) == (7, (2.0, 1.0), 0.5, 1.5)


@given(tensors=_tensors)
def test_messages_are_arrays_of_numbers_and_need_no_pickle(tensors):
    for array in work_of(tensors=tensors).pack().arrays.values():
        np.save(io.BytesIO(), array, allow_pickle=False)


def changed(records: Records, **parts) -> Records:
    """Records with some entries in place of others; of None without them."""
    given = {}
    for part, entries in parts.items():
        values = {**getattr(records, part), **entries}
        given[part] = {name: value for name, value in values.items() if value is not None}
    return dataclasses.replace(records, **given)


DAMAGED_OUTCOMES = {
    "no samples": {"metrics": {"num-examples": None}},
    "none": {"metrics": {"num-examples": 0}},
    "bool": {"metrics": {"num-examples": True}},
    "float": {"metrics": {"num-examples": 1e30}},
    "nan": {"metrics": {"seconds": float("nan")}},
    "negative": {"metrics": {"passes": -1.0}},
    "text": {"metrics": {"last_loss": "low"}},
    "kind": {"arrays": {"unit/hidden": np.arange(3)}},
    "twice": {"arrays": {"bfloat16.tensor/w": np.arange(2, dtype=np.int16)}},
    "bits": {"arrays": {"bfloat16.tensor/v": np.arange(3.0)}},
    "words": {"arrays": {"tensor/w": np.array(["a"])}},
    "objects": {"arrays": {"tensor/w": np.array([object()])}},
}


@pytest.mark.parametrize("damage", DAMAGED_OUTCOMES)
def test_a_damaged_outcome_is_refused(damage):
    with pytest.raises(DataError, match="damaged"):
        Outcome.unpack(changed(outcome_of().pack(), **DAMAGED_OUTCOMES[damage]))


@pytest.mark.parametrize(
    ("name", "value"),
    [("trained", "w"), ("trained", None), ("steps", 1.5), ("masked_outputs", 1)],
)
def test_a_damaged_work_is_refused(name, value):
    with pytest.raises(DataError, match="damaged"):
        Work.unpack(changed(work_of().pack(), config={name: value}))


# Server and clients in one process


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_over_messages_is_that_of_the_virtual_clock_bit_for_bit(strategy, digits):
    """Clients that are alike, and answer one after the other."""
    settings = {"local_steps": 3, "lr": 0.05, "seed": 3, "progress": False}
    settings["rounds"] = 2 if STRATEGIES[strategy].per_merge > 1 else 5
    chosen = STRATEGIES[strategy]
    if isinstance(chosen.selection, NestedPrefix):  # one width, so that tasks take equally long
        chosen = dataclasses.replace(chosen, selection=NestedPrefix(levels=(1.0,)))
    settings |= {"strategy": chosen, "keep_best": False, "in_flight": CLIENTS}
    settings["capacity"] = min(chosen.levels[:2])
    trainer = FederatedTrainer(
        model_of(),
        digits,
        clients=CLIENTS,
        fleet=dataclasses.replace(Fleet.uniform(CLIENTS), counts_operations=False),
        split="iid",
        batch_size=32,
        recalibrate_bn=False,
        **settings,
    )
    trainer.fit()
    parts = [dataclasses.replace(digits, train=digits.train[p]) for p in trainer.clients.parts]
    link = Loopback(parts, batch_size=32)
    coordinator = coordinator_of(link, evaluate=evaluate_on(digits), **settings)
    result = coordinator.run()
    order = [(e["task"], e["client"]) for e in trainer.server.events if e["event"] == "merged"]
    events = coordinator.ledger.events
    assert [(e["task"], e["client"]) for e in events if e["event"] == "merged"] == order
    assert unequal(tensors_of(trainer.model), tensors_of(coordinator.model)) == []
    same = ("train_loss", "val_loss", "test_metric", "num_subnets", "learning_rate_factor")
    for ours, theirs in zip(result.history, trainer.history, strict=True):
        assert {n: getattr(ours, n) for n in same} == {n: getattr(theirs, n) for n in same}


def test_a_graph_is_trained_on_as_by_the_virtual_clock():
    data = gist.load_dataset("csbm", num_nodes=120, num_features=8, num_classes=3, seed=0)
    settings = {"local_steps": 3, "lr": 0.05, "rounds": 3, "progress": False, "keep_best": False}

    def make():
        torch.manual_seed(0)
        return gist.nn.GraphSAGE(8, 8, 3, num_layers=2)

    trainer = FederatedTrainer(
        make(), data, clients=1, in_flight=1, fleet="uniform", split="iid", **settings
    )
    trainer.fit()
    coordinator = coordinator_of(
        Loopback([data], make=make), evaluate=evaluate_on(data), **settings
    )
    result = coordinator.run()
    assert unequal(tensors_of(trainer.model), tensors_of(coordinator.model)) == []
    assert result.last_test_metric == trainer.history[-1].test_metric


def nan(records: Records) -> Records:
    return changed(records, arrays={"tensor/linears.0.bias": np.full(9, np.nan, np.float32)})


GARBAGE = {
    "nan": nan,
    "missing": lambda records: changed(records, arrays={"tensor/linears.0.bias": None}),
    "unknown": lambda records: changed(records, arrays={"tensor/x": np.ones(1, np.float32)}),
    "shape": lambda records: changed(
        records, arrays={"tensor/linears.0.bias": np.ones(3, np.float32)}
    ),
    "dtype": lambda records: changed(records, arrays={"tensor/linears.0.bias": np.ones(9)}),
    "huge": lambda records: changed(
        records, arrays={"tensor/linears.0.bias": np.full(9, 1e30, np.float32)}
    ),
    "large": lambda records: changed(records, arrays={"tensor/more": np.ones(10**6)}),
    "classes": lambda records: changed(records, arrays={"class/": np.array([10**6])}),
    "samples": lambda records: changed(records, metrics={"num-examples": -1}),
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_garbage_does_not_touch_the_model(kind, own):
    """The run is that in which this client says that it failed."""

    def garbled(client, own, reply):
        if client != 1:
            return reply
        back = GARBAGE[kind](reply.read())
        return dataclasses.replace(reply, nbytes=back.nbytes, read=lambda: back)

    def failing(client, own, reply):
        error = Reply(message=reply.message, node=reply.node, error="out of memory")
        return error if client == 1 else reply

    runs = {}
    for name, change in (("refused", garbled), ("failed", failing)):
        runs[name] = coordinator_of(Loopback(own, changed=change, batch_size=32))
        runs[name].run()
    kept = [e for e in told(runs["refused"]) if e[0] == "merged"]
    assert len(kept) == 6
    assert ("merged", 1) not in kept
    assert ("refused", 1) in told(runs["refused"])
    assert ("failed", 1) in told(runs["failed"])
    left, right = (tensors_of(runs[name].model) for name in runs)
    assert unequal(left, right) == []


def test_an_answer_of_another_client_is_refused(own):
    def swapped(client, own, reply):
        return dataclasses.replace(reply, node=99) if client == 1 else reply

    coordinator = coordinator_of(Loopback(own, changed=swapped, batch_size=32))
    coordinator.run()
    assert ("merged", 1) not in told(coordinator)
    (first, *_) = [e for e in coordinator.ledger.events if e["event"] == "refused"]
    assert "node 99" in first["reason"]


def test_a_repeated_answer_counts_once(own):
    def twice(client, own, reply):
        return [reply, reply]

    once, doubled = (
        coordinator_of(Loopback(own, changed=change, batch_size=32), rounds=9)
        for change in (None, twice)
    )
    once.run()
    doubled.run()
    assert unequal(tensors_of(once.model), tensors_of(doubled.model)) == []
    assert sum(event == "repeated" for event, _ in told(doubled)) >= 8
    merged = [e["task"] for e in doubled.ledger.events if e["event"] == "merged"]
    assert len(set(merged)) == len(merged) == 9


def test_a_lost_client_holds_nobody_up_and_a_late_answer_is_ignored(own):
    late = 25.0  # seconds, of a timeout of 20

    def slow(client, own, reply):
        return (late, reply) if (client, own) == (1, 0) else (4.0, reply)

    link = Loopback(own, changed=slow, batch_size=32)
    coordinator = coordinator_of(link, rounds=30, timeout=20.0, poll=1.0)
    coordinator.run()
    events = [e for e in coordinator.ledger.events if e["client"] == 1]
    names = [e["event"] for e in events]
    assert names[:5] == ["joined", "sent", "lost", "late", "sent"]
    assert "merged" in names[5:]
    assert all(e["time"] >= late for e in events[3:])
    others = [e for e in coordinator.ledger.events if e["client"] != 1 and e["event"] == "merged"]
    assert sum(e["time"] < 20 for e in others) >= 6


@pytest.mark.parametrize(("strategy", "rounds"), [("fedavg", 15), ("asyncdrop", 46)])
def test_a_client_that_never_answers_is_asked_again(strategy, rounds, own):
    def silent(client, own, reply):
        return None if (client, own) == (2, 0) else (1.0, reply)

    link = Loopback(own, changed=silent, batch_size=32)
    coordinator = coordinator_of(link, strategy=strategy, rounds=rounds, timeout=10.0, poll=1.0)
    coordinator.run()
    events = [e for e in coordinator.ledger.events if e["client"] == 2]
    assert [e["event"] for e in events[:5]] == ["joined", "sent", "lost", "sent", "merged"]
    assert events[3]["time"] >= 20


def test_clients_come_and_go(own):
    link = Loopback(own, batch_size=32)
    link.here = [FIRST_NODE]

    def changes(coordinator, record):
        if record.round == 3:
            link.here = [FIRST_NODE + 1, FIRST_NODE + 2]

    coordinator = coordinator_of(link, rounds=12, callbacks=changes)
    coordinator.run()
    merged = [client for event, client in told(coordinator) if event == "merged"]
    assert merged[:4] == [0, 0, 0, 0]
    assert {1, 2} <= set(merged[4:])
    assert 0 not in merged[5:]  # what was under way is merged, no more is sent
    assert ("left", 0) in told(coordinator)
    assert link.works[-1].client in (1, 2)


def test_nobody_is_sent_work_before_enough_are_there(own):
    link = Loopback(own, batch_size=32)
    link.here = [FIRST_NODE]

    def sleep(seconds):
        link.time += seconds
        if link.time > 5:
            link.here = [FIRST_NODE, FIRST_NODE + 1]

    link.sleep = sleep
    coordinator = coordinator_of(link, min_clients=2, poll=1.0)
    coordinator.run()
    assert min(e["time"] for e in coordinator.ledger.events if e["event"] == "sent") > 5


def test_no_more_clients_work_than_may(own):
    link = Loopback(own, changed=lambda client, own, reply: (2.0, reply), batch_size=32)
    coordinator = coordinator_of(link, in_flight=2, rounds=8, poll=1.0)
    coordinator.run()
    flying, most = 0, 0
    for event, _ in told(coordinator):
        flying += (event == "sent") - (event == "merged")
        most = max(most, flying)
    assert most == 2


def test_fast_clients_have_low_ranks_and_wide_subnets(own):
    """Speeds are those of the whole model: who trains a narrow one is not taken for a fast one."""
    seconds = [8.0, 1.0, 4.0]

    def timed(client, own, reply):
        back, share = reply.read(), {12: 1.0, 6: 0.45, 3: 0.2}
        width = len(back.arrays["tensor/linears.0.bias"])
        metrics = {"seconds": seconds[client] * share[width]}
        back = changed(back, metrics=metrics)
        return dataclasses.replace(reply, read=lambda: back)

    link = Loopback(own, changed=timed, batch_size=32)
    coordinator = coordinator_of(link, capacity=(1.0, 0.5, 0.25), strategy="heterofl", rounds=6)
    coordinator.run()
    last = {work.client: len(work.units["hidden.0"]) for work in link.works}
    assert last == {1: 12, 2: 6, 0: 3}


def test_a_run_without_a_usable_answer_is_given_up(own, tmp_path):
    def failing(client, own, reply):
        return Reply(message=reply.message, node=reply.node, error=f"disk of {client} is full")

    link = Loopback(own, changed=failing, batch_size=32)
    coordinator = coordinator_of(link, out=tmp_path / "run")
    with pytest.raises(WorkerLostError, match="is full"):
        coordinator.run()
    lines = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    failed = [e for e in map(json.loads, lines) if e["event"] == "failed"]
    assert len(failed) == 20
    pauses = np.diff([e["time"] for e in failed if e["client"] == 0])
    assert (np.diff(pauses) >= 0).all()  # who fails rests ever longer
    assert unequal(tensors_of(coordinator.model), tensors_of(model_of())) == []


def test_duration_ends_a_run(own):
    link = Loopback(own, changed=lambda client, own, reply: (10.0, reply), batch_size=32)
    coordinator = coordinator_of(link, rounds=1000, duration=100.0, poll=1.0)
    coordinator.run()
    assert 100 <= link.time < 102
    assert 20 <= len(coordinator.ledger.history) <= 30


def test_it_writes_what_other_trainers_write(own, digits, tmp_path):
    out = tmp_path / "run"
    coordinator = coordinator_of(
        Loopback(own, batch_size=32),
        evaluate=evaluate_on(digits),
        rounds=7,
        eval_every=3,
        keep_best=True,
        out=out,
    )
    result = coordinator.run()
    run = read_run(out)
    assert run.result == result
    assert run.config["groups"] == coordinator.spec.sizes
    history = read_history(out / "history.jsonl")
    assert [r.round for r in history if r.val_metric is not None] == [2, 5, 6]
    assert result.best in history
    assert [r.epochs for r in history] == sorted(r.epochs for r in history)
    assert history[-1].epochs == pytest.approx(7 * 3 * 32 / len(digits.train), rel=0.05)
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    assert events == coordinator.ledger.events
    assert sum(e["bytes"] for e in events if e["event"] == "sent") == history[-1].bytes_sent
    loaded = gist.ISTTrainer(model_of(), digits, num_subnets=1, epochs=1, progress=False)
    loaded.load(out)
    assert loaded.evaluate("val")["accuracy"] == result.val_metric
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_a_client_refuses_another_model(digits):
    link = Loopback([digits], make=lambda: model_of(hidden=16))
    with pytest.raises(PartitionError, match="another model"):
        coordinator_of(link, model=model_of()).run()


def test_a_client_refuses_tensors_that_do_not_fit(digits):
    link = Loopback([digits])
    coordinator_of(link, rounds=1).run()
    (work, *_) = link.works
    for change, said in (
        ({"units": {"hidden.0": torch.arange(3)}}, "other groups"),
        ({"units": {**work.units, "hidden.0": torch.tensor([0, 99])}}, "hidden.0"),
        ({"tensors": {**work.tensors, "linears.0.bias": torch.zeros(2)}}, "linears.0.bias"),
        ({"tensors": {"linears.0.bias": torch.zeros(9)}}, "is missing"),
    ):
        with pytest.raises(PartitionError, match=said):
            answer(dataclasses.replace(work, **change), model_of(), digits)


def test_a_client_may_make_its_model_without_memory(digits):
    link = Loopback([digits])
    coordinator_of(link, rounds=1).run()
    (work, *_) = link.works
    with torch.device("meta"):
        empty = gist.nn.MLP(64, 12, 10, 3, norm="batch")
    assert (
        unequal(answer(work, empty, digits).tensors, answer(work, model_of(), digits).tensors) == []
    )


def test_run_configurations_go_before_keywords():
    config, deployment = read_settings(
        {"rounds": 5, "lr": 0.1, "timeout": 3.0},
        {"local-steps": 7, "lr": 0.2, "min_clients": 2, "hidden": 64},
    )
    assert (config.rounds, config.local_steps, config.lr) == (5, 7, 0.2)
    assert (deployment.timeout, deployment.min_clients) == (3.0, 2)
    assert read_settings({"duration": 10.0})[0].rounds is None
    assert read_settings({})[0].rounds == 100


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("round", 3, "did you mean 'rounds'"),
        ("num_subnets", 3, "no use"),
        ("epochs", 3, "no use"),
        ("min_clients", 0, "min_clients"),
        ("in_flight", 1.5, "in_flight"),
        ("timeout", float("inf"), "timeout"),
        ("duration", -1, "duration"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(name, value, said):
    with pytest.raises(ConfigError, match=said):
        read_settings({name: value})


def test_optimizers_have_names():
    """Clients are told."""
    with pytest.raises(ConfigError, match="name of an optimizer"):
        read_settings({"optimizer": torch.optim.SGD})


def test_other_data_and_metrics_are_refused(digits, own):
    with pytest.raises(ConfigError, match="cannot be trained on here"):
        evaluate_on(([1.0], [0]))
    with pytest.raises(ConfigError, match="unknown setting 'clusters'"):
        evaluate_on(digits, clusters=3)
    graph = gist.load_dataset("csbm", num_nodes=60, num_features=4, num_classes=3, seed=0)
    with pytest.raises(ConfigError, match="its graph"):
        evaluate_on(GraphData.of(graph), clusters=3)
    with pytest.raises(ConfigError, match="unknown metrics"):
        coordinator_of(Loopback(own), evaluate=lambda model: {"accuracy": 1.0})


def test_without_flower_its_apps_say_how_to_get_it(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "flwr"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "flwr", None)
    for make in (lambda: server_app(model_of), lambda: client_app(model_of, lambda context: None)):
        with pytest.raises(MissingDependencyError, match=r"gist-subnets\[flower\]"):
            make()


# Through Flower


@pytest.fixture
def flwr_app(monkeypatch):
    """Flower's types, in a process that may make messages, as those of apps may."""
    app = pytest.importorskip("flwr.app")
    identity = importlib.import_module("flwr.supercore.task_identity").TaskIdentity
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(identity, name, 1)
    return app


def context_of(**values):
    context = importlib.import_module("flwr.app").Context
    given = {"run_id": 1, "node_id": 1, "node_config": {}, "state": None, "run_config": {}}
    return context(**{**given, **values})


class LocalGrid:
    """Flower's messages, handed to a ``ClientApp`` in this process."""

    def __init__(self, app, nodes: int) -> None:
        self.app, self.nodes, self.replies = app, nodes, {}

    def get_node_ids(self):
        return range(FIRST_NODE, FIRST_NODE + self.nodes)

    def push_messages(self, messages):
        names = []
        for message in messages:
            node = message.metadata.dst_node_id
            message.metadata.__dict__["_message_id"] = name = str(len(self.replies))
            config = {"partition-id": node - FIRST_NODE}
            self.replies[name] = self.app(message, context_of(node_id=node, node_config=config))
            names.append(name)
        return names

    def pull_messages(self, names):
        return [self.replies[name] for name in names]


def test_records_come_back_from_flowers_types(flwr_app):
    records = work_of(tensors={"a": torch.tensor(2), "b": torch.rand(2, 3)}).pack()
    content = to_content(records)
    got = from_content(content)
    assert bits(Work.unpack(got).tensors) == bits(Work.unpack(records).tensors)
    assert (dict(got.config), dict(got.metrics)) == (dict(records.config), dict(records.metrics))
    assert records.nbytes <= size_of(content) <= records.nbytes + 4096 * len(records.arrays)


def test_contents_that_cannot_be_read_are_refused(flwr_app):
    archive, pickled = io.BytesIO(), io.BytesIO()
    np.savez(archive, a=np.ones(3))
    np.save(pickled, np.array([{"a": 1}]), allow_pickle=True)
    for data in (archive.getvalue(), pickled.getvalue(), b"garbage", b""):
        content = to_content(work_of().pack())
        array = flwr_app.Array(dtype="float32", shape=(3,), stype="numpy.ndarray", data=data)
        content["arrays"]["tensor/w"] = array
        with pytest.raises(DataError, match="damaged"):
            from_content(content)
    with pytest.raises(DataError, match="damaged"):
        from_content(flwr_app.RecordDict())


def test_flowers_apps_train_as_the_same_clients_do_without_it(flwr_app, own, tmp_path):
    settings = {"local_steps": 3, "lr": 0.05, "rounds": 6, "keep_best": False, "progress": False}
    settings |= {"strategy": "fedavg", "seed": 1}
    coordinator = coordinator_of(Loopback(own, batch_size=32), **settings)
    coordinator.run()
    client = client_app(
        lambda context: model_of(),
        lambda context: own[context.node_config["partition-id"]],
        batch_size=32,
    )
    server = server_app(lambda context: model_of(), poll=0.01, **settings)
    server(LocalGrid(client, CLIENTS), context_of(run_config={"out": str(tmp_path / "run")}))
    loaded = model_of()
    trainer = gist.ISTTrainer(loaded, own[0], num_subnets=1, epochs=1, progress=False)
    trainer.load(tmp_path / "run")
    assert unequal(tensors_of(coordinator.model), tensors_of(loaded)) == []


def test_errors_of_clients_say_whose_they_are_and_why(flwr_app):
    to = flwr_app.Message(flwr_app.RecordDict(), 7, "train")
    error = flwr_app.Message(flwr_app.Error(2, "ValueError: no data"), reply_to=to)

    class Grid:
        def pull_messages(self, names):
            return [error]

    (reply,) = GridLink(Grid()).receive(["a"])
    assert (reply.node, reply.read) == (7, None)
    assert "no data" in reply.error


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def deployed(
    folder: Path, clients: int
) -> Iterator[tuple[Callable[..., None], Callable[[int], None]]]:
    """A SuperLink and SuperNodes on this machine.

    Gives what runs an app on them, and what kills a client with all its processes.
    """
    tools, address = Path(sys.executable).parent, f"127.0.0.1:{free_port()}"
    home = folder / "home"
    home.mkdir()
    connection = f'[superlink.here]\naddress = "{address}"\ninsecure = true\n'
    (home / "config.toml").write_text(f'[superlink]\ndefault = "here"\n\n{connection}')
    fixed = {"FLWR_HOME": home, "FLWR_TELEMETRY_ENABLED": 0, "FLWR_DISABLE_UPDATE_CHECK": 1}
    fixed |= {"PATH": f"{tools}:{os.environ['PATH']}", "OMP_NUM_THREADS": 1, "PYTHONPATH": ROOT}
    environment = {**os.environ, **{name: str(value) for name, value in fixed.items()}}
    link = ["flower-superlink", "--host", "127.0.0.1", "--port", address.rpartition(":")[2]]
    commands = [[*link, "--disable-runtime-dependency-installation"]]
    for number in range(clients):
        node = ["flower-supernode", "--superlink", address, "--port", str(free_port())]
        commands.append([*node, "--node-config", f"partition-id={number}"])
    started: list[psutil.Popen] = []

    def run(app: Path, *arguments: str) -> None:
        subprocess.run(
            [tools / "flwr", "run", app, "here", "--stream", *arguments],
            env=environment,
            cwd=folder,
            timeout=600,
            check=True,
        )

    def kill(client: int) -> None:
        process = started[1 + client]
        for each in (*process.children(recursive=True), process):
            each.kill()

    try:
        for number, (name, *arguments) in enumerate(commands):
            with (folder / f"{number}.log").open("w") as log:
                command = [tools / name, "--insecure", *arguments]
                started.append(
                    psutil.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log)
                )
            if number == 0:
                wait_for(address)
        yield run, kill
    finally:
        alive = [process for process in started if process.is_running()]
        every = [each for p in alive for each in (*p.children(recursive=True), p)]
        for process in alive:
            process.send_signal(signal.SIGINT)
        psutil.wait_procs(started, timeout=10)
        for process in every:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(every, timeout=10)


def wait_for(address: str) -> None:
    host, _, port = address.rpartition(":")
    for _ in range(600):
        with suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
            return
        time.sleep(0.1)
    raise AssertionError(f"nobody listens at {address}")


@pytest.mark.slow
def test_real_processes_learn_as_much_as_by_the_virtual_clock(digits, tmp_path):
    """The app in `examples/flower` on a SuperLink and two SuperNodes; about 20 s for a merge."""
    pytest.importorskip("flwr")
    merges, out = 4, tmp_path / "run"
    with deployed(tmp_path, clients=2) as (run, _):
        run(EXAMPLE, "--run-config", f'rounds={merges} min-clients=2 out="{out}"')
    result = read_run(out).result
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    merged = [event["client"] for event in events if event["event"] == "merged"]
    assert len(merged) == len(result.history) == merges
    assert set(merged) == {0, 1}
    assert {event["event"] for event in events} == {"joined", "sent", "merged"}
    torch.manual_seed(0)
    trainer = FederatedTrainer(
        gist.nn.MLP(64, 64, 10, num_layers=3, norm="layer"),
        digits,
        strategy="asyncdrop",
        clients=2,
        in_flight=2,
        fleet="uniform",
        split="iid",
        rounds=merges,
        local_steps=20,
        lr=0.1,
        batch_size=32,
        progress=False,
    )
    virtual = trainer.fit()
    # By the virtual clock, six seeds of the run and two fleets gave 0.918 to 0.954.
    assert abs(result.test_metric - virtual.test_metric) < 0.06
    assert result.test_metric > 0.87


@pytest.mark.slow
def test_a_run_goes_on_without_a_client_that_is_killed(tmp_path):
    pytest.importorskip("flwr")
    out = tmp_path / "run"

    def read() -> list[dict]:
        path = out / "events.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def kill_once_merged(client: int, kill: Callable[[int], None]) -> None:
        for _ in range(3000):
            if any(e["event"] == "merged" and e["client"] == client for e in read()):
                kill(client)
                return
            time.sleep(0.1)

    with deployed(tmp_path, clients=2) as (run, kill):
        killer = threading.Thread(target=kill_once_merged, args=(1, kill))
        killer.start()
        run(EXAMPLE, "--run-config", f'rounds=7 min-clients=1 timeout=40.0 out="{out}"')
        killer.join()
    events = read()
    assert len(read_run(out).result.history) == 7
    first = next(n for n, e in enumerate(events) if e["event"] == "merged" and e["client"] == 1)
    later = [(e["event"], e["client"]) for e in events[first + 1 :]]
    assert ("merged", 1) not in later[3:], "what it had under way may still have come"
    assert {("lost", 1), ("left", 1)} & set(later), "it is noticed, and logged"
    assert later.count(("merged", 0)) >= 3
