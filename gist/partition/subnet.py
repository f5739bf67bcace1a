"""Builds the narrow model that a subnet trains, and corrects the scale of its sums."""

from __future__ import annotations

import copy
import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gist.partition.assignment import Assignment
from gist.partition.rules.registry import has_rule, rule_of, without_caches
from gist.partition.spec import PartitionSpec, model_tensors
from gist.partition.transfer import Selection, extract


def build_subnet(
    model: nn.Module,
    spec: PartitionSpec,
    assignment: Assignment,
    subnet: int,
    *,
    width_correction: bool | None = None,
    filled: bool = True,
    device: torch.device | None = None,
) -> nn.Module:
    """The narrow model that one subnet trains, with the entries it holds.

    The copy shares nothing with ``model``: tensors are cut, sizes corrected by the rules, caches
    dropped, modules of absent units replaced by the identity. Mode, ``requires_grad``, dtype,
    device and ties are those of the model.

    Args:
        model: The global model; left as it is.
        spec: Its partition spec.
        assignment: Which units each subnet holds.
        subnet: Index of the subnet.
        width_correction: See :func:`corrected_paths`.
        filled: Fill it with the entries; False leaves that to the caller, and reads none of them.
        device: Where it is made, if it is not filled; by default where the model is.
    """
    selection = Selection(spec, assignment, subnet)
    if filled:
        parts = extract(model_tensors(model), spec, assignment, subnet)
    else:
        parts = {
            name: tensor.detach().new_empty(selection.shape(spec.layouts[name]), device=device)
            for name, tensor in model_tensors(model).items()
            if selection.holds(spec.layouts[name])
        }
    memo: dict[int, Any] = {}
    for path, (group, unit) in spec.blocks.items():
        if subnet not in assignment.holders(group, unit):
            memo[id(model.get_submodule(path))] = Absent()
    for name, tensor in model_tensors(model).items():
        if name in parts:
            part = parts[name]
            if isinstance(tensor, nn.Parameter):
                part = nn.Parameter(part, requires_grad=tensor.requires_grad)
            memo[id(tensor)] = part
    with without_caches(model):
        narrow = copy.deepcopy(model, memo)

    for path, module in narrow.named_modules():
        port = spec.ports.get(path)
        inner = None if port is None else selection.size(port.input)
        outer = None if port is None else selection.size(port.output)
        if has_rule(module):
            rule_of(module).resize(module, inner, outer)
    for path, factor in width_scales(spec, selection, width_correction).items():
        scale_input_of(narrow.get_submodule(path), factor)
    return narrow


class Absent(nn.Identity):
    """A module whose units the subnet does not hold: hands on its first argument."""

    def forward(self, input: Any, *args: Any, **kwargs: Any) -> Any:
        """Returns ``input``; where that is no tensor, as a graph of DGL, what comes next."""
        return next((value for value in (input, *args) if isinstance(value, Tensor)), input)


def scale_input_of(module: nn.Module, factor: float) -> None:
    """Makes a module multiply its features by ``factor`` at every call.

    They are the first argument that is a tensor, or a pair of tensors.
    """
    module.register_forward_pre_hook(partial(_scale_input, factor), with_kwargs=True)


def _scale_input(
    factor: float, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    for place, value in enumerate(args):
        if isinstance(value, Tensor | tuple):
            return (*args[:place], _scaled(value, factor), *args[place + 1 :]), kwargs
    names = inspect.signature(module.forward).parameters
    name = next(name for name in names if isinstance(kwargs.get(name), Tensor | tuple))
    return args, {**kwargs, name: _scaled(kwargs[name], factor)}


def _scaled(features: Any, factor: float) -> Any:
    if isinstance(features, tuple):
        return tuple(each * factor for each in features)
    return features * factor


def corrected_paths(spec: PartitionSpec, width_correction: bool | None) -> frozenset[str]:
    """The layers whose narrowed inputs are scaled by (whole width) / (held width).

    A subnet sums over 1/m of the inputs that the whole model sums over; scaling makes the sums
    alike in expectation, as dropout does. A normalisation layer behind takes care of it by itself.

    Args:
        spec: The partition spec.
        width_correction: True corrects every layer whose output is not normalised; False none;
            None (the default) does as True, but leaves out the last layer of a model that has
            normalisation layers, where the correction was measured to do harm.
    """
    paths = spec.unnormalized() if width_correction is not False else frozenset()
    if width_correction is None and spec.has_normalization:
        return frozenset(path for path in paths if spec.ports[path].output is not None)
    return paths


def width_scales(
    spec: PartitionSpec, selection: Selection, width_correction: bool | None
) -> dict[str, float]:
    """Factor on the input of each corrected layer of one subnet, by module path."""
    scales = {}
    for path in corrected_paths(spec, width_correction):
        port = spec.ports[path]
        assert port.input is not None, "layers with whole inputs are not corrected"
        whole, held = port.input.size, selection.size(port.input)
        if held and held != whole:
            scales[path] = whole / held
    return scales
