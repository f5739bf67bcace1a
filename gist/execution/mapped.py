"""The global parameters in a file on disk, mapped into memory: models wider than memory holds."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import shutil
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

from gist.errors import ConfigError
from gist.execution.initialise import has_no_memory, initialise, place_model
from gist.execution.mapped_file import Job, MappedFile
from gist.execution.partfiles import read_whole
from gist.execution.tensorfile import (
    FileLayout,
    copy_file,
    replace_file,
    write_tensors,
)
from gist.partition.assignment import Assignment
from gist.partition.spec import PartitionSpec, model_tensors
from gist.partition.transfer import Index, Merge

MODEL_FILE = "model.safetensors"

RESIDENT_BYTES = 2**30
"""About so much of the file stays in this process's memory while the model itself is read."""

_LOOK_EVERY_SECONDS = 0.05


def disk_copies(*, keep_best: bool, checkpoints: bool) -> int:
    """How many copies of the model a run with its store on disk has there, at the most.

    The store itself; the best one; and of each of two checkpoints the model, and a best one that
    the run may have replaced since. A copy has the size of ``FileLayout.of(tensors).nbytes``.
    """
    return 1 + keep_best + 2 * checkpoints * (1 + keep_best)


class MappedStore:
    """The model's tensors in a file; the model is views of it, and goes on working as it is.

    While a run goes on, the file is ``store/model.safetensors`` in the run's directory, which is
    removed when the run ends or fails. Only a finished run has ``model.safetensors``: the same file
    under its final name; from then on, changes to the model stay in memory.

    A model on the ``meta`` device is never held in memory: its file is filled by the modules' own
    ``reset_parameters()``, see :func:`~gist.execution.initialise.initialise`. A model in memory is
    moved to the file.

    Args:
        model: The global model, on the CPU or the ``meta`` device.
        spec: Its partition spec.
        folder: The run's directory.
        seed: Of the initialisation, where the model has no values yet.
        copies: How many copies of the model the disk must have room for.

    Raises:
        ConfigError: the model is on another device, or cannot be initialised; the disk has no room;
            or another run is at work in the directory.
    """

    overlaps = True

    def __init__(
        self, model: nn.Module, spec: PartitionSpec, folder: Path, *, seed: int = 0, copies: int = 1
    ) -> None:
        self.model, self.spec = model, spec
        tensors, without_memory = model_tensors(model), has_no_memory(model)
        if other := {t.device.type for t in tensors.values()} - {"cpu", "meta"}:
            raise ConfigError(
                "a store on disk holds a model of the CPU",
                got=f"a model on {', '.join(other)}",
                remedy="use store='memory', or move the model to the CPU",
            )
        self.layout = FileLayout.of(tensors)
        self._final = folder / MODEL_FILE
        self._claim = _Claim(folder / "store")
        self._working = self._claim.folder / MODEL_FILE
        self._best = self._claim.folder / "best.safetensors"
        try:
            _require_room(folder, self.layout.nbytes, copies)
            self.file = MappedFile.create(self._working, self.layout)
            if not without_memory:
                self._take(tensors)
            place_model(model, self.file.tensors)
            if without_memory:
                with self.reading():
                    initialise(model, seed)
        except BaseException:
            self._claim.release()
            raise

    @property
    def device(self) -> torch.device:
        """See :attr:`Store.device`."""
        return torch.device("cpu")

    @property
    def has_kept(self) -> bool:
        """See :attr:`Store.has_kept`."""
        return self._best.exists()

    @contextlib.contextmanager
    def open(self, assignment: Assignment) -> Iterator[RoundOnDisk]:
        """See :meth:`Store.open`."""
        self._go_on()
        with _pool() as pool:
            yield RoundOnDisk(self.file, self.spec, assignment, pool)
        self.file.drop()

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """See :meth:`Store.reading`.

        Pages of the file that are used through the model count as this process's memory, although
        the system may take them back at any time. Here they are let go of whenever they are more
        than :data:`RESIDENT_BYTES`, and in the end.
        """
        over = threading.Event()
        thread = threading.Thread(target=self._keep_small, args=(over,), name="gist-resident")
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self.file.drop()

    def _keep_small(self, over: threading.Event) -> None:
        before = _resident_file_bytes()
        while not over.wait(_LOOK_EVERY_SECONDS):
            if _resident_file_bytes() - before > RESIDENT_BYTES:
                self.file.drop()

    def keep(self) -> None:
        """See :meth:`Store.keep`."""
        self._best.unlink(missing_ok=True)  # a checkpoint may have it too
        self._copy(self._best)

    def recall(self) -> None:
        """See :meth:`Store.recall`."""
        if not self.has_kept:
            return
        if self._best.stat().st_nlink == 1:
            os.replace(self._best, self._working)
        else:  # a checkpoint has it too, and must not see changes
            self._working.unlink()
            copy_file(self._best, self._working)
            self._best.unlink()
        self._map(self._working)

    def write(self, path: Path) -> None:
        """See :meth:`Store.write`; to the run's own ``model.safetensors``, the file is moved."""
        self._gather()
        if path.resolve() != self._final.resolve() or self.file.private:
            with replace_file(path) as new:
                self._copy(new)
            return
        self.file.sync()
        os.replace(self._working, self._final)
        self._map(self._final, private=True)
        if not self.has_kept:
            self._claim.release()

    def write_kept(self, path: Path) -> None:
        """See :meth:`Store.write_kept`; no second copy, where the file system can link."""
        _link_or_copy(self._best, path)

    def write_part(self, path: Path) -> None:
        """See :meth:`Store.write_part`."""
        self.write(path)

    def read(self, paths: Sequence[Path]) -> None:
        """See :meth:`Store.read`."""
        self._go_on()
        with self.reading():
            read_whole(paths, self.file.tensors, self.spec)

    def read_kept(self, paths: Sequence[Path]) -> None:
        """See :meth:`Store.read_kept`."""
        self._go_on()
        self._best.unlink(missing_ok=True)
        if len(paths) == 1:
            _link_or_copy(paths[0], self._best)
            return
        kept = MappedFile.create(self._best, self.layout)
        read_whole(paths, kept.tensors, self.spec)

    def _take(self, tensors: Mapping[str, Tensor]) -> None:
        with _pool() as pool:
            for name, tensor in tensors.items():
                _run(pool, self.file.writes(name, (None,) * tensor.dim(), tensor.detach()))

    def _copy(self, path: Path) -> None:
        self._gather()
        if self.file.private:
            write_tensors(path, self.file.tensors)
        else:
            copy_file(self.file.path, path)

    def _map(self, path: Path, *, private: bool = False) -> None:
        self.file = MappedFile(path, self.layout, private=private)
        place_model(self.model, self.file.tensors)

    @torch.no_grad()
    def _gather(self) -> None:
        """Takes in what is no longer a view: a layer may have put another buffer in place."""
        strays = [
            name
            for name, tensor in model_tensors(self.model).items()
            if tensor.data_ptr() != self.file.tensors[name].data_ptr()
        ]
        for name in strays:
            self.file.tensors[name].copy_(model_tensors(self.model)[name])
        if strays:
            place_model(self.model, self.file.tensors)

    def _go_on(self) -> None:
        """Makes changes to the model go to the file: to a copy, where the run has ended."""
        if self.file.private:
            if not self._claim.release.alive:
                self._claim = _Claim(self._claim.folder)
            self._copy(self._working)
            self._map(self._working)
        self._gather()


class RoundOnDisk:
    """One round's traffic with a file; see :class:`~gist.execution.store.RoundTransfer`.

    Args:
        file: Where the tensors live.
        spec: How they follow the units.
        assignment: Which units each subnet holds.
        pool: Threads that read and write.
    """

    def __init__(
        self,
        file: MappedFile,
        spec: PartitionSpec,
        assignment: Assignment,
        pool: ThreadPoolExecutor,
    ) -> None:
        self._file, self._spec, self._pool = file, spec, pool
        self._merging = _MergeOnDisk(file, spec, assignment, pool)

    def load(self, subnets: Sequence[int], out: Mapping[str, Tensor]) -> None:
        """See :meth:`RoundTransfer.load`."""
        _run(self._pool, self._loading(subnets, out))

    def _loading(self, subnets: Sequence[int], out: Mapping[str, Tensor]) -> Iterator[Job]:
        for name, kept in out.items():
            for place, subnet in enumerate(subnets):
                index = self._merging.selections[subnet].index(self._spec.layouts[name])
                yield from self._file.reads(name, index, kept[place])

    def save(self, part: Mapping[str, Tensor]) -> None:
        """See :meth:`RoundTransfer.save`."""
        self._merging.add(part)

    def finish(self) -> None:
        """See :meth:`RoundTransfer.finish`."""
        self._merging.finish()


class _MergeOnDisk(Merge):
    def __init__(
        self,
        file: MappedFile,
        spec: PartitionSpec,
        assignment: Assignment,
        pool: ThreadPoolExecutor,
    ) -> None:
        super().__init__(file.tensors, spec, assignment)
        self.file, self.pool = file, pool

    def write(self, name: str, index: Index, part: Tensor) -> None:
        _run(self.pool, self.file.writes(name, index, part))


def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="gist-store")


def _run(pool: ThreadPoolExecutor, jobs: Iterable[Job]) -> None:
    for _ in pool.map(lambda job: job(), jobs):
        pass


class _Claim:
    """A directory of one run's working files: locked, empty at first, removed in the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise ConfigError(
                "another run is at work in the directory",
                got=folder.parent,
                remedy="give another out; or, if it is an earlier trainer of this program that "
                "was interrupted, delete it first (del trainer)",
            ) from error
        except OSError:  # a file system without locks
            pass
        for leftover in folder.iterdir():  # of a run that was killed
            leftover.unlink()
        self.release = weakref.finalize(self, _remove, folder, lock)


def _remove(folder: Path, lock: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)


def _require_room(folder: Path, nbytes: int, copies: int) -> None:
    kept = {
        (status.st_dev, status.st_ino): status.st_size
        for path in (folder / "checkpoints").rglob("*.safetensors")
        for status in [path.stat()]
    }
    free = shutil.disk_usage(folder).free + sum(kept.values())
    if free < copies * nbytes:
        raise ConfigError(
            "the disk has no room for the model and what a run keeps of it",
            got=f"{free:,} bytes in {folder}, with the checkpoints that are there",
            expected=f"{copies} x {nbytes:,} bytes",
            remedy="give out=... on another disk; keep_best=False and a run without "
            "checkpoint_every need fewer copies",
        )


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        copy_file(source, target)


def _resident_file_bytes() -> int:
    """Of files, in the memory of this process; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[2]) * mmap.PAGESIZE
    except OSError:
        return 0
