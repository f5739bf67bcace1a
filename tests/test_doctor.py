"""The doctor tells what is there, what is not and why, and leaves everything as it was."""

from __future__ import annotations

import json
import os
import socket
import sys
from dataclasses import asdict
from importlib.metadata import version

import pytest
import torch
from rich.console import Console

from gist import doctor
from gist.catalog.cards import load_card
from gist.doctor import Check, Diagnosis, diagnose, render
from gist.graph.sparse import CSR, PICKED


def find(name: str) -> Check:
    (check,) = [check for check in diagnose().checks if check.name == name]
    return check


def test_every_check_is_sound_and_json_able():
    diagnosis = diagnose()
    names = [check.name for check in diagnosis.checks]
    assert len(names) == len(set(names))
    for name in ("python", "CPU", "memory", "torch", "threads", "CUDA", "collectives"):
        assert name in names
    for name in ("torch-geometric", "pymetis", "dgl", "ogb", "GIST_DATA", "cache", "datasets"):
        assert name in names
    for check in diagnosis.checks:
        assert check.status in ("ok", "missing", "warning")
        assert check.detail
        assert check.status == "ok" or check.remedy
    assert json.loads(json.dumps(asdict(diagnosis)))["checks"][0]["name"] == "python"
    assert find("torch").detail.startswith(version("torch"))


def test_nothing_is_asked_of_the_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was used")

    monkeypatch.delitem(sys.modules, "ogb", raising=False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    diagnose()
    assert "ogb" not in sys.modules


def test_environment_and_output_stay_as_they_were(capfd):
    before = dict(os.environ)
    diagnose()
    assert dict(os.environ) == before
    assert capfd.readouterr() == ("", "")


def test_the_graph_product_is_the_one_that_runs(monkeypatch):
    assert find("graph product, cpu float32").detail.startswith("embedding-bag kernel")
    assert find("graph product, cpu float64").detail.startswith("sparse CSR product")
    monkeypatch.setattr(CSR, "product", lambda self, x: 2 * x)
    broken = find("graph product, cpu float32")
    assert broken.status == "warning"
    assert "wrong" in broken.detail


def test_a_graph_product_that_the_user_names(monkeypatch):
    monkeypatch.setenv("GIST_PRODUCT_KERNEL", "sparse_csr")
    named = find("graph product, cpu float32")
    assert (named.status, named.detail) == ("ok", "sparse_csr (GIST_PRODUCT_KERNEL)")
    monkeypatch.setenv("GIST_PRODUCT_KERNEL", "fast")
    unknown = find("graph product, cpu float32")
    assert (unknown.status, unknown.remedy) == ("warning", "unset GIST_PRODUCT_KERNEL")
    assert "names no kernel" in unknown.detail


def test_the_kernel_that_a_trial_picks(monkeypatch):
    monkeypatch.setenv("GIST_PRODUCT_KERNEL", "fastest")
    picked = find("graph product, cpu float32").detail
    assert picked == f"{PICKED['cpu', torch.float32]}, the fastest in a trial (GIST_PRODUCT_KERNEL)"
    assert find("dgl").detail == f"{version('dgl')}: its kernels run dgl.nn models"
    monkeypatch.delenv("GIST_PRODUCT_KERNEL")
    assert find("dgl").detail.endswith("products of other models only with GIST_PRODUCT_KERNEL=dgl")


def test_a_product_that_fails_is_a_finding(monkeypatch):
    def fail(self, x):
        raise RuntimeError("no kernel\nsecond line")

    monkeypatch.setattr(CSR, "product", fail)
    check = find("graph product, cpu float64")
    assert (check.status, check.detail) == ("warning", "fails: no kernel")


def test_whether_freed_memory_is_kept(monkeypatch):
    monkeypatch.setattr(doctor.allocator, "obstacle", lambda: None)
    assert find("freed memory").detail == "kept for the next step where there is room"
    monkeypatch.setattr(doctor.allocator, "obstacle", lambda: "it is Tuesday")
    assert find("freed memory").detail == "not kept: it is Tuesday"


@pytest.mark.parametrize(
    ("modes", "asked", "status"),
    [
        ("[always] madvise never", None, "ok"),
        ("always [madvise] never", "1", "ok"),
        ("always [madvise] never", None, "missing"),
        ("always madvise [never]", "1", "missing"),
        (None, "1", None),
    ],
)
def test_whether_huge_pages_are_used(tmp_path, monkeypatch, modes, asked, status):
    file = tmp_path / "enabled"
    if modes is not None:
        file.write_text(modes + "\n")
    monkeypatch.setattr(doctor, "_HUGE_PAGES", file)
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    if asked is not None:
        monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", asked)
    found = [check for check in diagnose().checks if check.name == "huge pages"]
    assert [check.status for check in found] == ([] if status is None else [status])
    if status == "missing":
        assert found[0].remedy.endswith("set THP_MEM_ALLOC_ENABLE=1 in the environment")


def test_more_threads_than_cpus_are_warned_about(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 10**6)
    monkeypatch.setenv("OMP_NUM_THREADS", "1000000")
    check = find("threads")
    assert check.status == "warning"
    assert check.remedy.startswith("set OMP_NUM_THREADS=")


def test_why_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in find("CUDA").detail
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert find("CUDA").detail == "no device is visible (CUDA_VISIBLE_DEVICES='-1')"


@pytest.mark.parametrize(
    ("source", "status", "detail"),
    [
        (None, "missing", "not installed"),
        ("print('hello')\n", "ok", "1.2"),
        ("raise OSError('libdgl.so is not there')\n", "warning", "libdgl.so is not there"),
    ],
)
def test_dgl_may_be_missing_sound_or_broken(tmp_path, monkeypatch, capfd, source, status, detail):
    monkeypatch.delitem(sys.modules, "dgl", raising=False)
    if source is None:
        monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    else:
        (tmp_path / "dgl.py").write_text(source)
        (tmp_path / "dgl-1.2.dist-info").mkdir()
        (tmp_path / "dgl-1.2.dist-info" / "METADATA").write_text("Name: dgl\nVersion: 1.2\n")
        monkeypatch.syspath_prepend(tmp_path)
    check = doctor._dgl()
    monkeypatch.delitem(sys.modules, "dgl", raising=False)
    assert check.status == status
    assert detail in check.detail
    assert capfd.readouterr() == ("", "")


def test_data_folders_and_datasets(tmp_path, monkeypatch):
    data, cache = tmp_path / "data", tmp_path / "cache" / "gist"
    monkeypatch.setenv("GIST_CACHE", str(cache))
    monkeypatch.delenv("GIST_DATA", raising=False)
    assert find("GIST_DATA").status == "missing"
    assert find("cache").detail.endswith("not created yet")
    assert not cache.exists()
    ready, absent = find("datasets").detail.split("; not there: ")
    assert "digits" in ready
    assert "cora" in absent
    assert find("datasets").remedy.startswith("gist prepare NAME")

    monkeypatch.setenv("GIST_DATA", str(data))
    assert find("GIST_DATA").status == "warning"
    for file in load_card("cora").files:
        (data / file).parent.mkdir(parents=True, exist_ok=True)
        (data / file).touch()
    assert find("GIST_DATA").status == "ok"
    assert "cora" in find("datasets").detail.split("; not there: ")[0]


def test_the_table_shows_everything_at_any_width():
    checks = (
        Check(name="a[b]c", status="ok", detail="fine"),
        Check(name="dgl", status="missing", detail="not [red]installed[/]", remedy="pip install x"),
        Check(name="cache", status="warning", detail="not writable", remedy="chmod"),
    )
    for width in (40, 120):
        console = Console(width=width)
        with console.capture() as captured:
            console.print(render(Diagnosis(checks=checks)))
        text = captured.get()
        for part in ("a[b]c", "fine", "[red]", "→ pip install x", "not writable", "✓", "–", "!"):
            assert part in text
