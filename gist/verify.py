"""Checks that a subnet is what it should be: the whole model with the other units switched off."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gist.errors import PartitionError
from gist.execution.initialise import has_no_memory, initialise, place_model
from gist.partition.assignment import Assignment
from gist.partition.grouped.grouping import NotGroupableError
from gist.partition.grouped.model import group_model
from gist.partition.rules.registry import rule_of, without_caches
from gist.partition.samplers import DisjointUniform
from gist.partition.spec import PartitionSpec, model_tensors
from gist.partition.streams import seeded, stream
from gist.partition.subnet import Absent, build_subnet
from gist.partition.transfer import Selection, extract, gather, merge, scatter_
from gist.partition.wiring import Wiring, partition_spec

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
LARGE_MODEL_ENTRIES = 50_000_000
_FEW_UNITS = 8
_APART = "count dims of features from the end, as flatten(-2) does, or use executor='serial'"


@torch.no_grad()
def masked_model(
    model: nn.Module, spec: PartitionSpec, assignment: Assignment, subnet: int
) -> nn.Module:
    """A copy of the whole model in which every entry that ``subnet`` does not hold is zero.

    Layers that mix units, such as LayerNorm, work over the held units alone (see
    :meth:`gist.Rule.masked`); modules of absent units are the identity. Slow and obvious: the
    reference that subnets are compared with.
    """
    selection = Selection(spec, assignment, subnet)
    narrowed = build_subnet(model, spec, assignment, subnet, width_correction=False)
    masked = copy.deepcopy(model)
    for name, parameter in masked.named_parameters():
        layout = spec.layouts[name]
        if selection.holds(layout):
            kept = gather(parameter, selection.index(layout))
            parameter.zero_()
            scatter_(parameter, selection.index(layout), kept)
    for path, port in spec.ports.items():
        held = None if port.input is None else selection.positions(port.input)
        module = masked.get_submodule(path)
        replacement = rule_of(module).masked(module, narrowed.get_submodule(path), held)
        if replacement is not None:
            masked.set_submodule(path, replacement)
    for path, (group, unit) in spec.blocks.items():
        if subnet not in assignment.holders(group, unit):
            masked.set_submodule(path, Absent())
    return masked


@torch.no_grad()
def subnet_difference(
    model: nn.Module,
    spec: PartitionSpec,
    assignment: Assignment,
    subnet: int,
    inputs: Any,
    keywords: Mapping[str, Any] | None = None,
) -> float:
    """Largest difference between a subnet's output and the masked whole model's, both in eval mode.

    Args:
        model: The whole model; left as it is.
        spec: Its partition spec.
        assignment: Which units each subnet holds.
        subnet: Index of the subnet.
        inputs: Positional arguments of the model.
        keywords: Further arguments of the model, by name.

    Returns:
        The largest absolute difference over the largest absolute output.

    Raises:
        PartitionError: the subnet cannot run, or its output has another shape.
    """
    narrow = build_subnet(model, spec, assignment, subnet, width_correction=False).eval()
    whole = masked_model(model, spec, assignment, subnet).eval()
    try:
        expected: Tensor = whole(*inputs, **(keywords or {}))
        got: Tensor = narrow(*inputs, **(keywords or {}))
    except (RuntimeError, ValueError, IndexError, AttributeError) as error:
        raise PartitionError(
            f"a subnet of {type(model).__name__} cannot run as wired",
            got=str(error).splitlines()[0],
            remedy="check the wiring: layers whose features are added or compared share a group",
        ) from error
    if got.shape != expected.shape:
        raise PartitionError(
            f"a subnet of {type(model).__name__} puts out another shape than the whole model",
            got=tuple(got.shape),
            expected=tuple(expected.shape),
            remedy="leave the output of the last layer whole in the wiring",
        )
    scale = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
    return float((got - expected).abs().max() / scale)


def verify_wiring(
    model: nn.Module,
    inputs: Any,
    keywords: Mapping[str, Any] | None = None,
    *,
    wiring: Wiring | None = None,
    seed: int = 0,
) -> float:
    """Refuses a model whose subnets do not compute what the masked whole model computes.

    Works on a perturbed copy, so that parameters that start at zero count too, and on a narrowed
    copy where the model has more than fifty million entries.

    Args:
        model: The model; left as it is.
        inputs: Positional arguments of the model: a small sample.
        keywords: Further arguments of the model, by name.
        wiring: See :func:`~gist.partition.wiring.partition_spec`.
        seed: Seed of the perturbation and of the deals that are tried.

    Returns:
        The largest relative difference seen.

    Raises:
        PartitionError: naming the subnet that differed, by how much, and which group explains it.
    """
    with seeded("verify", seed), without_caches(model):
        trial = _trial_model(model, partition_spec(model, wiring), seed)
        spec = partition_spec(trial, wiring)
        _perturb(trial)
        worst = 0.0
        parts = min([2, *spec.sizes.values()])
        dtype = next(trial.parameters()).dtype
        tolerance = _TOLERANCE.get(dtype, 3e-2)
        for round in range(2):
            assignment = DisjointUniform()(spec.sizes, parts, seed=seed, round=round)
            for subnet in range(parts):
                difference = subnet_difference(trial, spec, assignment, subnet, inputs, keywords)
                if not difference <= tolerance:
                    raise PartitionError(
                        f"the wiring of {type(model).__name__} is wrong: a subnet's output is not "
                        "that of the whole model with the other units switched off",
                        got=f"relative difference {difference:.2g} in subnet {subnet}"
                        + _culprits(trial, spec, inputs, keywords, seed, tolerance),
                        expected=f"at most {tolerance:g}",
                        remedy="check whose output units are whose input units; where an "
                        "operation mixes units, make it a module with a rule and `masked`",
                    )
                worst = max(worst, difference)
    return worst


def verify_grouping(
    model: nn.Module,
    sample: Callable[[nn.Module], tuple[Any, Mapping[str, Any]]],
    *,
    loss: Callable[[nn.Module], Tensor] | None = None,
    wiring: Wiring | None = None,
    seed: int = 0,
) -> float:
    """Refuses a model whose subnets do not compute side by side what they compute alone.

    Two subnets of one shape and few units are run alone and as one grouped model, in evaluation
    mode and, where they draw nothing at random, in training mode. Works on a perturbed copy.

    Args:
        model: The model; left as it is.
        sample: Gives positional arguments and keywords of a model's forward pass.
        loss: Training loss of a model on some batch: a scalar, and ``[2]`` of the grouped model;
            checked too where it is given.
        wiring: See :func:`~gist.partition.wiring.partition_spec`.
        seed: Seed of the perturbation, of the two subnets and of what ``sample`` and ``loss`` draw.

    Returns:
        The largest relative difference seen.

    Raises:
        NotGroupableError: a layer has no grouped form, or the grouped model cannot run, or puts
            out something else, or its loss is not one for each subnet.
    """
    name = type(model).__name__
    with seeded("verify grouping", seed), without_caches(model):
        alone, grouped = _side_by_side(model, wiring, seed)

        def output(model: nn.Module, training: bool, drawn: int = seed) -> Tensor:
            with seeded("sample", seed):
                inputs, keywords = sample(model)
            with seeded("forward", drawn):
                out: Tensor = model.train(training)(*inputs, **keywords)
            return out

        def outputs(training: bool, drawn: int = seed) -> Tensor:
            each = [output(narrow, training, drawn) for narrow in alone]
            return torch.stack(each, dim=1).detach()

        what = f"{name} does not compute side by side what its subnets compute alone"
        worst = 0.0
        for training in (False, True):
            with _refusing(f"{name} cannot run on features [n, m, k] of m subnets"):
                expected, got = outputs(training), output(grouped, training)
                if training:
                    got.sum().backward()  # type: ignore[no-untyped-call]
                draws = training and not torch.equal(expected, outputs(training, seed + 1))
            if not draws:
                worst = max(worst, _relative_difference(got.detach(), expected, what))
        if loss is not None:
            worst = max(worst, _loss_difference(model, loss, wiring, seed))
    return worst


@torch.no_grad()
def _loss_difference(
    model: nn.Module, loss: Callable[[nn.Module], Tensor], wiring: Wiring | None, seed: int
) -> float:
    def value(model: nn.Module) -> Tensor:
        with seeded("loss", seed):
            return loss(model)

    alone, grouped = _side_by_side(model, wiring, seed)  # which have not run yet
    expected = torch.stack([value(narrow) for narrow in alone])
    with _refusing("the loss is not made for scores [n, m, C] of m subnets"):
        got = value(grouped)
    what = "the loss is not one for each of m subnets with scores [n, m, C]"
    return _relative_difference(got, expected, what)


def _side_by_side(
    model: nn.Module, wiring: Wiring | None, seed: int
) -> tuple[list[nn.Module], nn.Module]:
    # Two subnets of few units, alone and as one grouped model, all in evaluation mode.
    trial = _trial_model(model, partition_spec(model, wiring), seed)
    spec = partition_spec(trial, wiring)
    _perturb(trial)
    held = {
        group: tuple(torch.randperm(size)[:few].sort().values for _ in range(2))
        for group, size in spec.sizes.items()
        for few in [max(1, min(_FEW_UNITS, size // 2))]
    }
    assignment = Assignment(round=0, sizes=spec.sizes, held=held)
    alone = [
        build_subnet(trial, spec, assignment, i, width_correction=False).eval() for i in (0, 1)
    ]
    grouped = group_model(alone[0], spec, {}, 2).eval()
    with torch.no_grad():
        for name, tensor in model_tensors(grouped).items():
            for i, narrow in enumerate(alone):
                tensor[i].copy_(model_tensors(narrow)[name])
    return alone, grouped


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    # Code that was written for one subnet may fail, or warn, in any way on several.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        raise NotGroupableError(
            what,
            got=(str(error) or type(error).__name__).splitlines()[0],
            remedy=_APART,
        ) from error


def _relative_difference(got: Tensor, expected: Tensor, what: str) -> float:
    if got.shape != expected.shape:
        raise NotGroupableError(
            what,
            got=f"shape {tuple(got.shape)}",
            expected=tuple(expected.shape),
            remedy=_APART,
        )
    scale = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
    difference = float((got - expected).abs().max() / scale)
    if not difference <= _TOLERANCE.get(expected.dtype, 3e-2):
        raise NotGroupableError(what, got=f"relative difference {difference:.2g}", remedy=_APART)
    return difference


def verify_identity(model: nn.Module, spec: PartitionSpec, assignment: Assignment) -> None:
    """Checks that extracting every subnet and merging them again changes nothing, bit for bit.

    Raises:
        PartitionError: naming the tensors that changed.
    """
    tensors = {name: t.detach().clone() for name, t in model_tensors(model).items()}
    parts = [extract(tensors, spec, assignment, i) for i in range(assignment.num_subnets)]
    merge(tensors, spec, assignment, parts)
    changed = [n for n, t in model_tensors(model).items() if not torch.equal(t, tensors[n])]
    if changed:
        raise PartitionError("extract and merge are not the identity", got=changed)


def small_model(model: nn.Module, spec: PartitionSpec, seed: int = 0) -> nn.Module:
    """A model that takes and puts out what ``model`` does, and can be run at once.

    That is the model itself; or, where it has more than fifty million entries or no memory, a
    subnet of few units that stands for it.
    """
    large = sum(t.numel() for t in model_tensors(model).values()) > LARGE_MODEL_ENTRIES
    narrow = large and not spec.blocks
    without_memory = has_no_memory(model)
    if not (narrow or without_memory):
        return model
    trial = copy.deepcopy(model) if without_memory else model
    if narrow:
        parts = max(1, min(spec.sizes.values()) // _FEW_UNITS)
        held = {}
        for group, size in spec.sizes.items():
            units = torch.randperm(size, generator=stream("small model", seed, group))
            held[group] = (units[: size // parts].sort().values,)
        assignment = Assignment(round=0, sizes=spec.sizes, held=held)
        trial = build_subnet(
            model, spec, assignment, 0, width_correction=False, filled=not without_memory
        )
    if without_memory:
        tensors = model_tensors(trial)
        place_model(trial, {n: torch.empty_like(t, device="cpu") for n, t in tensors.items()})
        initialise(trial, seed)
    return trial


def _trial_model(model: nn.Module, spec: PartitionSpec, seed: int) -> nn.Module:
    small = small_model(model, spec, seed)
    return copy.deepcopy(model) if small is model else small


@torch.no_grad()
def _perturb(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.add_(torch.rand_like(buffer))


def _culprits(
    model: nn.Module,
    spec: PartitionSpec,
    inputs: Any,
    keywords: Mapping[str, Any] | None,
    seed: int,
    tolerance: float,
) -> str:
    # Partition one group at a time: the groups that fail alone are what to look at.
    wrong = []
    for group in spec.sizes:
        deal = DisjointUniform()(
            {group: spec.sizes[group]}, min(2, spec.sizes[group]), seed=seed, round=0
        )
        held = {
            name: deal.held[name] if name == group else (torch.arange(size),) * deal.num_subnets
            for name, size in spec.sizes.items()
        }
        alone = Assignment(round=0, sizes=spec.sizes, held=held)
        try:
            fine = subnet_difference(model, spec, alone, 0, inputs, keywords) <= tolerance
        except PartitionError:
            fine = False
        if not fine:
            wrong.append(group)
    return f"; on its own, group {' and '.join(map(repr, wrong))} differs" if wrong else ""
