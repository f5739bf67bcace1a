"""What comes back of tasks, put into the global tensors by one of several rules.

:class:`~gist.partition.transfer.Merge` puts back the subnets of one round, all of them. Here parts
come from wherever and whenever: some of those that were sent, of different assignments and ages,
perhaps with some of their tensors alone. An entry that no part holds keeps its bits under every
rule. Memory is taken for the smallest block of one tensor at a time that has all held entries.

Statistics of BatchNorm, counters and other tensors that are not trained are part of it all; whole
numbers are rounded as :class:`~gist.partition.transfer.RunningMean` does.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from gist.errors import ConfigError, PartitionError
from gist.partition.parts import Part, misfits, output_layer
from gist.partition.spec import PartitionSpec, raise_findings
from gist.partition.transfer import Index, RunningMean, Selection, gather, scatter_

ServerOptimizer = Literal["sgd", "momentum", "adagrad", "yogi", "adam"]


@dataclass(frozen=True, slots=True)
class Piece:
    """A part's entries of one tensor.

    Attributes:
        index: Where they sit.
        entries: As they were trained.
        start: As they were sent, where the part says so.
        part: The part.
    """

    index: Index
    entries: Tensor
    start: Tensor | None
    part: Part


@dataclass(frozen=True, slots=True)
class Held:
    """What parts hold of one tensor.

    Attributes:
        name: Its full name.
        pieces: Of each part that holds any of it, in their order.
        cohort: Number of all parts.
    """

    name: str
    pieces: Sequence[Piece]
    cohort: int


class MergeRule(ABC):
    """How parts become entries of the global tensors; subclasses merge one tensor."""

    needs_start: ClassVar[bool] = False
    """Whether parts must say what they were before they were trained."""

    @torch.no_grad()
    def merge(
        self,
        tensors: Mapping[str, Tensor],
        spec: PartitionSpec,
        parts: Sequence[Part],
        state: dict[str, Tensor],
    ) -> None:
        """Merges parts; all are looked at before anything is changed.

        Args:
            tensors: The global parameters and buffers by full name, as
                :func:`~gist.partition.spec.model_tensors` gives them; changed in place.
            spec: How they follow the units.
            parts: In the order in which they came.
            state: The rule's own memory, kept from merge to merge and in checkpoints; starts empty.

        Raises:
            PartitionError: once, with everything of the parts that does not fit; see also
                :func:`~gist.partition.parts.check_part`, which looks at values, too.
        """
        for name, pieces in self._pieces(tensors, spec, parts).items():
            held = Held(name=name, pieces=pieces, cohort=len(parts))
            self.merge_tensor(tensors[name], held, state)

    @abstractmethod
    def merge_tensor(self, tensor: Tensor, held: Held, state: dict[str, Tensor]) -> None:
        """Merges what parts hold of one tensor, in place.

        Args:
            tensor: The global tensor.
            held: What parts hold of it: at least one does.
            state: See :meth:`merge`.
        """

    def _pieces(
        self, tensors: Mapping[str, Tensor], spec: PartitionSpec, parts: Sequence[Part]
    ) -> dict[str, list[Piece]]:
        found: list[str] = []
        pieces: dict[str, list[Piece]] = {}
        for number, part in enumerate(parts):
            selection = Selection(spec, part.assignment, 0)
            wrong = misfits(part, selection, tensors, needs_start=self.needs_start)
            found += [f"part {number}: {finding}" for finding in wrong]
            if wrong:
                continue
            counted = _counted_rows(part, spec)
            for name, entries in part.tensors.items():
                piece = Piece(
                    index=selection.index(spec.layouts[name]),
                    entries=entries.detach(),
                    start=None if part.start is None else part.start[name].detach(),
                    part=part,
                )
                rows = counted.get(name)
                pieces.setdefault(name, []).append(piece if rows is None else _of(piece, rows))
        raise_findings("parts do not fit what they are to be merged into", found)
        return pieces


@dataclass(frozen=True, kw_only=True)
class CountMean(MergeRule):
    """An entry becomes the mean over the parts that hold it (HeteroFL, FedRolex).

    Where the parts are all subnets of one assignment this is
    :func:`~gist.partition.transfer.merge`, bit for bit. Other orders of the parts give the same up
    to rounding; equal copies average to themselves bit for bit.

    Diao et al., "HeteroFL", ICLR 2021; Alam et al., "FedRolex", NeurIPS 2022.
    """

    def merge_tensor(self, tensor: Tensor, held: Held, state: dict[str, Tensor]) -> None:
        """See :meth:`MergeRule.merge_tensor`."""
        _average(tensor, held.pieces)


@dataclass(frozen=True, kw_only=True)
class DataMean(MergeRule):
    """As :class:`CountMean`, with a weighted mean: ``Σ n_i w_i / Σ n_i``.

    McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
    AISTATS 2017, algorithm 1, taken entry by entry over the holders; by volume it is the rule of
    Helios (Xu et al., 2021).

    Attributes:
        by: ``n_i``: a part's ``"weight"``, which is its samples; or its ``"volume"``, how many
            entries it has.

    Raises:
        ConfigError: another ``by``.
    """

    by: Literal["weight", "volume"] = "weight"

    def __post_init__(self) -> None:
        if self.by not in ("weight", "volume"):
            raise ConfigError("by is 'weight' or 'volume'", got=repr(self.by))

    def merge_tensor(self, tensor: Tensor, held: Held, state: dict[str, Tensor]) -> None:
        """See :meth:`MergeRule.merge_tensor`."""
        _average(tensor, held.pieces, [getattr(piece.part, self.by) for piece in held.pieces])


@dataclass(frozen=True, kw_only=True)
class CohortDelta(MergeRule):
    """Parameters take a step along the mean change of the whole cohort: ``w + η Δ``.

    ``Δ = (1/N) Σ_i s(τ_i) (trained_i - sent_i)`` over all ``N`` parts; who does not hold an entry
    adds zero. ``s(τ) = (1 + τ)^-power`` weighs the stale ones less. With a power of 1/2 this is
    FedBuff (Nguyen et al., AISTATS 2022, algorithm 1); with a server optimiser it is FedOpt (Reddi
    et al., "Adaptive Federated Optimization", ICLR 2021, algorithm 2, whose bias is not corrected)
    and the server of FedSelect. Other orders of the parts give the same up to rounding.

    Deviations: entries that no part holds neither move nor change their moments, where a dense
    server optimiser would carry them on. What is no ``nn.Parameter`` (statistics of BatchNorm,
    counters) becomes the mean over its holders, as in :class:`CountMean`: a variance that changes
    are added to may fall below zero.

    Attributes:
        server_lr: η.
        staleness_power: See above; 0 weighs all alike.
        server_optimizer: ``"sgd"``: ``w + η Δ``. ``"momentum"``: ``m = β1 m + Δ``, ``w + η m``
            (FedAvgM, Hsu et al. 2019). The others ``m = β1 m + (1 - β1) Δ``,
            ``w + η m / (sqrt(v) + ε)``, with ``v`` from ε² on: ``"adagrad"``: ``v + Δ²``;
            ``"yogi"``: ``v - (1 - β2) Δ² sign(v - Δ²)``; ``"adam"``: ``β2 v + (1 - β2) Δ²``.
        betas: β1 and β2.
        epsilon: ε, the paper's τ.

    Raises:
        ConfigError: a value out of range.
    """

    server_lr: float = 1.0
    staleness_power: float = 0.0
    server_optimizer: ServerOptimizer = "sgd"
    betas: tuple[float, float] = (0.9, 0.99)
    epsilon: float = 1e-3

    needs_start: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _require_between("server_lr", self.server_lr, 0, math.inf)
        _require_power(self.staleness_power)
        _require_between("epsilon", self.epsilon, 0, math.inf)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError("betas must be two numbers in [0, 1)", got=self.betas)
        if self.server_optimizer not in get_args(ServerOptimizer):
            raise ConfigError(
                "unknown server_optimizer",
                got=repr(self.server_optimizer),
                expected=" or ".join(get_args(ServerOptimizer)),
            )

    def merge(
        self,
        tensors: Mapping[str, Tensor],
        spec: PartitionSpec,
        parts: Sequence[Part],
        state: dict[str, Tensor],
    ) -> None:
        """See :meth:`MergeRule.merge`; also refuses tensors none of which is a parameter."""
        floats = [tensor for tensor in tensors.values() if tensor.is_floating_point()]
        if floats and not any(isinstance(tensor, nn.Parameter) for tensor in floats):
            raise PartitionError(
                "CohortDelta steps parameters, and must be told which tensors these are",
                got="no nn.Parameter",
                remedy="give it what model_tensors(model) gives, as it is",
            )
        super().merge(tensors, spec, parts, state)

    def merge_tensor(self, tensor: Tensor, held: Held, state: dict[str, Tensor]) -> None:
        """See :meth:`MergeRule.merge_tensor`."""
        if not (isinstance(tensor, nn.Parameter) and tensor.is_floating_point()):
            _average(tensor, held.pieces)
            return
        block, _ = _block(held.pieces, tensor)
        before = gather(tensor, block).to(_wide(tensor.dtype))
        delta, any_holds = torch.zeros_like(before), torch.zeros_like(before, dtype=torch.bool)
        for piece in held.pieces:
            assert piece.start is not None, "parts were checked"
            change = piece.entries.to(before) - piece.start.to(before)
            share = _freshness(piece.part, self.staleness_power) / held.cohort
            index = _within(piece.index, block)
            scatter_(delta, index, gather(delta, index).add_(change, alpha=share))
            scatter_(any_holds, index, torch.ones_like(change, dtype=torch.bool))
        old = self._moments(tensor, held.name, state)
        new, step = self._step({key: gather(moment, block) for key, moment in old.items()}, delta)
        for key, moment in old.items():
            scatter_(moment, block, torch.where(any_holds, new[key], gather(moment, block)))
        moved = torch.where(any_holds & (step != 0), before + self.server_lr * step, before)
        scatter_(tensor, block, moved.to(tensor.dtype))

    def _moments(self, tensor: Tensor, name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The server optimiser's memory of one tensor, made when it is first asked for."""
        first = {"m": 0.0, "v": self.epsilon**2}
        keys = {"sgd": "", "momentum": "m"}.get(self.server_optimizer, "mv")
        for key in keys:
            if f"{key}/{name}" not in state:
                fresh = torch.full(tensor.shape, first[key], dtype=_wide(tensor.dtype))
                state[f"{key}/{name}"] = fresh.to(tensor.device)
        return {key: state[f"{key}/{name}"] for key in keys}

    def _step(
        self, moments: Mapping[str, Tensor], delta: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The moments anew, and the direction that they give."""
        (beta1, beta2), square = self.betas, delta * delta
        if self.server_optimizer == "sgd":
            return {}, delta
        if self.server_optimizer == "momentum":
            m = beta1 * moments["m"] + delta
            return {"m": m}, m
        m, v = beta1 * moments["m"] + (1 - beta1) * delta, moments["v"]
        if self.server_optimizer == "adagrad":
            v = v + square
        elif self.server_optimizer == "yogi":
            v = v - (1 - beta2) * square * torch.sign(v - square)
        else:
            v = beta2 * v + (1 - beta2) * square
        return {"m": m, "v": v}, m / (v.sqrt() + self.epsilon)


@dataclass(frozen=True, kw_only=True)
class Mix(MergeRule):
    """Held entries move towards each part in turn: ``w + a (part - w)``, ``a = α (1 + τ)^-power``.

    With a power of 0 this is AsyncDrop (Dun et al., AISTATS 2023, algorithm 3:
    ``W ⊙ M^c + ((1 - α) W + α W_i) ⊙ M``); with all units and another power it is FedAsync with its
    polynomial weight of the stale (Xie et al. 2019). The order of several parts matters: the last
    counts most. Entries that equal the part's stay bit for bit.

    Attributes:
        alpha: α in (0, 1]; with 1 the part takes the place of what was there.
        staleness_power: See above.

    Raises:
        ConfigError: a value out of range.
    """

    alpha: float = 0.5
    staleness_power: float = 0.0

    def __post_init__(self) -> None:
        _require_between("alpha", self.alpha, 0, 1)
        _require_power(self.staleness_power)

    def merge_tensor(self, tensor: Tensor, held: Held, state: dict[str, Tensor]) -> None:
        """See :meth:`MergeRule.merge_tensor`."""
        for piece in held.pieces:
            share = self.alpha * _freshness(piece.part, self.staleness_power)
            _put(tensor, piece, share)


def _counted_rows(part: Part, spec: PartitionSpec) -> dict[str, Tensor]:
    """Rows that alone count of the tensors of which not all do."""
    if part.classes is None:
        return {}
    return dict.fromkeys(output_layer(spec), part.classes.cpu())


def _of(piece: Piece, rows: Tensor) -> Piece:
    """Some rows of a piece whose rows are whole."""
    on = rows.to(piece.entries.device)
    return replace(
        piece,
        index=(rows, *piece.index[1:]),
        entries=piece.entries.index_select(0, on),
        start=None if piece.start is None else piece.start.index_select(0, on),
    )


def _block(pieces: Sequence[Piece], tensor: Tensor) -> tuple[Index, bool]:
    """The smallest block of a tensor that has all pieces; whether no two of them overlap."""
    block: list[Tensor | None] = []
    disjoint = len(pieces) == 1
    for dim, size in enumerate(tensor.shape):
        kept = [i for piece in pieces if (i := piece.index[dim]) is not None]
        if len(kept) < len(pieces):
            block.append(None)
            continue
        union = kept[0] if len(kept) == 1 else torch.unique(torch.cat(kept))
        disjoint = disjoint or union.numel() == sum(i.numel() for i in kept)
        block.append(None if union.numel() == size else union)
    return tuple(block), disjoint


def _within(index: Index, block: Index) -> Index:
    """An index of a tensor as one of a block of it."""
    return tuple(
        i
        if outer is None or i is None
        else (None if i.numel() == outer.numel() else torch.searchsorted(outer, i))
        for i, outer in zip(index, block, strict=True)
    )


def _average(
    tensor: Tensor, pieces: Sequence[Piece], weights: Sequence[float] | None = None
) -> None:
    """The mean over the pieces that hold an entry, with or without weights."""
    block, disjoint = _block(pieces, tensor)
    if disjoint:
        for piece in pieces:
            _put(tensor, piece, 1.0)
        return
    before = _entries(tensor, block)
    indices = [_within(piece.index, block) for piece in pieces]
    entries = [piece.entries.to(tensor.device) for piece in pieces]
    mean: RunningMean | _WeightedMean
    if weights is None:
        mean = RunningMean(before)
        for index, own in zip(indices, entries, strict=True):
            mean.add(index, own)
    else:
        mean = _WeightedMean(before)
        for index, own, weight in zip(indices, entries, weights, strict=True):
            mean.add(index, own, weight)
    scatter_(tensor, block, mean.value.to(tensor.dtype))


class _WeightedMean:
    """A :class:`~gist.partition.transfer.RunningMean` with weights."""

    def __init__(self, tensor: Tensor) -> None:
        self.value = tensor.to(_wide(tensor.dtype), copy=True)
        self.weight = torch.zeros_like(tensor, dtype=torch.float64)

    def add(self, index: Index, entries: Tensor, weight: float) -> None:
        entries, so_far = entries.to(self.value.dtype), gather(self.value, index)
        total = gather(self.weight, index).add_(weight)
        share = torch.tensor(weight, dtype=torch.float64) / total  # a number takes 1 / total
        later = _towards(so_far, entries, share)
        scatter_(self.value, index, torch.where(share == 1, entries, later))
        scatter_(self.weight, index, total)


def _put(tensor: Tensor, piece: Piece, share: float) -> None:
    """Moves the entries of a tensor to a share of the way to those of a piece."""
    entries = piece.entries
    if share != 1:
        kind = _wide(tensor.dtype)
        before = _entries(tensor, piece.index).to(kind)
        entries = _towards(before, entries.to(before), share)
    scatter_(tensor, piece.index, entries.to(tensor))


def _towards(before: Tensor, after: Tensor, share: float | Tensor) -> Tensor:
    """``before + share (after - before)``, whole numbers rounded; equal entries stay."""
    if before.is_floating_point() or before.is_complex():
        by = share.to(before.dtype) if isinstance(share, Tensor) else share
        moved = torch.lerp(before, after, by)
    else:
        moved = before + ((after - before).double() * share).round().to(before.dtype)
    return torch.where(after == before, before, moved)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The kind of number that is reckoned in."""
    if dtype.is_floating_point:
        return torch.float32 if dtype.itemsize < 4 else dtype
    return dtype if dtype.is_complex else torch.int64


def _entries(tensor: Tensor, index: Index) -> Tensor:
    """As :func:`~gist.partition.transfer.gather`, but the tensor itself where all is kept."""
    return tensor.detach() if all(i is None for i in index) else gather(tensor.detach(), index)


def _freshness(part: Part, power: float) -> float:
    return float((1 + part.staleness) ** -power)


def _require_between(name: str, value: float, low: float, high: float) -> None:
    if not (isinstance(value, int | float) and low < value <= high and value < math.inf):
        raise ConfigError(f"{name} must be a number in ({low}, {high}]", got=repr(value))


def _require_power(value: float) -> None:
    if not (isinstance(value, int | float) and 0 <= value < math.inf):
        raise ConfigError("staleness_power must be 0 or more", got=repr(value))
