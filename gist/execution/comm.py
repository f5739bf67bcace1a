"""What processes say to each other: the one collective, every byte of it counted.

Shape legend: ``W`` ranks, the processes of a run.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from gist.errors import ConfigError, GistError, WorkerLostError

DEFAULT_TIMEOUT = 1800.0
"""Seconds that a rank waits for the others in one exchange."""

_BEAT_SECONDS = 0.5
_PATIENCE_SECONDS = 10.0
_CONNECT_SECONDS = 3.0
_SILENT_SECONDS = 3.0
"""A rank that has not been heard of for so long is taken for dead once an exchange has failed."""

_WHERE = "gist/where"
"""Key in the agent's store: the port of rank 0's."""

_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun, and every other launcher of PyTorch, puts into the environment."""


class Pending:
    """An exchange that is on its way.

    Args:
        comm: Where it was started.
        received: What it fills.
        work: PyTorch's handle; None where nothing has to be waited for.
        sent: What must stay alive meanwhile.
    """

    def __init__(self, comm: Comm, received: Tensor, work: Any = None, sent: Any = None) -> None:
        self._comm, self._received, self._work, self._sent = comm, received, work, sent

    def wait(self) -> Tensor:
        """What the other ranks sent, when all of it is there.

        Raises:
            WorkerLostError: a rank died or does not answer; names it.
        """
        if self._work is not None:
            with self._comm.guarded():
                self._comm.watch(self._work)
                self._work.wait()
        self._work = self._sent = None
        return self._received


class Comm:
    """The ranks of a run, and what they exchange: all-to-all, and what is made of it.

    A process on its own is a run of one rank, which exchanges nothing.

    Args:
        device: Of the tensors that are exchanged.
        group: Its process group; None for a process on its own.
        pulse: Tells which ranks are alive, where that is known.

    Attributes:
        rank: Of this process, from 0.
        size: ``W``.
        sent: Bytes of tensors sent to other ranks so far.
        received: Bytes of tensors received from other ranks so far.
        told: Bytes of messages sent and received so far: settings, metrics, names.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        group: dist.ProcessGroup | None = None,
        pulse: Pulse | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.group, self._pulse = group, pulse
        self.rank = 0 if group is None else group.rank()
        self.size = 1 if group is None else group.size()
        self.sent = self.received = self.told = 0

    @property
    def is_distributed(self) -> bool:
        """Whether there is a process group, if only of one rank."""
        return self.group is not None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which prints and writes for all."""
        return self.rank == 0

    @property
    def ranks_here(self) -> int:
        """Ranks that share this machine's memory, as the launcher says."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if self.size > 1 else 1

    def subnets(self, count: int, rank: int | None = None) -> range:
        """Those of so many subnets that a rank trains, this one by default: every ``W``-th."""
        return range(self.rank if rank is None else rank, count, self.size)

    def start(
        self, outgoing: Tensor, counts_out: Sequence[int], counts_in: Sequence[int]
    ) -> Pending:
        """Starts to send a part of ``outgoing`` to each rank, and to receive one from each.

        Args:
            outgoing: ``[sum(counts_out)]``, the parts in the order of the ranks; left alone until
                the exchange is over.
            counts_out: ``[W]`` entries for each rank; none for this one.
            counts_in: ``[W]`` entries from each rank.
        """
        outgoing = outgoing.to(self.device)
        received = outgoing.new_empty(sum(counts_in))
        if self.size == 1:
            return Pending(self, received)
        assert counts_out[self.rank] == counts_in[self.rank] == 0, "nothing goes to oneself"
        self.sent += sum(counts_out) * outgoing.element_size()
        self.received += sum(counts_in) * outgoing.element_size()
        with self.guarded():
            work = dist.all_to_all_single(
                received,
                outgoing,
                list(counts_in),
                list(counts_out),
                group=self.group,
                async_op=True,
            )
        return Pending(self, received, work, outgoing)

    def gather(self, own: Tensor, counts: Sequence[int]) -> list[Tensor]:
        """Each rank's one-dimensional tensor, on every rank.

        Args:
            own: ``[counts[rank]]``, on :attr:`device`.
            counts: ``[W]`` entries of each rank.
        """
        others = [0 if rank == self.rank else 1 for rank in range(self.size)]
        counts_in = [count * other for count, other in zip(counts, others, strict=True)]
        counts_out = [own.numel() * other for other in others]
        received = self.start(own.repeat(self.size - 1), counts_out, counts_in).wait()
        parts = list(torch.split(received, counts_in))
        parts[self.rank] = own
        return parts

    def to_main(self, own: Tensor, counts: Sequence[int]) -> list[Tensor]:
        """Each rank's one-dimensional tensor, on rank 0; nothing on the others.

        Args:
            own: ``[counts[rank]]``.
            counts: ``[W]`` entries of each rank.
        """
        own = own.to(self.device)
        none = [0] * self.size
        if not self.is_main:
            self.start(own, [own.numel(), *none[1:]], none).wait()
            return []
        counts_in = [0, *counts[1:]]
        received = self.start(own[:0], none, counts_in).wait()
        return [own, *torch.split(received, counts_in)[1:]]

    def hand_out(self, parts: Sequence[Tensor] | None, like: Tensor, count: int) -> Tensor:
        """This rank's part of what rank 0 has, one-dimensional.

        Args:
            parts: ``[W]`` one-dimensional tensors, on rank 0; None on the others.
            like: A tensor of their dtype.
            count: Entries of this rank's.
        """
        none = [0] * self.size
        if parts is None:
            empty = like.new_empty(0, device=self.device)
            return self.start(empty, none, [count, *none[1:]]).wait()
        counts_out = [0, *(part.numel() for part in parts[1:])]
        self.start(torch.cat([parts[0][:0], *parts[1:]]), counts_out, none).wait()
        return parts[0]

    def gather_values(self, value: Any) -> list[Any]:
        """Each rank's value, on every rank; it is sent as JSON."""
        if self.size == 1:
            return [value]
        sent, received = self.sent, self.received
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        data = data.to(self.device)
        count = torch.tensor([data.numel()], device=self.device)
        counts = [int(each) for each in self.gather(count, [1] * self.size)]
        parts = self.gather(data, counts)
        self.told += self.sent - sent + self.received - received
        self.sent, self.received = sent, received
        return [json.loads(bytes(part.tolist())) for part in parts]

    def from_main(self, value: Any) -> Any:
        """Rank 0's value, on every rank; it is sent as JSON."""
        return self.gather_values(value if self.is_main else None)[0]

    @torch.no_grad()
    def fill_from_main(self, tensors: Iterable[Tensor]) -> None:
        """Overwrites tensors with rank 0's, in place."""
        for tensor in tensors if self.size > 1 else ():
            data = tensor.detach().reshape(-1).view(torch.uint8)
            counts = [data.numel()] + [0] * (self.size - 1)
            own = data.to(self.device) if self.is_main else data.new_empty(0, device=self.device)
            got = self.gather(own, counts)[0].to(tensor.device)
            tensor.copy_(got.view(tensor.dtype).view(tensor.shape))

    def on_main(self, job: Callable[[], Any]) -> Any:
        """What a job returns that rank 0 runs while the others wait; it is sent as JSON.

        Raises:
            GistError: it failed, on the other ranks; on rank 0 its own error.
        """
        if self.size == 1:
            return job()
        error: Exception | None = None
        value = None
        if self.is_main:
            try:
                value = job()
                json.dumps(value)
            except Exception as raised:
                error = raised
        failed = None if error is None else f"{type(error).__name__}: {error}"
        value, failed = self.from_main([value, failed])
        if error is not None:
            raise error
        if failed is not None:
            raise GistError("rank 0 failed", got=failed)
        return value

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Turns a failed exchange into an error that names the rank that is missing."""
        failure: RuntimeError | None = None
        try:
            yield
        except RuntimeError as error:
            if not _is_of_an_exchange(error):
                raise
            failure = error
        if failure is None:
            return
        reason = str(failure).partition("\n")[0][:200]
        lost = [] if self._pulse is None else self._pulse.missing()
        _BROKEN.append(self)
        raise WorkerLostError(
            f"rank {self.rank} stops, because "
            + (f"rank {', '.join(map(str, lost))} is gone" if lost else "an exchange failed"),
            got=reason,
            remedy="look for the first error of a worker. If there is none, one has called a "
            "method of the trainer, or ended, without the others: all must call evaluate, "
            "predict, save and gather_model. After a death, torchrun --max-restarts goes on from "
            "the last checkpoint",
        ) from failure

    def watch(self, work: Any) -> None:
        """Returns when an exchange of a GPU is over; NCCL does not say that a rank is gone.

        Raises:
            RuntimeError: a rank is not heard of any more.
        """
        if self.device.type != "cuda" or self._pulse is None:
            return
        looked = time.monotonic()
        while not work.is_completed():
            if time.monotonic() - looked > _PATIENCE_SECONDS:
                if self._pulse.missing():
                    raise RuntimeError("NCCL: an exchange does not end")
                looked = time.monotonic()
            time.sleep(0.0005)


def _is_of_an_exchange(error: RuntimeError) -> bool:
    """Whether an error came up between processes, and not in what is computed between."""
    if isinstance(error, torch.OutOfMemoryError):
        return False
    words = ("gloo", "nccl", "connection", "socket", "timed out", "timeout")
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in words)


class Pulse:
    """Tells the other ranks that this one is alive, and which of them are.

    Args:
        connect: Opens a connection of its own to the store that all ranks reach.
        rank: Of this process; rank 0 keeps that store.
        size: ``W``.
    """

    def __init__(self, connect: Callable[[], Store], rank: int, size: int) -> None:
        self._connect, self._rank, self._size = connect, rank, size
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="gist-pulse", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        with contextlib.suppress(Exception):  # the store is gone: so is the run
            store = self._connect()
            while not self._over.is_set():
                store.add(f"beat/{self._rank}", 1)
                self._over.wait(_BEAT_SECONDS)

    def missing(self) -> list[int]:
        """Ranks that are not heard of any more; takes a few seconds."""
        try:
            store = self._connect()
            before = self._beats(store)
            time.sleep(_SILENT_SECONDS)
            after = self._beats(store)
            lost = [rank for rank in range(self._size) if after[rank] == before[rank]]
            deadline = time.monotonic() + 2 * _SILENT_SECONDS
            looked = store.add("looked", 1)
            while (
                self._rank == 0 and looked < self._size - len(lost) and time.monotonic() < deadline
            ):
                time.sleep(0.1)  # the others still look
                looked = store.add("looked", 0)
        except Exception:
            return [0]  # who keeps the store
        return lost

    def _beats(self, store: Store) -> list[int]:
        return [int(store.add(f"beat/{rank}", 0)) for rank in range(self._size)]

    def stop(self) -> None:
        """Ends the thread."""
        self._over.set()
        self._thread.join(timeout=5)


_PULSES: list[Pulse] = []
"""Of this process: one, once it has joined a run."""

_BROKEN: list[Comm] = []
"""Those in which an exchange has failed: others may wait in it for ever."""


def is_launched() -> bool:
    """Whether torchrun, or another launcher of PyTorch, started this process."""
    return all(name in os.environ for name in _LAUNCHED)


def join(
    device: torch.device, *, backend: str | None = None, timeout: float = DEFAULT_TIMEOUT
) -> Comm:
    """The ranks that this process was started with, by torchrun or another launcher.

    A process group that exists already is used as it is, with its own backend and timeout, and
    without telling which rank died; else one is made from the environment. A process that was
    started on its own is alone.

    Args:
        device: Where the model is.
        backend: ``"nccl"`` or ``"gloo"``; by default NCCL for a model on a GPU, else Gloo.
        timeout: Seconds that a rank waits for the others in one exchange.

    Raises:
        ConfigError: the backend is not there, or ranks of one machine share a GPU.
    """
    if not dist.is_available() or not (is_launched() or dist.is_initialized()):
        return Comm(device)
    if not dist.is_initialized():
        backend = backend or ("nccl" if device.type == "cuda" else "gloo")
        available = dist.is_nccl_available() if backend == "nccl" else dist.is_gloo_available()
        if not available or (backend == "nccl" and device.type != "cuda"):
            raise ConfigError(
                f"the backend {backend} cannot be used",
                got=f"a model on {device.type}; PyTorch was built "
                f"{'with' if available else 'without'} {backend}",
                expected="nccl for a model on a GPU, or gloo",
            )
        _initialise(device, backend, timeout)
    used = str(dist.get_backend())
    comm = Comm(
        device if used == "nccl" else "cpu",
        dist.distributed_c10d._get_default_group(),
        _PULSES[0] if _PULSES else None,
    )
    _check_devices(comm, device)
    return comm


def _initialise(device: torch.device, backend: str, timeout: float) -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    patience = timedelta(seconds=timeout)
    # The agent of torchrun may keep a store there, and keeps it over restarts, which its agents
    # count apart: keys of an earlier start must not be met again. So rank 0 always serves a store
    # of its own, and has the agent's tell where.
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    agent = _connect(host, port, patience) if by_agent else None
    if rank == 0:
        store, port = _serve(host, 0 if agent else port, size, patience)
        if agent is not None:
            agent.set(_WHERE, str(port))
    else:
        store, port = _find(host, port, agent, patience)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
    short = timedelta(seconds=_CONNECT_SECONDS)
    _PULSES.append(Pulse(lambda: _connect(host, port, short), rank, size))
    atexit.register(_leave)


def _leave() -> None:
    for pulse in _PULSES:
        pulse.stop()
    _PULSES.clear()
    if dist.is_initialized() and not _BROKEN:
        dist.destroy_process_group()


def _connect(host: str, port: int, patience: timedelta) -> TCPStore:
    return TCPStore(host, port, is_master=False, timeout=patience)


def _serve(host: str, port: int, size: int, patience: timedelta) -> tuple[TCPStore, int]:
    """A store that listens where it is to be reached, and nowhere else; and its port."""
    listener = listen(host, port)
    port = listener.getsockname()[1]
    store = TCPStore(
        host,
        port,
        size,
        is_master=True,
        timeout=patience,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    return store, port


def _find(host: str, port: int, agent: Store | None, patience: timedelta) -> tuple[TCPStore, int]:
    """The store that rank 0 serves, and its port; where an earlier start had one, nobody answers.

    Raises:
        WorkerLostError: rank 0 is not there in time.
    """
    short = min(patience, timedelta(seconds=_CONNECT_SECONDS))
    deadline = time.monotonic() + patience.total_seconds()
    while True:
        if agent is not None:
            port = int(agent.get(_WHERE))
        try:
            _connect(host, port, short)
            return _connect(host, port, patience), port
        except RuntimeError as error:
            if time.monotonic() > deadline:
                raise WorkerLostError(
                    "rank 0 is not there",
                    got=f"no answer from {host}, port {port}: {error}",
                    remedy="look whether it was started, and whether a firewall is between",
                ) from error
            time.sleep(0.2)


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def listen(host: str, port: int = 0) -> socket.socket:
    """A listening socket on one address; port 0 takes a free one."""
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(address)
    listener.listen(1024)
    return listener


def _check_devices(comm: Comm, device: torch.device) -> None:
    if device.type != "cuda":
        return
    own = [socket.gethostname(), str(device), str(torch.cuda.get_device_properties(device).uuid)]
    places = comm.gather_values(own)
    if len({tuple(place) for place in places}) < len(places):
        raise ConfigError(
            "two workers share a GPU",
            got=", ".join(f"rank {rank}: {name}" for rank, (_, name, _) in enumerate(places)),
            remedy="build the model on the device gist.local_device() of each worker",
        )


def local_device() -> torch.device:
    """The device of this worker: the GPU of its local rank where there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
