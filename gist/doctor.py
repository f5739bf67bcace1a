"""What this machine and installation offer, what will be used, and why not more. Never networks."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import os
import platform
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import scipy.sparse as sp
import torch
import torch.distributed
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

import gist
from gist.catalog import places
from gist.catalog.cards import list_cards, load_card
from gist.errors import DataError
from gist.execution import allocator
from gist.graph.dgl_graph import EXTRA, backend_named
from gist.graph.sparse import FASTEST, KERNEL_VARIABLE, PICKED, SparseMatrix, product_kernel

Status = Literal["ok", "missing", "warning"]

_LOOKS = {"ok": ("✓", "green"), "missing": ("–", "dim"), "warning": ("!", "bold yellow")}
_KERNELS = {
    ("embedding_bag", "cpu"): "embedding-bag kernel: limited by memory alone",
    ("sparse_csr", "cpu"): "sparse CSR product: the embedding-bag kernel is far slower in float64",
    ("sparse_csr", "cuda"): "cuSPARSE CSR product: the embedding-bag kernel is for CPUs",
}


@dataclass(frozen=True, kw_only=True)
class Check:
    """One finding.

    Attributes:
        name: What was looked at.
        status: ``"ok"``; ``"missing"``: not there, and nothing but what needs it suffers;
            ``"warning"``: there, and something is wrong with it.
        detail: What was found.
        remedy: What changes it; None where nothing needs to.
    """

    name: str
    status: Status
    detail: str
    remedy: str | None = None


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """All findings, in the order in which they are shown."""

    checks: tuple[Check, ...]


def diagnose() -> Diagnosis:
    """Looks at everything that decides what runs here, in a second or so, without the network."""
    checks = [
        _python(),
        _cpu(),
        _memory(),
        Check(name="torch", status="ok", detail=_torch_detail()),
        _threads(),
        _cuda(),
        _collectives(),
        *_products(),
        _freed_memory(),
        *_huge_pages(),
        Check(name="torch-geometric", status="ok", detail=version("torch-geometric")),
        _imported("pymetis", "pip install pymetis"),
        _dgl(),
        _ogb(),
        *_folders(),
        _datasets(),
    ]
    return Diagnosis(checks=tuple(checks))


def render(diagnosis: Diagnosis) -> Table:
    """The findings as a table for a terminal."""
    table = Table(box=None, show_header=False, padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in diagnosis.checks:
        mark, style = _LOOKS[check.status]
        found = Text(check.detail, style="dim" if check.status == "missing" else "")
        if check.remedy is not None:
            found.append(f"\n→ {check.remedy}", style="cyan")
        table.add_row(Text(mark, style=style), Text(check.name, style="bold"), found)
    return table


def _python() -> Check:
    detail = f"{platform.python_version()} on {platform.platform()}; gist {gist.__version__}"
    return Check(name="python", status="ok", detail=detail)


def _cpu() -> Check:
    total, usable = os.cpu_count() or 1, _usable_cpus()
    detail = f"{usable} of {total} CPUs" if usable < total else f"{total} CPUs"
    capability = torch.backends.cpu.get_cpu_capability()
    return Check(name="CPU", status="ok", detail=f"{detail}, {platform.machine()}, {capability}")


def _memory() -> Check:
    memory = psutil.virtual_memory()
    detail = f"{decimal(memory.available)} available of {decimal(memory.total)}"
    return Check(name="memory", status="ok", detail=detail)


def _torch_detail() -> str:
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    mkl = "with" if torch.backends.mkl.is_available() else "without"  # type: ignore[no-untyped-call]
    return f"{torch.__version__} ({build}, {mkl} MKL)"


def _threads() -> Check:
    threads, usable = torch.get_num_threads(), _usable_cpus()
    asked = os.environ.get("OMP_NUM_THREADS")
    detail = f"{threads} for torch" + (f" (OMP_NUM_THREADS={asked})" if asked else "")
    if threads > usable:
        return Check(
            name="threads",
            status="warning",
            detail=f"{detail}, more than the {usable} CPUs this process may use",
            remedy=f"set OMP_NUM_THREADS={usable}",
        )
    return Check(name="threads", status="ok", detail=detail)


def _cuda() -> Check:
    if torch.version.cuda is None:
        return Check(
            name="CUDA",
            status="missing",
            detail="this torch is built without CUDA: everything runs on the CPU",
            remedy="on a machine with an NVIDIA GPU, install a CUDA build of torch",
        )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        why = str(caught[0].message).splitlines()[0] if caught else "no device is visible"
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        return Check(
            name="CUDA",
            status="missing",
            detail=why + ("" if hidden is None else f" (CUDA_VISIBLE_DEVICES={hidden!r})"),
            remedy="check the driver with nvidia-smi",
        )
    devices = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    detail = ", ".join(f"{device.name} ({decimal(device.total_memory)})" for device in devices)
    return Check(name="CUDA", status="ok", detail=detail)


def _collectives() -> Check:
    if not torch.distributed.is_available():
        return Check(
            name="collectives",
            status="missing",
            detail="this torch is built without torch.distributed: one process only",
            remedy="install an official build of torch",
        )
    gloo = "Gloo (CPU)" if torch.distributed.is_gloo_available() else "no Gloo"
    if torch.distributed.is_nccl_available():
        nccl = "NCCL " + ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
        if not torch.cuda.is_available():
            nccl += ", of no use without a GPU"
    else:
        nccl = "no NCCL: it comes with CUDA builds of torch"
    return Check(name="collectives", status="ok", detail=f"{gloo}; {nccl}")


def _products() -> Iterator[Check]:
    """Which kernel multiplies with the graph, and whether it does: tried on a small one."""
    named = os.environ.get(KERNEL_VARIABLE)
    rows, entries = 4096, 8
    targets = np.arange(0, rows * entries + 1, entries)
    sources = np.random.default_rng(0).integers(0, rows, rows * entries)
    means = np.full(rows * entries, 1 / entries, dtype=np.float32)
    graph = sp.csr_matrix((means, sources, targets), shape=(rows, rows))
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for dtype in (torch.float32, torch.float64):
            name = f"graph product, {device} {str(dtype).removeprefix('torch.')}"
            matrix = SparseMatrix.from_scipy(graph).to(device)
            x = torch.ones(rows, 64, dtype=dtype, device=device)
            try:
                kernel = product_kernel(device, dtype)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # torch calls sparse CSR tensors beta
                    right = torch.equal(matrix @ x, x)
            except Exception as error:  # DGL's errors are of its own; each is the finding
                detail = f"fails: {str(error).splitlines()[0]}"
                remedy = "reinstall torch" if named is None else f"unset {KERNEL_VARIABLE}"
                yield Check(name=name, status="warning", detail=detail, remedy=remedy)
                continue
            if kernel == FASTEST:
                kernel = f"{PICKED[device, dtype]}, the fastest in a trial"
            found = _KERNELS[kernel, device] if named is None else f"{kernel} ({KERNEL_VARIABLE})"
            if right:
                yield Check(name=name, status="ok", detail=found)
            else:
                detail = f"{kernel}: the result is wrong"
                yield Check(name=name, status="warning", detail=detail, remedy="reinstall torch")


def _freed_memory() -> Check:
    why = allocator.obstacle()
    detail = "kept for the next step where there is room" if why is None else f"not kept: {why}"
    return Check(name="freed memory", status="ok", detail=detail)


_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def _huge_pages() -> Iterator[Check]:
    """Whether large tensors get pages of 2 MiB instead of 4 KiB."""
    try:
        modes = _HUGE_PAGES.read_text().split()
    except OSError:
        return
    mode = next((mode.strip("[]") for mode in modes if mode.startswith("[")), "never")
    asked = os.environ.get("THP_MEM_ALLOC_ENABLE") == "1"
    if mode == "always" or (mode == "madvise" and asked):
        yield Check(name="huge pages", status="ok", detail=f"used for large tensors ({mode})")
        return
    remedy = f"write madvise into {_HUGE_PAGES}, and " if mode == "never" else ""
    yield Check(
        name="huge pages",
        status="missing",
        detail=f"not used ({mode}): clearing large tensors' pages takes longer",
        remedy=f"{remedy}set THP_MEM_ALLOC_ENABLE=1 in the environment",
    )


def _imported(package: str, remedy: str) -> Check:
    """Version of an optional package that can be imported, or why it cannot."""
    if importlib.util.find_spec(package) is None:
        return Check(name=package, status="missing", detail="not installed", remedy=remedy)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            importlib.import_module(package)
        return Check(name=package, status="ok", detail=version(package))
    except Exception as error:  # a broken package may raise anything; that is the finding
        why = str(error).strip().splitlines()[:1] or [""]
        detail = f"installed, but importing it fails: {type(error).__name__}: {why[0]}"
        return Check(name=package, status="warning", detail=detail, remedy=remedy)


def _dgl() -> Check:
    with backend_named():
        found = _imported("dgl", EXTRA)
    if found.status != "ok":
        return found
    named = os.environ.get(KERNEL_VARIABLE)
    detail = f"{found.detail}: its kernels run dgl.nn models"
    if named not in ("dgl", FASTEST):
        detail += f"; products of other models only with {KERNEL_VARIABLE}=dgl"
    return replace(found, detail=detail)


def _ogb() -> Check:
    # Not imported: its import asks the network for a newer version.
    try:
        return Check(name="ogb", status="ok", detail=version("ogb"))
    except PackageNotFoundError:
        remedy = "pip install 'gist-subnets[ogb]'"
        return Check(name="ogb", status="missing", detail="not installed", remedy=remedy)


def _folders() -> Iterator[Check]:
    *given, cache = places.data_folders(None)
    if not given:
        remedy = "set it to a folder with raw files, to read them without downloading"
        yield Check(name="GIST_DATA", status="missing", detail="not set", remedy=remedy)
    for folder in given:
        there = folder.is_dir()
        yield Check(
            name="GIST_DATA",
            status="ok" if there else "warning",
            detail=str(folder) if there else f"{folder} is no directory",
            remedy=None if there else "create it, or set GIST_DATA to another folder",
        )
    parent = next(place for place in (cache, *cache.parents) if place.exists())
    detail = f"{cache}, {decimal(shutil.disk_usage(parent).free)} free"
    if not cache.exists():
        detail += ", not created yet"
    if parent.is_dir() and os.access(parent, os.W_OK):
        yield Check(name="cache", status="ok", detail=detail)
    else:
        remedy = "set GIST_CACHE to a folder that you may write to"
        yield Check(name="cache", status="warning", detail=f"{detail}; not writable", remedy=remedy)


def _datasets() -> Check:
    """Which datasets are ready, going by the names of their files."""
    ready: list[str] = []
    absent: list[str] = []
    try:
        for name in list_cards():
            card = load_card(name)
            found = not card.checksums or places.find_raw(card, None) is not None
            (ready if found else absent).append(name)
    except DataError as error:
        return Check(name="datasets", status="warning", detail=str(error))
    detail = f"ready: {', '.join(ready) or 'none'}"
    if not absent:
        return Check(name="datasets", status="ok", detail=detail)
    detail += f"; not there: {', '.join(absent)}"
    remedy = "gist prepare NAME, with one of these names, downloads it"
    return Check(name="datasets", status="missing", detail=detail, remedy=remedy)


def _usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
