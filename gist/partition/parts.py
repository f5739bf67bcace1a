"""What comes back of a task, and whether it may become part of the global tensors."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from gist.errors import PartitionError
from gist.partition.assignment import Assignment
from gist.partition.spec import ParamLayout, PartitionSpec, raise_findings
from gist.partition.transfer import Selection

LARGEST = 2.0**53
"""Squares of differences of such numbers are far from overflow in float32, and whole ones exact."""

_NUMBERS = frozenset(
    {
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
        *(torch.complex64, torch.complex128),
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    }
)

_MOST_FINDINGS = 10


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """What comes back of one task: the tensors of one subnet, trained.

    Attributes:
        assignment: The units of the subnet, the only one of this assignment.
        tensors: The trained entries by full name; of all tensors that the subnet holds, or some.
        start: The same entries as they were sent, for rules with
            :attr:`~gist.partition.merging.MergeRule.needs_start`.
        weight: Training samples behind it.
        staleness: Merges since it was sent.
        classes: ``[k]`` int64, ascending: rows of the output layer that alone count
            (:func:`output_layer`), as a client has no samples of the others; None for all.

    Raises:
        PartitionError: another number of subnets than one, or a weight or staleness out of range.
    """

    assignment: Assignment
    tensors: Mapping[str, Tensor]
    start: Mapping[str, Tensor] | None = None
    weight: float = 1.0
    staleness: int = 0
    classes: Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.assignment, Assignment) or self.assignment.num_subnets != 1:
            raise PartitionError("a part must have the assignment of a single subnet")
        for name, above in (("weight", 0), ("staleness", -1)):
            value = getattr(self, name)
            kind = int if name == "staleness" else int | float
            if isinstance(value, bool) or not isinstance(value, kind) or not above < value < 2**63:
                raise PartitionError(f"the {name} of a part is out of range", got=repr(value)[:80])

    @cached_property
    def volume(self) -> int:
        """Number of its entries."""
        return sum(entries.numel() for entries in self.tensors.values())


def output_layer(spec: PartitionSpec) -> tuple[str, ...]:
    """Names of the tensors with a row for every output of the model, such as weight and bias.

    They are those of the layer that has the last weight of the model; where its rows follow units,
    and it is so declared too early, of the last layer of the wiring whose outputs stay whole.

    Raises:
        PartitionError: there is no such layer, or some of its tensors have other numbers of rows,
            so that they are no outputs.
    """
    weights = [name for name, layout in spec.layouts.items() if len(layout.shape) >= 2]
    if not weights:
        raise PartitionError("a model without weights has no output layer")
    layers = [path for path, port in spec.ports.items() if port.contracts and port.output is None]
    around = [path for path in layers if weights[-1].startswith(f"{path}.")]
    path = max(around, key=len, default=weights[-1].rpartition(".")[0])
    own = _tensors_of(path, spec)
    if layers and any(_is_dealt(layout) for layout in own):
        path = layers[-1]
        own = _tensors_of(path, spec)
    rows = [layout.shape[0] for layout in own if len(layout.shape) >= 2][-1]
    if any(map(_is_dealt, own)) or not {layout.shape[0] for layout in own} <= {1, rows}:
        raise PartitionError(
            f"the last layer of the model, {path!r}, does not have a row for every output",
            got=", ".join(f"{layout.name} {layout.shape}" for layout in own),
            remedy="use a model that ends in a linear layer, or a strategy without masked_outputs",
        )
    return tuple(layout.name for layout in own if layout.shape[0] == rows)


def _tensors_of(path: str, spec: PartitionSpec) -> list[ParamLayout]:
    """Layouts of a layer's tensors but scalars; of the model's own for the empty path."""
    own = (layout for layout in spec.layouts.values() if layout.shape)
    if not path:
        return [layout for layout in own if "." not in layout.name]
    return [layout for layout in own if layout.name.startswith(f"{path}.")]


def _is_dealt(layout: ParamLayout) -> bool:
    """Whether rows follow units, or all of it one unit."""
    return layout.owner is not None or any(slot.dim == 0 for slot in layout.slots)


def check_part(
    part: Part,
    spec: PartitionSpec,
    *,
    names: Iterable[str] | None = None,
    like: Mapping[str, Tensor] | None = None,
    largest: float = LARGEST,
) -> None:
    """Looks at a part from outside: whether it fits what was sent, and can do no harm.

    Nothing of it is trusted but its :class:`~gist.partition.assignment.Assignment`, which was
    checked where it was made. Values are read last, and only where everything else fits.

    Args:
        part: What came back.
        spec: The partition spec.
        names: Tensors that must be there, no more and no less; by default all that are held.
        like: The global tensors, whose dtypes are expected; by default those of ``part.start``, or
            any numbers.
        largest: No value may be further from zero.

    Raises:
        PartitionError: once, with everything that is wrong.
    """
    selection = Selection(spec, part.assignment, 0)
    found = misfits(part, selection, spec.layouts if like is None else like)
    if not found:
        held = (name for name, layout in spec.layouts.items() if selection.holds(layout))
        wanted = set(held if names is None else names)
        found += [f"{name}: is missing" for name in sorted(wanted - part.tensors.keys())]
        found += [f"{name}: was not asked for" for name in sorted(part.tensors.keys() - wanted)]
        dtypes = part.start if like is None else like
        for name, entries in part.tensors.items():
            dtype = entries.dtype if dtypes is None or name not in dtypes else dtypes[name].dtype
            if entries.dtype != dtype:
                found.append(f"{name}: is {entries.dtype}, expected {dtype}")
            elif not _is_within(entries.detach(), largest):
                found.append(f"{name}: has values that are no finite numbers up to {largest:g}")
    more = len(found) - _MOST_FINDINGS
    cut = found[:_MOST_FINDINGS] + ([f"and {more} more"] if more > 0 else [])
    raise_findings("an update cannot be taken", cut)


def misfits(
    part: Part, selection: Selection, tensors: Container[str], *, needs_start: bool = False
) -> list[str]:
    """What of the names, kinds and shapes of a part does not fit, one sentence each."""
    spec = selection.spec
    if dict(part.assignment.sizes) != spec.sizes:
        return ["its units are of other groups"]
    if needs_start and part.start is None:
        return ["start: is missing, and this rule compares with what was sent"]
    found = []
    for what, given in (("", part.tensors), ("start of ", part.start)):
        if given is None:
            continue
        if not isinstance(given, Mapping):
            found.append(f"{what}tensors: are no mapping, but {type(given).__name__}")
            continue
        for name, entries in given.items():
            layout = spec.layouts.get(name) if isinstance(name, str) else None
            if layout is None or name not in tensors:
                found.append(f"{what}{str(name)[:80]}: is no tensor of the model")
            elif not selection.holds(layout):
                found.append(f"{what}{name}: belongs to a unit that is not held")
            else:
                wrong = _misfit(entries, selection.shape(layout))
                found += [f"{what}{name}: {wrong}"] if wrong else []
    if not found and part.start is not None:
        missing = sorted(part.tensors.keys() - part.start.keys())
        found += [f"start of {name}: is missing" for name in missing]
    if not found and part.classes is not None:
        found += _wrong_classes(part.classes, spec)
    return found


def _misfit(entries: Any, shape: tuple[int, ...]) -> str | None:
    if type(entries) not in (Tensor, nn.Parameter):
        return f"is no tensor, but {type(entries).__name__}"
    plain = entries.layout == torch.strided and entries.dtype in _NUMBERS
    if not plain or entries.device.type == "meta":
        return f"is no plain tensor, but {entries.layout}, {entries.dtype} on {entries.device}"
    if tuple(entries.shape) != shape:
        return f"has shape {tuple(entries.shape)}, expected {shape}"
    return None


def _wrong_classes(classes: Tensor, spec: PartitionSpec) -> list[str]:
    outputs = spec.layouts[output_layer(spec)[0]].shape[0]
    fits = isinstance(classes, Tensor) and classes.dtype == torch.int64 and classes.dim() == 1
    if fits and classes.numel():
        fits = bool((classes[1:] > classes[:-1]).all())
        fits = fits and int(classes[0]) >= 0 and int(classes[-1]) < outputs
    return [] if fits else [f"classes must be ascending rows out of 0 to {outputs - 1}"]


def _is_within(entries: Tensor, largest: float) -> bool:
    """Whether all values are numbers of at most this magnitude."""
    if entries.is_complex():
        entries = torch.view_as_real(entries.resolve_conj())
    if entries.dtype == torch.bool or not entries.numel():
        return True
    low, high = (float(value) for value in entries.aminmax())
    return -largest <= low and high <= largest  # NaN is on neither side
