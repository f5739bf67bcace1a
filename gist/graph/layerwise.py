"""Exact scores of all nodes, layer by layer, in blocks under a limit of memory.

Shape legend: ``N`` nodes, ``E`` edges, ``d`` width of a hidden layer, ``C`` classes.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.nn.models.basic_gnn import BasicGNN

from gist.errors import ConfigError
from gist.graph.adjacency import Adjacency
from gist.graph.blockwise import ROWS, Blockwise, blocks, matmul_t
from gist.graph.blockwise_rules import find_blockwise
from gist.graph.edges import uses_edge_weight
from gist.graph.hidden import Hidden
from gist.graph.rowwise import CHUNK_BYTES, GraphNorm, RowFunction, Step, as_graph_norm, is_row_wise

_SMALL_BYTES = 4096
"""For tensors of a few numbers, which are not counted one by one."""

_COMPOSITIONS: set[Any] = {BasicGNN.forward}
"""Forward functions that are known to be those of ``BasicGNN``."""


def register_composition(model_type: type[nn.Module]) -> type[nn.Module]:
    """Declares that the forward pass of a ``BasicGNN`` subclass composes layers as its parent does.

    Models with a forward function of their own have no layer-wise form without it. May be used as a
    decorator.
    """
    _COMPOSITIONS.add(model_type.forward)
    return model_type


def layerwise_obstacle(model: nn.Module) -> str | None:
    """What keeps a model from being evaluated layer by layer; None if nothing does."""
    name = type(model).__name__
    if not isinstance(model, BasicGNN):
        return f"{name} is none of PyG's BasicGNN models (GCN, GraphSAGE, GIN, GAT)"
    if type(model).forward not in _COMPOSITIONS or "forward" in vars(model):
        return f"{name} has a forward pass of its own"
    for path, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{path or name} has forward hooks"
    for path, conv in model.convs.named_children():
        if find_blockwise(conv) is None:
            return f"convs.{path}, a {type(conv).__name__}, has no form that works on blocks"
    for path, norm in model.norms.named_children():
        if not is_row_wise(norm) and as_graph_norm(norm) is None:
            return f"norms.{path}, a {type(norm).__name__}, is not known to treat nodes apart"
    if model.jk_mode == "lstm":
        return "jumping knowledge 'lstm' needs all hidden layers at once"
    if not is_row_wise(model.act):
        return f"act, a {type(model.act).__name__}, is not known to treat nodes apart"
    return None


def require_layerwise(model: nn.Module) -> None:
    """Refuses a model that has no layer-wise form.

    Raises:
        ConfigError: what keeps it from having one.
    """
    if obstacle := layerwise_obstacle(model):
        raise ConfigError(
            "the model cannot be evaluated layer by layer",
            got=obstacle,
            expected="a GCN, GraphSAGE, GIN or GAT of PyG or gist.nn",
            remedy="use evaluation='full' or evaluation='clusters'",
        )


class Layer:
    """A convolution, and what follows it up to the next one.

    Args:
        conv: The convolution.
        steps: What follows it and treats each node on its own, up to ``norm``.
        norm: A norm over all nodes, or None.
        then: What follows ``norm`` and treats each node on its own.
        like: A tensor of the dtype and device of the features.
        jump: Which of the model's hidden layers it completes; None for a part of one.
    """

    def __init__(
        self,
        conv: Blockwise,
        steps: list[Step],
        norm: GraphNorm | None,
        then: list[Step],
        like: Tensor,
        jump: int | None = None,
    ) -> None:
        self.conv, self.norm, self.then, self.jump = conv, norm, then, jump
        self.width = conv.out_width
        self.finish = RowFunction([*conv.after, *steps], self.width, like)
        self.smallest = max(conv.smallest, conv.held + self.finish.smallest)
        self.second: RowFunction | None = None
        if norm is not None:
            moments = norm.moments()
            moments.add(like.new_zeros(2, self.width))
            self.second = RowFunction([norm.step(moments, like.dtype), *then], self.width, like)
            self.smallest = max(self.smallest, self.second.smallest)
        self.enough = max(self.smallest, conv.enough)
        chunks = max(step.fixed for step in (self.finish, self.second or self.finish)) + CHUNK_BYTES
        self.most = max(self.smallest, conv.most, conv.held + chunks)

    def run(self, source: Hidden, out: Hidden, work: int) -> None:
        """Fills ``out`` [N, D] from ``source`` [N, d] within ``work`` bytes beside the two."""
        moments = None if self.norm is None else self.norm.moments()
        seen = None if moments is None else moments.add

        def finish(rows: slice, left: int) -> None:
            self.finish.in_place(out.rows[rows], left, seen)
            out.touched(rows.stop - rows.start)

        self.conv.run(source, out, work, finish)
        if self.norm is not None and moments is not None and self.second is not None:
            second = self.second.replaced([self.norm.step(moments, out.rows.dtype), *self.then])
            for rows in blocks(len(out.rows), 2 * ROWS, out.most_rows):
                second.in_place(out.rows[rows], work, None)
                out.touched(rows.stop - rows.start)


@dataclass(frozen=True, kw_only=True)
class _Room:
    """Where a layer puts what it computes.

    Attributes:
        width: Of the hidden layer that it computes; None for the scores.
        allowance: Bytes of it that may be resident where it is in a file; None in memory.
        left: Bytes of memory that are left for blocks.
    """

    width: int | None
    allowance: int | None
    left: int


class Layerwise:
    """A ``BasicGNN`` model in evaluation mode, layer by layer over a whole graph.

    A layer turns the features ``H`` [N, d] of all nodes into those of the next one, block by block
    (:mod:`gist.graph.blockwise`); what follows the convolution is applied to finished blocks. Two
    hidden layers exist at a time, each in memory where the limit has room for it beside the blocks,
    else in a file mapped into memory (:class:`~gist.graph.hidden.Hidden`).

    Let ``s`` be the bytes of a number. Beside model, features, and the graph with its normalised
    matrices, a layer ``d -> D`` takes

    - ``s N C`` for the scores, and ``s N (d + D)`` for hidden layers in memory; of those in files
      as much is resident as the limit leaves;
    - ``s b d`` for a block of ``b`` nodes where it aggregates first (``d <= D``);
    - ``s N k`` for ``k`` of its columns where it multiplies first (``d > D``; attention);
    - jumping knowledge ``"max"`` keeps one hidden layer more.

    The work is that of a plain forward pass: ``2 N d D`` operations for each weight, and ``E``
    times the narrower of ``d`` and ``D`` for the graph. A weight is read once for each block of
    nodes, and that is as long as the limit allows up to ``D`` nodes, from where on the weight costs
    no more to read than the activations.

    Args:
        model: In evaluation mode; its weights are read when it runs.
        x: ``[N, F]`` features, on the model's device.
        graph: The edges.

    Raises:
        ConfigError: the model has no layer-wise form.
    """

    beside = _SMALL_BYTES
    """Bytes that are taken whatever the layer."""

    def __init__(self, model: Any, x: Tensor, graph: Adjacency) -> None:
        require_layerwise(model)
        self.model, self.x = model, x.contiguous()
        if not uses_edge_weight(model):
            graph = graph.unweighted
        self.layers: list[Layer] = []
        for index in range(model.num_layers):
            width = self.layers[-1].width if index else x.size(1)
            self.layers += self._layers_of(index, graph, x.new_empty(0, width))
        self.num_classes: int = (
            self.layers[-1].width if model.jk_mode is None else model.lin.out_features
        )

    def _layers_of(self, index: int, graph: Adjacency, like: Tensor) -> list[Layer]:
        """What one convolution and what follows it are computed as."""
        maker = find_blockwise(self.model.convs[index])
        assert maker is not None, "layerwise_obstacle has looked"
        return [Layer(maker(graph, like), *self._following(index), like, jump=index)]

    def _following(self, index: int) -> tuple[list[Step], GraphNorm | None, list[Step]]:
        """What follows a convolution: steps, a norm over all nodes, and steps after that."""
        model = self.model
        if index == model.num_layers - 1 and model.jk_mode is None:
            return [], None, []
        norm = model.norms[index]
        act = [] if model.act is None else [model.act]
        first, last = (act, []) if model.act_first else ([], act)
        if not is_row_wise(norm):
            return first, as_graph_norm(norm), last
        middle = [] if isinstance(norm, nn.Identity) else [norm]
        return [*first, *middle, *last], None, []

    def _bytes(self, width: int) -> int:
        return self.x.size(0) * width * self.x.element_size()

    @property
    def hidden_bytes(self) -> int:
        """Bytes of the hidden layers that exist at the same time."""
        hidden = [self._bytes(layer.width) for layer in self.layers]
        if self.model.jk_mode is None:
            hidden.pop()
        return self._most_at_once(hidden)

    def _most_at_once(self, sizes: list[int]) -> int:
        """Of hidden layers of these sizes, what those that exist at the same time have."""
        pairs = [sum(sizes[max(i - 1, 0) : i + 1]) for i in range(len(sizes))]
        if (kept := self._kept) is not None:
            pairs = [pair + (sizes[kept] if i > kept + 1 else 0) for i, pair in enumerate(pairs)]
        return max(pairs, default=0)

    @property
    def _kept(self) -> int | None:
        """The layer whose output is kept for jumping knowledge, if one is."""
        if self.model.jk_mode != "max":
            return None
        return next(place for place, layer in enumerate(self.layers) if layer.jump is not None)

    @property
    def kept_bytes(self) -> int:
        """Bytes of the scores and of the hidden layers that exist at the same time."""
        return self._bytes(self.num_classes) + self.hidden_bytes

    @property
    def smallest(self) -> int:
        """The least memory in bytes that it can run in, the scores included."""
        blocks = max(layer.smallest for layer in self.layers) + self.beside
        hidden = 0 if self.x.device.type == "cpu" else self.hidden_bytes
        return self._bytes(self.num_classes) + hidden + blocks

    @property
    def enough(self) -> int:
        """The memory in bytes with which nothing is kept in files, at about full speed."""
        blocks = max(layer.enough for layer in self.layers)
        return self.kept_bytes + blocks + self.beside

    @property
    def most(self) -> int:
        """The memory in bytes that it takes where it may take any number."""
        blocks = max(layer.most for layer in self.layers)
        return self.kept_bytes + blocks + self.beside

    @torch.no_grad()
    def run(self, memory_limit: int) -> Tensor:
        """Scores of every node.

        Args:
            memory_limit: Bytes that may be taken beside model, features and graph.

        Returns:
            ``[N, C]``, in memory.

        Raises:
            ConfigError: the limit has no room for the smallest block, or a disk none for a hidden
                layer.
        """
        self.check(memory_limit)
        scores = Hidden(self.x.new_empty(self.x.size(0), self.num_classes))
        jumping = self.model.jk_mode
        source = Hidden(self.x)
        most: Hidden | None = None
        for layer, room in zip(self.layers, self._rooms(memory_limit), strict=True):
            if room.width is None:
                layer.run(source, scores, room.left)
                return scores.rows
            out = self._hidden(room)
            layer.run(source, out, room.left)
            source = out
            if layer.jump is None:
                continue
            if jumping == "cat":
                self._add_jump(layer.jump, out, scores.rows)
            elif jumping == "max":
                most = out if most is None else _maximum(most, out)
        if jumping != "cat":
            self._add_jump(0, most or source, scores.rows)
        return scores.rows

    def check(self, memory_limit: int) -> None:
        """Refuses a limit that has no room for the smallest block, and a disk without any.

        Raises:
            ConfigError: see above, with the numbers.
        """
        if memory_limit < self.smallest:
            scores = self._bytes(self.num_classes)
            raise ConfigError(
                "memory_limit is too small to evaluate the model, even layer by layer",
                got=f"{memory_limit:,} bytes beside the model and the data",
                expected=f"at least {self.smallest:,} ({scores:,} of them for the scores), "
                f"better {self.enough:,}",
                remedy="raise memory_limit, or use evaluation='clusters'",
            )
        size, folder = self.file_bytes(memory_limit), tempfile.gettempdir()
        free = shutil.disk_usage(folder).free
        if size > free:
            raise ConfigError(
                "no room on disk for hidden layers that do not fit into memory_limit",
                got=f"{free:,} bytes free in {folder}",
                expected=f"{size:,}, to go layer by layer in {memory_limit:,} bytes of memory",
                remedy="set TMPDIR to a folder with more room, raise memory_limit, or use "
                "evaluation='clusters'",
            )

    def file_bytes(self, memory_limit: int) -> int:
        """Bytes of the files that exist at the same time, in a run within that limit."""
        rooms = self._rooms(memory_limit)
        files = [
            self._bytes(room.width) if room.width and room.allowance is not None else 0
            for room in rooms
        ]
        return self._most_at_once(files)

    def _rooms(self, memory_limit: int) -> list[_Room]:
        """Where each layer puts what it computes, and the memory that is left for its blocks."""
        left = memory_limit - self._bytes(self.num_classes) - self.beside
        rooms: list[_Room] = []
        taken: list[int] = []
        for index, layer in enumerate(self.layers):
            if index > 1 and index - 2 != self._kept:
                left += taken[index - 2]  # the input of the layer before
            if index == len(self.layers) - 1 and self.model.jk_mode is None:
                rooms.append(_Room(width=None, allowance=None, left=left))
                break
            size, allowance = self._bytes(layer.width), None
            reserve = max(each.enough for each in self.layers[index:])
            if self.x.device.type == "cpu" and size + reserve > left:
                spare = left - max(each.smallest for each in self.layers[index:])
                size = allowance = spare // 4
            taken.append(size)
            left -= size
            rooms.append(_Room(width=layer.width, allowance=allowance, left=left))
        return rooms

    def _hidden(self, room: _Room) -> Hidden:
        """Room for what a layer puts out."""
        assert room.width is not None
        shape = self.x.size(0), room.width
        if room.allowance is None:
            return Hidden(self.x.new_empty(shape))
        return Hidden.in_file(shape, self.x.dtype, allowance=room.allowance)

    def _add_jump(self, index: int, hidden: Hidden, scores: Tensor) -> None:
        """One layer's share of the last linear layer, whose inputs are layers side by side."""
        linear, width = self.model.lin, hidden.rows.size(1)
        weight = linear.weight[:, index * width : (index + 1) * width]
        for rows in blocks(len(scores), 2 * ROWS, hidden.most_rows):
            if index == 0:
                matmul_t(hidden.rows[rows], weight, scores[rows])
                if linear.bias is not None:
                    scores[rows] += linear.bias
            else:
                scores[rows].addmm_(hidden.rows[rows], weight.t())
            hidden.touched(rows.stop - rows.start)


def _maximum(most: Hidden, other: Hidden) -> Hidden:
    """The entrywise maximum, in place of the first."""
    for rows in blocks(len(most.rows), 2 * ROWS, most.most_rows, other.most_rows):
        torch.maximum(most.rows[rows], other.rows[rows], out=most.rows[rows])
        most.touched(rows.stop - rows.start)
        other.touched(rows.stop - rows.start)
    return most
