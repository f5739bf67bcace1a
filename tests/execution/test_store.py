"""The store on disk against the one in memory, bit for bit, and the life of its file."""

from __future__ import annotations

import gc
import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_geometric.nn
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from typer.testing import CliRunner

import gist.nn
from gist import Bernoulli, Categorical, DisjointUniform, GISTTrainer, Overlapping, load_dataset
from gist.cli import app
from gist.errors import CheckpointError, ConfigError, DivergedError
from gist.execution import mapped, mapped_file
from gist.execution.mapped import MappedStore, disk_copies
from gist.execution.store import MemoryStore
from gist.execution.tensorfile import FileLayout
from gist.partition.index_map import IndexMap
from gist.partition.spec import ParamLayout, PartitionSpec, Slot, UnitGroup, model_tensors
from gist.partition.transfer import Selection

SAMPLERS = [DisjointUniform(), Overlapping(min_units=2), Bernoulli(keep=0.5), Categorical()]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool]
DATA = load_dataset("csbm", num_nodes=90, num_features=6, num_classes=3, seed=1)


@contextmanager
def tiny_blocks(most: int = 64) -> Iterator[None]:
    """Tensors are read in rows however small, in buffers of a few rows, in many jobs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mapped_file, "_SMALL_BYTES", -1)
        patch.setattr(mapped_file, "BLOCK_BYTES", most)
        patch.setattr(mapped_file, "_GAP_BYTES", most // 4)
        patch.setattr(mapped_file, "_BLOCKS_PER_JOB", 2)
        yield


class Bag(nn.Module):
    """Parameters and buffers by name, and nothing to compute."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                self.register_parameter(name, nn.Parameter(tensor.clone()))
            else:
                self.register_buffer(name, tensor.clone())


@st.composite
def specs(draw: st.DrawFn) -> PartitionSpec:
    """Matrices and others whose dims follow groups in blocks and copies, beside whole positions."""
    sizes = {g: draw(st.integers(2, 6)) for g in "ab"[: draw(st.integers(1, 2))]}
    layouts = {f"anchor_{g}": ((n,), (Slot(dim=0, group=g),)) for g, n in sizes.items()}
    for i in range(draw(st.integers(1, 3))):
        shape, slots = [], []
        for dim in range(draw(st.integers(0, 3))):
            group = draw(st.none() | st.sampled_from(sorted(sizes)))
            length = draw(st.integers(1, 4))
            if group is not None:
                width, copies = draw(st.integers(1, 2)), draw(st.integers(1, 2))
                before, each = draw(st.integers(0, 1)), sizes[group] * width
                offsets = tuple(before + k * each for k in range(copies))
                slots.append(Slot(dim=dim, group=group, map=IndexMap(width=width, offsets=offsets)))
                length = before + copies * each + draw(st.integers(0, 1))
            shape.append(length)
        layouts[f"w{i}"] = (tuple(shape), tuple(slots))
    built = {n: ParamLayout(name=n, shape=s, slots=t) for n, (s, t) in layouts.items()}
    owner = next(iter(sizes))
    built["owned"] = ParamLayout(name="owned", shape=(2, 3), owner=(owner, 1))
    groups = {name: UnitGroup(name=name, size=size) for name, size in sizes.items()}
    return PartitionSpec(groups=groups, layouts=built)


@st.composite
def cases(draw: st.DrawFn):
    spec = draw(specs())
    m = draw(st.integers(1, min(spec.sizes.values())))
    sampler, seed = draw(st.sampled_from(SAMPLERS)), draw(st.integers(0, 99))
    rounds = [sampler(spec.sizes, m, seed=seed, round=i) for i in range(2)]
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: (torch.randn(layout.shape, generator=generator) * 50).to(
            draw(st.sampled_from(DTYPES))
        )
        for name, layout in spec.layouts.items()
    }
    return spec, rounds, tensors


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def train(tensor: Tensor, subnet: int) -> None:
    """A stand-in that changes every entry."""
    if tensor.dtype == torch.bool:
        tensor.logical_not_()
    else:
        tensor.mul_(3).add_(subnet)


def run(store: Any, spec: PartitionSpec, rounds: list[Any], *, ahead: int) -> list[bytes]:
    """Rounds with each subnet loaded ``ahead`` subnets before it is saved; what was loaded."""
    seen = []
    for assignment in rounds:
        held: list[dict[str, Tensor]] = []
        with store.open(assignment) as transfer:
            for subnet in range(assignment.num_subnets + ahead):
                if subnet < assignment.num_subnets:
                    selection = Selection(spec, assignment, subnet)
                    part = {
                        name: torch.empty(1, *selection.shape(layout), dtype=tensor.dtype)
                        for name, layout in spec.layouts.items()
                        for tensor in [model_tensors(store.model)[name]]
                        if selection.holds(layout)
                    }
                    transfer.load([subnet], part)
                    seen += [bits(tensor) for tensor in part.values()]
                    held.append({name: tensor[0] for name, tensor in part.items()})
                if subnet >= ahead:
                    for tensor in held[subnet - ahead].values():
                        train(tensor, subnet - ahead)
                    transfer.save(held[subnet - ahead])
            transfer.finish()
    return seen


@given(cases(), st.integers(0, 3), st.sampled_from([1, 16, 64]))
def test_both_stores_give_and_take_the_same_bits(tmp_path_factory, case, ahead, block):
    spec, rounds, tensors = case
    folder = tmp_path_factory.mktemp("run")
    models = [Bag(tensors), Bag(tensors)]
    memory = MemoryStore(models[0], spec)
    with tiny_blocks(block):
        disk = MappedStore(models[1], spec, folder)
        loaded = [run(store, spec, rounds, ahead=ahead) for store in (memory, disk)]
        disk.write(folder / "copy.safetensors")
    assert loaded[0] == loaded[1]
    written = load_file(folder / "copy.safetensors")
    for name, tensor in model_tensors(models[0]).items():
        assert bits(tensor) == bits(model_tensors(models[1])[name]), name
        assert bits(tensor) == bits(written[name]), name
    shutil.rmtree(folder)


@given(cases(), st.integers(1, 6))
def test_what_is_saved_early_is_nothing_that_is_still_to_be_loaded(case, ahead):
    """The proof that loading may run ahead of saving: the order changes no bit."""
    spec, rounds, tensors = case
    models = [Bag(tensors), Bag(tensors)]
    in_turn = run(MemoryStore(models[0], spec), spec, rounds, ahead=0)
    run_ahead = run(MemoryStore(models[1], spec), spec, rounds, ahead=ahead)
    assert in_turn == run_ahead
    for name, tensor in model_tensors(models[0]).items():
        assert bits(tensor) == bits(model_tensors(models[1])[name])


def trainer(
    out: Path, store: str = "disk", *, make: Any = None, meta: bool = False, **settings: Any
) -> GISTTrainer:
    torch.manual_seed(3)
    with torch.device("meta" if meta else "cpu"):
        model = (make or gist.nn.GraphSAGE)(6, 16, 3, 3, norm=settings.pop("norm", "layer"))
    base = {"num_subnets": 4, "local_steps": 3, "rounds": 4, "executor": "serial"}
    base["evaluation"] = "full"  # and not what the free memory suggests
    return GISTTrainer(
        model, DATA, **{**base, "store": store, "out": out, "progress": False, **settings}
    )


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("gist")]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"executor": "stacked", "num_subnets": 5},  # two shapes: two chunks
        {"num_subnets": 7},
        {"num_subnets": 1},
        {"num_subnets": [(0.5, 5), (0.5, 2)]},
        {"sampler": Overlapping(min_units=3)},
        {"sampler": Bernoulli(keep=0.5)},
        {"optimizer_state": "carry", "optimizer": "sgd"},
        {"norm": "batch"},
        {"make": partial(gist.nn.GAT, heads=2), "norm": None},
        {"keep_best": False},
    ],
    ids=str,
)
def test_a_run_on_disk_is_the_run_in_memory_bit_for_bit(tmp_path, settings):
    with tiny_blocks():
        runs = [trainer(tmp_path / store, store, **settings) for store in ("memory", "disk")]
        results = [run.fit() for run in runs]
    for ours, theirs in zip(*(result.history for result in results), strict=True):
        assert (ours.train_loss, ours.val_loss) == (theirs.train_loss, theirs.val_loss)
    ours, theirs = (
        load_file(tmp_path / store / "model.safetensors") for store in ("memory", "disk")
    )
    assert ours.keys() == theirs.keys()
    for name, tensor in model_tensors(runs[1].model).items():
        assert torch.equal(ours[name], theirs[name]), name
        assert torch.equal(tensor, theirs[name]), name
    assert runs[0].evaluate() == runs[1].evaluate()
    assert torch.equal(runs[0].predict(), runs[1].predict())
    assert threads() == []


def test_the_next_subnet_is_loaded_and_the_last_one_saved_while_one_trains(tmp_path, monkeypatch):
    run = trainer(tmp_path, num_subnets=3, rounds=1)
    loads, saves = threading.Semaphore(0), threading.Semaphore(0)
    load, save, train_one = mapped.RoundOnDisk.load, mapped.RoundOnDisk.save, run.executor._train

    def noted(transfer: Any, *args: Any, call: Any, done: threading.Semaphore) -> None:
        call(transfer, *args)
        done.release()

    def waits(program: Any, plan: Any, subnets: range) -> Tensor:
        if subnets[0] == 0:
            assert loads.acquire(timeout=20)
        if subnets[0] < 2:
            assert loads.acquire(timeout=20), "the next one is loaded meanwhile"
        if subnets[0] > 0:
            assert saves.acquire(timeout=20), "the last one is saved meanwhile"
        return train_one(program, plan, subnets)

    monkeypatch.setattr(mapped.RoundOnDisk, "load", partialmethod(noted, call=load, done=loads))
    monkeypatch.setattr(mapped.RoundOnDisk, "save", partialmethod(noted, call=save, done=saves))
    monkeypatch.setattr(run.executor, "_train", waits)
    run.fit()


def failing(times: int) -> Any:
    """An ``os.preadv`` that fails from some call on."""
    left = iter(range(times))
    preadv = os.preadv

    def read(*args: Any) -> int:
        if next(left, None) is None:
            raise OSError(5, "the disk does not answer")
        return preadv(*args)

    return read


@pytest.mark.parametrize("times", [0, 30, 300])
def test_an_error_of_the_disk_reaches_the_caller_and_leaves_no_thread(tmp_path, monkeypatch, times):
    with tiny_blocks():
        run = trainer(tmp_path, rounds=40)
        monkeypatch.setattr(os, "preadv", failing(times))
        with pytest.raises(OSError, match="does not answer"):
            run.fit()
    assert threads() == []
    assert not (tmp_path / "model.safetensors").exists()


def test_a_diverging_subnet_reaches_the_caller_and_leaves_no_thread(tmp_path):
    run = trainer(tmp_path, lr=1e30, norm=None, optimizer="sgd")
    with pytest.raises(DivergedError, match="round 0"):
        run.fit()
    assert threads() == []


def test_a_file_that_is_cut_short_is_noticed(tmp_path):
    with tiny_blocks():
        run = trainer(tmp_path)
        with run.store.open(run.assign(run.rounds[0])) as transfer:
            part = {"convs.1.lin_l.weight": torch.empty(1, 4, 4)}
            os.truncate(run.store.file.path, 4096)
            with pytest.raises(CheckpointError, match="cut short"):
                transfer.load([0], part)


def test_a_finished_run_has_its_model_and_nothing_else(tmp_path):
    run = trainer(tmp_path, checkpoint_every=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]
    run.fit()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoints", "config.json", "history.jsonl", "model.safetensors", "result.json",
    ]  # fmt: skip


def test_what_happens_to_the_model_afterwards_leaves_the_file_alone(tmp_path):
    run = trainer(tmp_path)
    run.fit()
    path = tmp_path / "model.safetensors"
    before = path.read_bytes()
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.add_(1)
    assert path.read_bytes() == before
    run.save(tmp_path / "copy")
    changed = load_file(tmp_path / "copy" / "model.safetensors")
    assert all(torch.equal(changed[n], t) for n, t in model_tensors(run.model).items())
    run.load(tmp_path)
    kept = load_file(path)
    assert all(torch.equal(kept[n], t) for n, t in model_tensors(run.model).items())
    assert path.read_bytes() == before
    run.save(tmp_path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("keep_best", [True, False])
def test_a_run_may_be_saved_before_it_ends(tmp_path, keep_best):
    saved: list[dict[str, Tensor]] = []

    def save(run: GISTTrainer, record: Any) -> None:
        run.save(tmp_path / "often")
        saved.append(load_file(tmp_path / "often" / "model.safetensors"))
        same = {n: t.detach().clone() for n, t in model_tensors(run.model).items()}
        assert all(torch.equal(saved[-1][n], t) for n, t in same.items())

    often = trainer(tmp_path / "often", callbacks=save, keep_best=keep_best)
    often.fit()
    once = trainer(tmp_path / "once", keep_best=keep_best)
    once.fit()
    for name, tensor in model_tensors(once.model).items():
        assert torch.equal(model_tensors(often.model)[name], tensor)
    assert not torch.equal(saved[0]["convs.1.lin_l.weight"], saved[1]["convs.1.lin_l.weight"])
    assert not (tmp_path / "often" / "store").exists()


class Interrupt:
    """Ends a run as Ctrl-C would."""

    def __call__(self, trainer: GISTTrainer, record: object) -> bool:
        raise KeyboardInterrupt


def test_an_interrupted_run_is_not_taken_for_a_finished_one_and_leaves_nothing(tmp_path):
    run = trainer(tmp_path, callbacks=Interrupt())
    with pytest.raises(KeyboardInterrupt):
        run.fit()
    assert not (tmp_path / "model.safetensors").exists()
    del run
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_cleared_away(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "model.safetensors").write_bytes(b"half")
    (tmp_path / "store" / "best.safetensors").write_bytes(b"half")
    trainer(tmp_path, keep_best=False).fit()
    assert not (tmp_path / "store").exists()


def test_two_runs_in_one_directory_are_refused(tmp_path):
    first = trainer(tmp_path)
    with pytest.raises(ConfigError, match=r"another run is at work.*del trainer"):
        trainer(tmp_path)
    first.fit()
    trainer(tmp_path).fit()


@pytest.mark.parametrize(
    ("settings", "copies"),
    [
        ({"keep_best": False}, 1),
        ({}, 2),
        ({"keep_best": False, "checkpoint_every": 1}, 3),
        ({"checkpoint_every": 1}, 6),
    ],
)
def test_a_disk_without_room_is_refused_before_anything_is_written(
    tmp_path, monkeypatch, settings, copies
):
    with torch.device("meta"):
        model = gist.nn.GraphSAGE(6, 16, 3, 3)
    nbytes = FileLayout.of(model_tensors(model)).nbytes
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=copies * nbytes - 1))
    with pytest.raises(ConfigError, match=f"no room.*expected: {copies} x {nbytes:,} bytes.*out="):
        trainer(tmp_path, **settings)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=copies * nbytes))
    trainer(tmp_path, **settings)


def test_a_run_takes_as_many_copies_as_is_said(tmp_path):
    """Every round is better than the last, so that every checkpoint has a best one of its own."""
    most = 0

    def count(run: GISTTrainer, record: Any) -> None:
        nonlocal most
        files = {f.stat().st_ino: f.stat().st_size for f in tmp_path.rglob("*.safetensors")}
        most = max(most, sum(files.values()))

    run = trainer(tmp_path, checkpoint_every=1, rounds=6, callbacks=count)
    nbytes = run.store.file.layout.nbytes
    ranks = iter(range(100))
    run.objective.evaluate = lambda model: {
        "val_metric": next(ranks), "test_metric": 0.0, "val_loss": 0.0, "train_metric": 0.0,
    }  # fmt: skip
    run.fit()
    assert most == 5 * nbytes  # in the moment before it is dropped, an old one has the sixth
    assert disk_copies(keep_best=True, checkpoints=True) == 6


def test_the_best_model_comes_back_or_the_last_one(tmp_path):
    def fit(name: str, **settings: Any) -> tuple[GISTTrainer, list[dict[str, Tensor]]]:
        seen: list[dict[str, Tensor]] = []

        def note(run: GISTTrainer, record: Any) -> None:
            seen.append({n: t.detach().clone() for n, t in model_tensors(run.model).items()})

        run = trainer(tmp_path / name, callbacks=note, **settings)
        metrics = iter([0.1, 0.9, 0.5, 0.2])
        run.objective.evaluate = lambda model: {
            "val_metric": next(metrics), "test_metric": 0.0, "val_loss": 0.0, "train_metric": 0.0,
        }  # fmt: skip
        assert run.fit().best.round == 1
        return run, seen

    for store in ("memory", "disk"):
        for keep, wanted in ((True, 1), (False, 3)):
            run, seen = fit(f"{store}-{keep}", store=store, keep_best=keep)
            for name, tensor in model_tensors(run.model).items():
                assert torch.equal(tensor, seen[wanted][name])


def test_pages_of_the_file_are_let_go_of_and_nothing_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(mapped, "RESIDENT_BYTES", 2**20)
    monkeypatch.setattr(mapped, "_LOOK_EVERY_SECONDS", 0.001)
    tensors = {"w": torch.randn(4096, 4096)}
    spec = PartitionSpec(
        groups={"g": UnitGroup(name="g", size=4096)},
        layouts={"w": ParamLayout(name="w", shape=(4096, 4096), slots=(Slot(dim=0, group="g"),))},
    )
    store = MappedStore(Bag(tensors), spec, tmp_path)
    drops = []
    drop = mapped_file.MappedFile.drop
    monkeypatch.setattr(mapped_file.MappedFile, "drop", lambda file: (drops.append(1), drop(file)))
    before = mapped._resident_file_bytes()
    with store.reading(), torch.no_grad():
        for _ in range(3):
            store.model.w.add_(1)
            tensors["w"].add_(1)
    assert len(drops) > 2
    assert mapped._resident_file_bytes() - before < tensors["w"].nbytes // 2
    assert torch.equal(store.model.w, tensors["w"])
    assert threads() == []


def test_a_model_without_memory_is_initialised_in_its_file(tmp_path):
    runs = [trainer(tmp_path / str(i), meta=True, seed=5) for i in range(2)]
    ours, theirs = (model_tensors(run.model) for run in runs)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name])
        assert tensor.data_ptr() == runs[0].store.file.tensors[name].data_ptr()
    assert float(ours["convs.1.lin_l.weight"].detach().std()) > 0.05
    result = runs[0].fit()
    assert result.history[-1].train_loss < result.history[0].train_loss
    assert set(load_file(tmp_path / "0" / "model.safetensors")) == set(ours)


def test_a_model_without_memory_needs_the_disk(tmp_path):
    with pytest.raises(ConfigError, match=r"meta device has no values.*store='disk'"):
        trainer(tmp_path, "memory", meta=True)


def test_a_model_that_cannot_be_initialised_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_geometric.nn.Linear, "reset_parameters", lambda layer: None)
    with pytest.raises(ConfigError, match=r"cannot be initialised.*got: convs\.0\.lin_l\.weight, "):
        trainer(tmp_path, meta=True)
    assert list(tmp_path.iterdir()) == []


def test_ties_stay_and_a_tied_tensor_is_there_once(tmp_path):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
            self.two.weight = self.one.weight

    layouts = {
        "one.weight": ParamLayout(name="one.weight", shape=(4, 4)),
        "one.bias": ParamLayout(name="one.bias", shape=(4,), slots=(Slot(dim=0, group="g"),)),
        "two.bias": ParamLayout(name="two.bias", shape=(4,)),
    }
    spec = PartitionSpec(groups={"g": UnitGroup(name="g", size=4)}, layouts=layouts)
    model = Tied()
    expected = model.one.weight.detach().clone()
    store = MappedStore(model, spec, tmp_path)
    assert model.two.weight is model.one.weight
    store.write(tmp_path / "copy.safetensors")
    written = load_file(tmp_path / "copy.safetensors")
    assert set(written) == set(layouts)
    assert torch.equal(written["one.weight"], expected)


def test_a_buffer_that_a_layer_puts_in_place_is_taken_in(tmp_path):
    model = Bag({"w": torch.zeros(3), "count": torch.zeros(3, dtype=torch.int64)})
    layouts = {
        "w": ParamLayout(name="w", shape=(3,), slots=(Slot(dim=0, group="g"),)),
        "count": ParamLayout(name="count", shape=(3,)),
    }
    spec = PartitionSpec(groups={"g": UnitGroup(name="g", size=3)}, layouts=layouts)
    store = MappedStore(model, spec, tmp_path)
    model.count = torch.tensor([1, 2, 3])
    store.write(tmp_path / "copy.safetensors")
    assert load_file(tmp_path / "copy.safetensors")["count"].tolist() == [1, 2, 3]
    assert model.count.data_ptr() == store.file.tensors["count"].data_ptr()


def test_only_models_of_the_cpu_are_put_on_disk(tmp_path, monkeypatch):
    class Elsewhere(Tensor):
        device = torch.device("cuda")

    spec = PartitionSpec(groups={}, layouts={})
    monkeypatch.setattr(
        mapped, "model_tensors", lambda model: {"w": torch.zeros(2).as_subclass(Elsewhere)}
    )
    with pytest.raises(ConfigError, match=r"a model on cuda.*store='memory'"):
        MappedStore(nn.Linear(1, 1), spec, tmp_path)


def test_the_command_line_trains_on_disk(tmp_path):
    arguments = ["train", "digits", "--fast-dev-run", "--store", "disk", "--json", "-"]
    outcome = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path)])
    assert outcome.exit_code == 0, outcome.output
    summary = json.loads(outcome.stdout)
    assert summary["settings"]["store"] == "disk"
    tensors = load_file(tmp_path / "model.safetensors")
    assert sum(t.numel() for t in tensors.values()) == summary["num_parameters"]
