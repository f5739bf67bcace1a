"""Wirings of image networks: residual blocks as units (ResIST), or filters within them (LoFT).

Both are passed as ``wiring=``; ``functools.partial(wire_blocks, stages=("stages.1",))`` chooses.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from gist.errors import PartitionError
from gist.partition.builder import SpecBuilder
from gist.partition.chain import chain_of, how_to_wire, wire_chain
from gist.partition.rules.registry import has_rule, rule_of
from gist.partition.rules.residual import ResidualRule

_REGISTER = (
    "of residual blocks of your own, register a subclass of gist.ResidualRule for their type"
)


def wire_blocks(
    model: nn.Module, builder: SpecBuilder, stages: str | Sequence[str] | None = None
) -> None:
    """Units are the residual blocks of a stage (ResIST, Dun et al., 2022); all else is whole.

    A stage is a module whose children are residual blocks. Its units, a group named after it, are
    the blocks that add their input as it is; never its first block, which every subnet holds.

    Args:
        model: Any model with residual blocks whose types have a
            :class:`~gist.partition.rules.residual.ResidualRule`.
        builder: Collects the blocks.
        stages: Names of stages, or of modules that hold one each; one may be given as it is. By
            default the one with the most units, as section 3 in the paper, and of equals the last,
            which has most parameters.

    Raises:
        PartitionError: there is no such stage, or none with units.
    """
    units = units_by_stage(model)
    if stages is None:
        most = max(map(len, units.values()), default=0)
        stages = [stage for stage, blocks in units.items() if len(blocks) == most][-1:]
    elif isinstance(stages, str):
        stages = [stages]
    chosen = [_stage(name, units, model) for name in stages]
    empty = [stage for stage in chosen if not units[stage]]
    if empty or not chosen:
        others = "choose other stages, or " * any(units.values())
        raise PartitionError(
            f"{type(model).__name__} has no residual blocks that a subnet could do without"
            + f" in {', '.join(empty)}" * bool(empty),
            got={stage: f"{len(blocks)} such blocks" for stage, blocks in units.items()} or None,
            expected="blocks that keep the shape of their input, behind the first of their stage",
            remedy=f"{others}take a deeper model" if units else _other_method(model),
        )
    for stage in dict.fromkeys(chosen):
        group = stage or "blocks"  # of the model itself
        for unit, path in enumerate(units[stage]):
            builder.block(path, group, unit, size=len(units[stage]))
    builder.whole()


def wire_filters(model: nn.Module, builder: SpecBuilder) -> None:
    """Units are filters: output channels of a convolution (LoFT, Wang et al., 2023).

    In a residual block these are the filters of the first convolution, with the input channels of
    the second; all else is whole. In a chain of layers (``nn.Sequential``, VGG) they are those of
    every convolution, with the inputs of the next layer; outputs of linear layers are whole.

    Args:
        model: A model with residual blocks whose types have a
            :class:`~gist.partition.rules.residual.ResidualRule`, or a chain of layers.
        builder: Collects the layers.

    Raises:
        PartitionError: the model is neither.
    """
    blocks = _residual_blocks(model)
    if blocks:
        for path in blocks:
            builder.layer(path, None)
        builder.whole()
        return
    chain = chain_of(model)
    if not chain or not any(isinstance(model.get_submodule(p), nn.Conv2d) for p in chain):
        name, convolves = type(model).__name__, _convolves(model)
        raise PartitionError(
            f"the wiring of {name} is not known"
            if convolves
            else f"{name} has no filters to partition",
            expected="residual blocks with a rule, or a chain of layers with convolutions",
            remedy=f"{how_to_wire(model)}; {_REGISTER}" if convolves else _other_method(model),
        )
    wire_chain(builder, [(path, None) for path in chain], types=(nn.Conv2d,))


def _residual_blocks(model: nn.Module) -> dict[str, tuple[nn.Module, ResidualRule]]:
    """The outermost residual blocks within a model by path, in order."""
    found: dict[str, tuple[nn.Module, ResidualRule]] = {}
    for path, module in model.named_modules():
        rule = rule_of(module) if has_rule(module) else None
        inner = any(path.startswith(f"{outer}.") for outer in found)
        if path and isinstance(rule, ResidualRule) and not inner:
            found[path] = (module, rule)
    return found


def units_by_stage(model: nn.Module) -> dict[str, list[str]]:
    """The blocks that may be dealt, by stage; of some stages there are none."""
    blocks = _residual_blocks(model)
    stages: dict[str, list[str]] = {}
    for path in blocks:
        stages.setdefault(path.rpartition(".")[0], []).append(path)
    return {
        stage: [path for path in paths[1:] if blocks[path][1].keeps_shape(blocks[path][0])]
        for stage, paths in stages.items()
    }


def _stage(name: str, units: dict[str, list[str]], model: nn.Module) -> str:
    fits = [stage for stage in units if f"{stage}.".startswith(f"{name}.")]
    if len(fits) != 1:
        raise PartitionError(
            f"{type(model).__name__} has no stage of residual blocks {name!r}",
            expected=f"one of {list(units)}" if units else "a network with residual blocks",
            remedy=None if units else _other_method(model),
        )
    return fits[0]


def _convolves(model: nn.Module) -> bool:
    return any(isinstance(module, nn.Conv2d) for module in model.modules())


def _other_method(model: nn.Module) -> str:
    """Which trainer a network without known residual blocks is for."""
    deals = "LoFTTrainer deals its filters" if _convolves(model) else "ISTTrainer deals its neurons"
    return f"gist.{deals}" + f"; {_REGISTER}" * (not chain_of(model))
