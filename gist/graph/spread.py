"""Exact scores of all nodes by a model that is spread over ranks, layer by layer.

Shape legend: ``N`` nodes, ``d`` columns of a layer's input, ``D`` of its output, ``W`` ranks.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Container, Mapping, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gist.graph.adjacency import Adjacency
from gist.graph.blockwise import Blockwise, Finish, blocks
from gist.graph.hidden import Hidden
from gist.graph.layerwise import Layer, Layerwise, require_layerwise
from gist.graph.live_bytes import LiveBytes
from gist.graph.stages import ConvStage, Place, as_registered, find_stages
from gist.partition.rules.registry import without_caches
from gist.partition.spec import model_tensors

EXCHANGE_BYTES = 16 * 2**20
"""Blocks of columns on their way take about this much; two are, so that one is awaited less."""

_RESIDENT_BLOCKS = 8
"""Blocks of rows that the least limit has room for: a quarter of what is left is resident of each
hidden layer in a file."""


class Waiting(Protocol):
    """An exchange that is on its way."""

    def wait(self) -> Tensor:
        """What the other ranks sent."""


class Peers(Protocol):
    """The ranks that have a model between them.

    Attributes:
        rank: This one.
        size: ``W``.
    """

    rank: int
    size: int

    def take(self, names: Sequence[str], cuts: Sequence[slice] | None) -> dict[str, Tensor]:
        """Tensors of the model by name, not to be written to; all ranks take part.

        Args:
            names: Which.
            cuts: ``[W]``: of their first dim, the rows of each rank; None gives all to all.
        """

    def taking(self, names: Sequence[str], cuts: Sequence[slice] | None) -> tuple[int, int]:
        """Bytes that :meth:`take` takes at most, and keeps, on the rank that takes most."""

    def start(
        self, outgoing: Tensor, counts_out: Sequence[int], counts_in: Sequence[int]
    ) -> Waiting:
        """Starts to send a part of a tensor to each rank, and to receive one from each.

        Args:
            outgoing: ``[sum(counts_out)]``, parts in the order of the ranks.
            counts_out: ``[W]`` entries for each rank; none for this one.
            counts_in: ``[W]`` entries from each rank.
        """


def index_bytes(rows: int) -> int:
    """What ranks need to know which of them has which of so many rows."""
    return 64 * rows


def cuts_of(width: int, size: int, unit: int = 1) -> list[slice]:
    """Consecutive columns for each rank, about equally many, in whole units; maybe none for some.

    Those of units of one column are the rows that ranks have of a matrix, so that none is moved.
    """
    parts = torch.arange(width // unit).tensor_split(size)
    ends = [0, *accumulate(part.numel() * unit for part in parts)]
    return [slice(first, last) for first, last in pairwise(ends)]


def add_up(peers: Peers, own: Tensor) -> Tensor:
    """The sum of every rank's tensor, in the order of the ranks: the same bits on all of them."""
    others = [rank != peers.rank for rank in range(peers.size)]
    counts = [own.numel() * other for other in others]
    received = peers.start(own.reshape(-1).repeat(peers.size - 1), counts, counts).wait()
    parts = list(torch.split(received.to(own.device), counts))
    parts[peers.rank] = own.reshape(-1)
    total = torch.zeros_like(parts[0])
    for part in parts:
        total += part
    return total.view(own.shape)


class SpreadConv(Blockwise):
    """A stage of a convolution whose weights are taken when it runs, and let go of again.

    Each rank computes some columns from all of the input. As soon as a block of rows is complete
    on a rank, its columns of them are sent to all others, and theirs received; complete rows are
    then finished, the same ones by every rank. With ``s`` bytes to a number, rank ``r`` sends
    ``(W - 1) s N D_r`` bytes and receives ``s N (D - D_r)``, ``D_r`` of the ``D`` columns its own.

    Args:
        peers: The ranks.
        stage: What is computed.
        names: Of its tensors, by id.
        cuts: Columns of each rank; None where every rank computes all, with tensors ``stage.cut``
            as a whole.
        graph: The edges.
        like: A tensor of the dtype, device and width of the input.
    """

    def __init__(
        self,
        peers: Peers,
        stage: ConvStage,
        names: Mapping[int, str],
        cuts: Sequence[slice] | None,
        graph: Adjacency,
        like: Tensor,
    ) -> None:
        self.peers, self.stage, self.cuts = peers, stage, cuts
        self.names = {names[id(tensor)]: tensor for tensor in stage.cut}
        self._graph, self._like = graph, like
        self.own = slice(0, stage.width) if cuts is None else cuts[peers.rank]
        widths = {_width(each): each for each in cuts or [self.own] if cuts is None or _width(each)}
        with LiveBytes() as live:
            trials = [self._trial(columns) for columns in widths.values()]
        peak, kept = peers.taking(list(self.names), cuts)
        peak = max(peak, kept + live.peak)  # forms that try what they take do so again in a run
        self._conv, self.after = trials[0], stage.after
        if cuts is None:  # steps may have weights, which are there when it runs
            self.after = tuple(partial(self._step, index) for index in range(len(self._conv.after)))
        self.rows, flight = 0, 0
        if cuts is not None:
            row = self._flight_bytes(cuts)
            self.rows = min(max(EXCHANGE_BYTES // (2 * row), 1), graph.num_nodes)
            flight = 2 * self.rows * row
        self.held = kept + flight
        self._smallest: int = max(peak, self.held + max(trial.smallest for trial in trials))
        self._enough: int = max(peak, self.held + max(trial.enough for trial in trials))
        self._most: int = max(peak, self.held + max(trial.most for trial in trials))
        self._width = trials[0].out_width if cuts is None else stage.width

    def _flight_bytes(self, cuts: Sequence[slice]) -> int:
        """A row that is sent to the others, and theirs; on the rank that takes most."""
        widths = [_width(each) for each in cuts]
        sent, received = (self.peers.size - 1) * max(widths), self.stage.width - min(widths)
        return (sent + received) * self._like.element_size()

    def _trial(self, columns: slice) -> Blockwise:
        """The form of some columns, with weights that take no memory: for its sizes."""
        values = {}
        for name, tensor in self.names.items():
            shape = tensor.shape if self.cuts is None else (_width(columns), *tensor.shape[1:])
            values[name] = self._like.new_zeros(()).to(tensor.dtype).expand(shape)
        return self._form(values, columns)

    def _form(self, values: Mapping[str, Tensor], columns: slice) -> Blockwise:
        memo = {id(own): _in_place_of(own, values[name]) for name, own in self.names.items()}
        module = _with_tensors(self.stage.module, memo)
        place = Place(columns=columns, ranks=self.peers.size, add_up=partial(add_up, self.peers))
        return self.stage.make(module, place, self._graph, self._like)

    def _step(self, index: int, rows: Tensor) -> Tensor:
        return self._conv.after[index](rows)

    @property
    def out_width(self) -> int:
        """See :attr:`Blockwise.out_width`."""
        return self._width

    @property
    def smallest(self) -> int:
        """See :attr:`Blockwise.smallest`."""
        return self._smallest

    @property
    def enough(self) -> int:
        """See :attr:`Blockwise.enough`."""
        return self._enough

    @property
    def most(self) -> int:
        """See :attr:`Blockwise.most`."""
        return self._most

    def run(self, source: Hidden, out: Hidden, work: int, finish: Finish) -> None:
        """See :meth:`Blockwise.run`; all ranks take part, and have the same ``work``."""
        trial = self._conv
        self._conv = self._form(self.peers.take(list(self.names), self.cuts), self.own)
        try:
            self._run(source, out, work - self.held, finish)
        finally:
            self._conv = trial

    def _run(self, source: Hidden, out: Hidden, work: int, finish: Finish) -> None:
        conv = self._conv
        if self.cuts is None:
            conv.run(source, out, work, finish)
            return
        exchange = _Exchange(self.peers, self.cuts, out, self.rows, partial(_within, finish, work))
        if _width(self.own):
            conv.run(source, out.columns(self.own), work, exchange.ready)
        exchange.end()


class _Exchange:
    """The columns of a layer on their way, some rows at a time: the same on all ranks."""

    def __init__(
        self, peers: Peers, cuts: Sequence[slice], out: Hidden, rows: int, finish: _FinishRows
    ) -> None:
        self._peers, self._cuts, self._out, self._finish = peers, cuts, out, finish
        self._blocks = deque(blocks(len(out.rows), rows, out.most_rows))
        self._waiting: deque[tuple[slice, Waiting]] = deque()

    def ready(self, rows: slice, left: int = 0) -> None:
        """All rows up to the end of a slice have this rank's columns."""
        while self._blocks and self._blocks[0].stop <= rows.stop:
            self._start(self._blocks.popleft())
            if len(self._waiting) > 1:
                self._arrive()

    def end(self) -> None:
        """All rows have."""
        self.ready(slice(0, len(self._out.rows)))
        while self._waiting:
            self._arrive()

    def _start(self, rows: slice) -> None:
        peers, count = self._peers, rows.stop - rows.start
        own = self._out.rows[rows, self._cuts[peers.rank]]
        others = [rank != peers.rank for rank in range(peers.size)]
        counts_in = [
            count * _width(cut) * other for cut, other in zip(self._cuts, others, strict=True)
        ]
        counts_out = [own.numel() * other for other in others]
        outgoing = own.repeat(peers.size - 1, 1).view(-1)
        self._waiting.append((rows, peers.start(outgoing, counts_out, counts_in)))
        self._out.touched(count)

    def _arrive(self) -> None:
        rows, pending = self._waiting.popleft()
        received, at, count = pending.wait(), 0, rows.stop - rows.start
        for rank, cut in enumerate(self._cuts):
            if rank != self._peers.rank and _width(cut):
                size = count * _width(cut)
                self._out.rows[rows, cut] = received[at : at + size].view(count, -1)
                at += size
        self._out.touched(count)
        del pending, received
        self._finish(rows)


class _FinishRows(Protocol):
    def __call__(self, rows: slice) -> None: ...


def _within(finish: Finish, work: int, rows: slice) -> None:
    """Every rank finishes within the same memory: chunks of other sizes give other bits."""
    finish(rows, work)


class SpreadLayerwise(Layerwise):
    """:class:`Layerwise` of a model that is spread over ranks; none ever has a whole matrix.

    Rank ``r`` has ``D_r`` rows of a weight ``[D, d]`` and computes as many columns of the layer, in
    a ``W``-th of the time; ranks exchange columns (:class:`SpreadConv`), and every rank has both
    hidden layers ``[N, d]`` and ``[N, D]``, in memory or in a file of its own. Norms, activations,
    the last layer and the linear layer of jumping knowledge are small, and computed by every rank.
    So are, with all of their weights, convolutions whose columns cannot be computed apart
    (:mod:`gist.graph.stages`), and those with fewer columns than ranks. A GATv2 is cut by heads:
    with fewer of them than ranks, some ranks have no columns.

    Beside what :class:`Layerwise` takes, a layer has a copy of those of its own rows that lie
    elsewhere, such as the first layer's, and columns on their way: ``4 s b D`` for blocks of ``b``
    nodes (:data:`EXCHANGE_BYTES`).

    Scores are the same bits on all ranks, if these are machines of one type; on another number of
    ranks they are the same to rounding.

    Args:
        model: Its layers and sizes; values come from ``peers``: it may be on the ``meta`` device.
        x: ``[N, F]`` features, on the device to compute on.
        graph: The edges.
        peers: The ranks that have the model.

    Raises:
        ConfigError: the model has no layer-wise form.
    """

    def __init__(self, model: Any, x: Tensor, graph: Adjacency, peers: Peers) -> None:
        require_layerwise(model)
        self.peers = peers
        tensors = model_tensors(model)
        self._names = {id(tensor): name for name, tensor in tensors.items()}
        later = {
            id(tensor)
            for index in range(model.num_layers)
            for stage, _ in self._stages(model, index)
            for tensor in stage.cut
        }
        now = [name for name, tensor in tensors.items() if id(tensor) not in later]
        values = peers.take(now, None)
        memo = {
            id(own): _in_place_of(own, values[name]) if name in values else own
            for name, own in tensors.items()
        }
        with without_caches(model):
            small = _with_tensors(model, memo).eval()
        self.beside = Layerwise.beside + peers.taking(now, None)[0]
        super().__init__(small, x, graph)

    def _stages(self, model: Any, index: int) -> list[tuple[ConvStage, list[slice] | None]]:
        """How a convolution is computed; with the columns of each rank, unless all compute all."""
        conv, size = model.convs[index], self.peers.size
        last = index == model.num_layers - 1 and model.jk_mode is None
        stages = None if last or size == 1 else find_stages(conv)
        if stages is not None and all(stage.unit > 1 or stage.width >= size for stage in stages):
            return [(stage, cuts_of(stage.width, size, stage.unit)) for stage in stages]
        everything = tuple(model_tensors(conv).values())
        return [(ConvStage(module=conv, cut=everything, width=0, make=as_registered), None)]

    def _layers_of(self, index: int, graph: Adjacency, like: Tensor) -> list[Layer]:
        layers: list[Layer] = []
        stages = self._stages(self.model, index)
        for place, (stage, cuts) in enumerate(stages):
            if layers:
                like = like.new_empty(0, layers[-1].width)
            conv = SpreadConv(self.peers, stage, self._names, cuts, graph, like)
            if place < len(stages) - 1:
                layers.append(Layer(conv, [], None, [], like))
            else:
                layers.append(Layer(conv, *self._following(index), like, jump=index))
        return layers

    @property
    def smallest(self) -> int:
        """See :attr:`Layerwise.smallest`: of layers in files, a block on its way is resident."""
        least = super().smallest
        if self.x.device.type != "cpu" or self.peers.size == 1:
            return least
        block = max(
            layer.conv.rows * self.x.element_size() * layer.width
            for layer in self.layers
            if isinstance(layer.conv, SpreadConv)
        )
        return least + min(_RESIDENT_BLOCKS * block, self.hidden_bytes)

    @property
    def sent_bytes(self) -> int:
        """Bytes of columns that this rank sends in a run."""
        convs = [layer.conv for layer in self.layers]
        own = [_width(c.own) for c in convs if isinstance(c, SpreadConv) and c.cuts is not None]
        return (self.peers.size - 1) * self._bytes(sum(own))


class Rehearsed:
    """A rank of a run of which there are only sizes: what a run takes, found without others.

    Args:
        model: Whose tensors it has as zeros that take no memory.
        rank: Of which the numbers are asked.
        size: ``W``.
        at_home: Tensors of which each rank has consecutive rows, as many as the others, in any
            round: those between hidden layers.
    """

    def __init__(
        self, model: nn.Module, rank: int, size: int, at_home: Container[str] = ()
    ) -> None:
        self.rank, self.size, self._at_home = rank, size, at_home
        self._tensors = model_tensors(model)

    def take(self, names: Sequence[str], cuts: Sequence[slice] | None) -> dict[str, Tensor]:
        """See :meth:`Peers.take`."""
        return {
            name: self._zero(self._tensors[name]).expand(self._shape(name, cuts, self.rank))
            for name in names
        }

    def _has(self, name: str, cuts: Sequence[slice]) -> bool:
        """Whether each rank has just its rows."""
        rows = torch.arange(self._tensors[name].size(0)).tensor_split(self.size)
        return name in self._at_home and all(
            _width(cut) == part.numel() for cut, part in zip(cuts, rows, strict=True)
        )

    def _zero(self, like: Tensor) -> Tensor:
        return torch.zeros((), dtype=like.dtype) if like.is_meta else like.new_zeros(())

    def taking(self, names: Sequence[str], cuts: Sequence[slice] | None) -> tuple[int, int]:
        """See :meth:`Peers.taking`: as if all that is not at home were received from others."""
        if cuts is not None:
            names = [name for name in names if not self._has(name, cuts)]
        kept = max(
            sum(self._bytes(name, self._shape(name, cuts, rank)) for name in names)
            for rank in range(self.size)
        )
        rows = sum(max(self._tensors[name].shape, default=1) for name in names)
        return 4 * kept + self.size * index_bytes(rows), kept

    def _shape(self, name: str, cuts: Sequence[slice] | None, rank: int) -> tuple[int, ...]:
        shape = tuple(self._tensors[name].shape)
        return shape if cuts is None else (_width(cuts[rank]), *shape[1:])

    def _bytes(self, name: str, shape: tuple[int, ...]) -> int:
        return int(torch.Size(shape).numel()) * self._tensors[name].element_size()

    def start(
        self, outgoing: Tensor, counts_out: Sequence[int], counts_in: Sequence[int]
    ) -> Waiting:
        """Nothing runs."""
        raise AssertionError("only sizes are asked for")


def _width(columns: slice) -> int:
    return int(columns.stop - columns.start)


def _in_place_of(own: Tensor, value: Tensor) -> Tensor:
    """A value as the kind of tensor that it takes the place of in a module."""
    return nn.Parameter(value, requires_grad=False) if isinstance(own, nn.Parameter) else value


def _with_tensors(module: nn.Module, memo: dict[int, Tensor]) -> nn.Module:
    """A copy of a module with these tensors in place of those with these ids, others shared."""
    shared = {id(tensor): tensor for tensor in model_tensors(module).values()}
    return copy.deepcopy(module, {**shared, **memo})
