"""Walks a model's layers in the order of its wiring and collects its partition spec."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from gist.errors import PartitionError
from gist.partition.index_map import ONE_POSITION
from gist.partition.rules.registry import HOW_TO_REGISTER, has_rule, known_types, rule_of
from gist.partition.spec import (
    Axis,
    ParamLayout,
    PartitionSpec,
    Port,
    Slot,
    UnitGroup,
    model_tensors,
    raise_findings,
)


class SpecBuilder:
    """Collects groups, layouts and ports while a wiring names the layers of ``model``.

    A wiring calls :meth:`layer` once per layer, handing on the axis that the previous one
    returned::

        axis = None                                            # input features are whole
        axis = builder.layer("conv1", axis, produces="hidden.0")
        axis = builder.layer("norm1", axis)
        builder.layer("conv2", axis)                           # output features are whole

    Everything that does not fit is collected; :meth:`build` raises it at once.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._names = {id(tensor): name for name, tensor in model_tensors(model).items()}
        self._groups: dict[str, UnitGroup] = {}
        self._layouts: dict[str, ParamLayout] = {}
        self._ports: dict[str, Port] = {}
        self._blocks: dict[str, tuple[str, int]] = {}
        self._findings: list[str] = []
        self._refused: list[str] = []
        self._unruled = False

    def layer(
        self,
        path: str,
        input: Axis | None,
        *,
        produces: str | None = None,
        units: str | None = None,
    ) -> Axis | None:
        """Adds one layer.

        Args:
            path: Full module name.
            input: Axis of its input features; None where these are whole.
            produces: Name of the unit group that its output features become; None leaves an output
                of its own whole. Layers that only pass features on (norms, dropout) take none.
            units: What the units are, where the layer type leaves a choice (``"heads"`` or
                ``"channels"`` of attention layers).

        Returns:
            The axis of its output features, None where these are whole.
        """
        module = self._module(path)
        if module is None:
            return None
        if not has_rule(module):
            self._refused.append(path)
            kind = f"{type(module).__module__}.{type(module).__qualname__}"
            self._findings.append(f"{path}: no partition rule for layer type {kind}")
            self._unruled = True
            return None
        layer = Layer(self, path, module, input, produces, units)
        try:
            rule = rule_of(module)
            layer.contracts = rule.contracts
            output = rule.connect(layer)
        except PartitionError as error:
            self._refused.append(path)
            self._findings.append(f"{path}: {error}")
            return None
        if layer.input is not None or output is not None:
            port = Port(
                path=path,
                input=layer.input,
                output=output,
                contracts=layer.contracts,
                normalizes=rule.normalizes,
            )
            reused = self._ports.setdefault(path, port) != port
            if reused and (layer.contracts or rule.normalizes):
                self._findings.append(f"{path}: used twice, with features of different unit groups")
        return output

    def block(self, path: str, group: str, unit: int, *, size: int) -> None:
        """Declares that a module belongs to one unit as a whole; absent, it is the identity.

        Args:
            path: Full module name, such as ``stage3.4``.
            group: Name of the unit group.
            unit: The unit, in ``[0, size)``.
            size: Number of units of the group.
        """
        module = self._module(path)
        if module is None:
            return
        self.group(group, size)
        self._blocks[path] = (group, unit)
        inside = {id(tensor) for tensor in model_tensors(module).values()}
        for outside, tensor in _tensors_by_every_name(self.model):
            if id(tensor) in inside and not outside.startswith(f"{path}."):
                self._findings.append(
                    f"{path}: belongs to one unit as a whole, but is tied to {outside}"
                )
        for tensor in model_tensors(module).values():
            self._declare(tensor, owner=(group, unit))

    def whole(self, path: str = "") -> None:
        """Declares that every subnet holds a module whole: all its tensors not yet declared.

        The module needs no rule. Call it last, after what lies within is wired.

        Args:
            path: Full module name; by default the model itself.
        """
        module = self._module(path)
        if module is not None:
            for tensor in model_tensors(module).values():
                if self._names[id(tensor)] not in self._layouts:
                    self._declare(tensor)

    def group(self, name: str, size: int) -> Axis:
        """Creates a unit group, or joins it where it exists; returns its plain axis."""
        group = self._groups.setdefault(name, UnitGroup(name=name, size=size))
        if group.size != size:
            raise PartitionError(
                f"unit group {name!r} is shared by layers of different width",
                got=f"{size} units",
                expected=f"{group.size}",
            )
        return Axis(size=size, parts=((name, ONE_POSITION),))

    def follow(self, owner: nn.Module, path: str, name: str, slots: tuple[Slot, ...]) -> None:
        """Declares the layout of tensor ``name`` of module ``owner`` at ``path``."""
        if not hasattr(owner, name):
            raise PartitionError(f"has no tensor {name!r}", got=type(owner).__name__)
        tensor = getattr(owner, name)
        if tensor is None:
            return
        if id(tensor) not in self._names:
            raise PartitionError(
                f"{name} is computed, not a parameter or buffer of the model",
                remedy="remove parametrisations such as spectral_norm before training",
            )
        full = self._names[id(tensor)]
        shape = _shape(tensor)
        layout = ParamLayout(name=full, shape=shape, slots=slots if shape else ())
        known = self._layouts.setdefault(full, layout)
        if known != layout and full == f"{path}.{name}":
            self._findings.append(f"{path}: named twice in the wiring")
        elif known != layout:
            self._findings.append(
                f"{path}.{name}: tied to {full}, but follows other units there; "
                "tied layers must share their unit groups"
            )

    def build(self) -> PartitionSpec:
        """The finished spec.

        Raises:
            PartitionError: with every finding: unknown modules and layer types, axes that do not
                fit, tensors without a layout.
        """
        tensors = model_tensors(self.model)
        found = list(self._findings)
        for name, tensor in tensors.items():
            if nn.parameter.is_lazy(tensor):
                found.append(
                    f"{name}: is lazy (its size is not known yet); give in_channels instead of -1, "
                    "or run the model once before training"
                )
            elif name not in self._layouts and not self._is_refused(name):
                found.append(
                    f"{name}: no layer of the wiring declares it (shape {tuple(tensor.shape)}); "
                    f"add module {self._layer_of(name)!r} to the wiring"
                )
        if self._unruled:
            found.append(f"known layer types are {known_types()}; {HOW_TO_REGISTER}")
        raise_findings(f"{type(self.model).__name__} cannot be partitioned as wired", found)
        spec = PartitionSpec(
            groups=self._groups,
            layouts={name: self._layouts[name] for name in tensors},
            ports=self._ports,
            blocks=self._blocks,
        )
        spec.check(self.model)
        return spec

    def _module(self, path: str) -> nn.Module | None:
        try:
            return self.model.get_submodule(path)
        except AttributeError:
            children = [name for name, _ in self.model.named_children()]
            self._findings.append(f"{path}: no such module; the model has {', '.join(children)}")
            return None

    def _declare(self, tensor: Tensor, owner: tuple[str, int] | None = None) -> None:
        name = self._names[id(tensor)]
        self._layouts[name] = ParamLayout(name=name, shape=_shape(tensor), owner=owner)

    def _is_refused(self, name: str) -> bool:
        return any(name.startswith(f"{path}.") for path in self._refused)

    def _layer_of(self, name: str) -> str:
        """The outermost module around a tensor that has a rule, else the innermost."""
        parts = name.split(".")[:-1]
        paths = [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
        ruled = (path for path in paths if has_rule(self.model.get_submodule(path)))
        return next(ruled, ".".join(parts))


def _shape(tensor: Tensor) -> tuple[int, ...]:
    # A lazy tensor has no shape yet; the spec's check names it.
    return () if nn.parameter.is_lazy(tensor) else tuple(tensor.shape)


def _tensors_by_every_name(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


class Layer:
    """What a rule sees of the layer it connects.

    Attributes:
        module: The layer.
        path: Its full name.
        input: Axis of its input features; None where these are whole.
        units: What the wiring asks to take as units; None for the layer type's default.
        contracts: Whether the layer itself sums over its input features, as its rule says; a rule
            whose submodules do that instead sets it to False.
    """

    def __init__(
        self,
        builder: SpecBuilder,
        path: str,
        module: nn.Module,
        input: Axis | None,
        produces: str | None,
        units: str | None,
    ) -> None:
        self.module: Any = module
        self.path, self.input, self.units = path, input, units
        self.contracts = False
        self._builder, self._produces = builder, produces

    @property
    def is_partitioned(self) -> bool:
        """Whether the wiring asks for a unit group at the output."""
        return self._produces is not None

    def produce(self, size: int) -> Axis | None:
        """The output axis of a layer with ``size`` output units; None where they stay whole."""
        return None if self._produces is None else self._builder.group(self._produces, size)

    def expect_input(self, size: int) -> Axis | None:
        """The input axis, after checking that the layer takes ``size`` features.

        Where the wiring brings several copies of as many features, as attention heads are, the
        model must have made one of them, as a mean over heads does.
        """
        if self.input is not None and self.input.size != size:
            once = self.input.once(size)
            if once is None:
                self.refuse(f"takes {size} input features, but the wiring brings {self.input.size}")
            self.input = once
        return self.input

    def follow(self, name: str, *axes: tuple[int, Axis | None]) -> None:
        """Declares tensor ``name`` of this layer: which of its dims run along which axis.

        Args:
            name: ``"weight"``, or ``"lin.weight"`` for a tensor of a submodule. A tensor that is
                None, as a bias that was switched off, is passed over.
            *axes: ``(dim, axis)`` pairs; dims along no axis, or along None, are whole.
        """
        path, _, leaf = name.rpartition(".")
        owner = self.module.get_submodule(path)
        slots = tuple(slot for dim, axis in axes if axis is not None for slot in axis.slots(dim))
        self._builder.follow(owner, f"{self.path}.{path}" if path else self.path, leaf, slots)

    def child(self, name: str, input: Axis | None, *, produces: bool = False) -> Axis | None:
        """Connects a submodule that has a rule of its own.

        Args:
            name: Its name within this layer.
            input: Axis of its input features.
            produces: Whether its output units are this layer's.
        """
        return self._builder.layer(
            f"{self.path}.{name}", input, produces=self._produces if produces else None
        )

    def inner(self, name: str, input: Axis | None) -> Axis | None:
        """Connects a submodule whose output features become a unit group of their own."""
        path = f"{self.path}.{name}"
        return self._builder.layer(path, input, produces=path)

    def group(self, name: str, size: int) -> Axis:
        """A unit group inside the layer, such as heads that are averaged in the end."""
        return self._builder.group(f"{self.path}.{name}", size)

    def whole(self) -> None:
        """Declares that every subnet holds the rest of the layer whole."""
        self._builder.whole(self.path)

    def refuse(self, why: str) -> None:
        """Stops: this layer cannot be partitioned as it is configured."""
        raise PartitionError(why)
