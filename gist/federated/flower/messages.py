"""What a server and its clients send each other: flat records of arrays, settings and numbers.

No pickle, nothing nested, and nothing of Flower. Every message is a work or an outcome, which are
packed into :class:`Records` and read back from them, with everything checked that can be without
knowing the model.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gist.errors import DataError
from gist.partition.spec import PartitionSpec

Value = int | float | str | bool | list[str]

_SETTINGS = "settings."
"""Begins the names of settings of the local training."""

_BFLOAT16 = "bfloat16"
"""Kind of arrays that are the bits of what numpy does not know."""


@dataclass(frozen=True, kw_only=True)
class Records:
    """A message.

    Attributes:
        arrays: By kind and name, ``"tensor/layers.0.weight"``.
        config: Settings.
        metrics: Numbers.
    """

    arrays: Mapping[str, NDArray[Any]]
    config: Mapping[str, Value]
    metrics: Mapping[str, int | float]

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(array.nbytes for array in self.arrays.values())


@dataclass(frozen=True, kw_only=True, eq=False)
class Work:
    """What a client is sent.

    Attributes:
        client: Its number.
        task: Number of the task in the run, from 0 on.
        own: Which of the client's tasks it is, from 0 on.
        seed: Of the run.
        steps: Local steps.
        rate: Factor on the base learning rate.
        proximal: µ of FedProx.
        masked_outputs: Whether the loss leaves out classes that the client has no samples of.
        verify: Whether the client is to verify the wiring of its model first.
        model: :func:`fingerprint` of the server's model.
        settings: Those of the local training, by name.
        trained: Parameters that are trained and come back, by full name.
        units: By group, those that the client is to hold: int64, ascending.
        tensors: Their entries of every parameter and buffer, by full name.
    """

    client: int
    task: int
    own: int
    seed: int
    steps: int
    rate: float
    proximal: float
    masked_outputs: bool
    verify: bool
    model: str
    settings: Mapping[str, Value]
    trained: tuple[str, ...]
    units: Mapping[str, Tensor]
    tensors: Mapping[str, Tensor]

    def pack(self) -> Records:
        """As records."""
        config: dict[str, Value] = {name: getattr(self, name) for name in _WORK}
        config |= {_SETTINGS + name: value for name, value in self.settings.items()}
        config["trained"] = list(self.trained)
        return Records(
            arrays={**_packed("tensor", self.tensors), **_packed("unit", self.units)},
            config=config,
            metrics={},
        )

    @classmethod
    def unpack(cls, records: Records) -> Work:
        """From records.

        Raises:
            DataError: they are not those of a work.
        """
        config = records.config
        tensors = _unpacked(records.arrays, ("tensor", "unit"))
        named = config.get("trained")
        if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
            raise _damaged("trained", named, "names of parameters")
        return cls(
            **{name: _read(config, name, kind) for name, kind in _WORK.items()},
            settings={
                name.removeprefix(_SETTINGS): value
                for name, value in config.items()
                if name.startswith(_SETTINGS)
            },
            trained=tuple(named),
            units=tensors["unit"],
            tensors=tensors["tensor"],
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """What a client answers.

    Attributes:
        tensors: What it trained, and its buffers, by full name.
        samples: Its training samples.
        losses: Of its first and its last local step.
        passes: Over its samples, in these steps.
        seconds: That the steps took.
        classes: Those that its loss was taken over: int64, ascending; None for all.
    """

    tensors: Mapping[str, Tensor]
    samples: int
    losses: tuple[float, float]
    passes: float
    seconds: float
    classes: Tensor | None = None

    def pack(self) -> Records:
        """As records."""
        classes = {} if self.classes is None else _packed("class", {"": self.classes})
        first, last = self.losses
        return Records(
            arrays={**_packed("tensor", self.tensors), **classes},
            config={},
            metrics={
                "num-examples": self.samples,
                "first_loss": first,
                "last_loss": last,
                "passes": self.passes,
                "seconds": self.seconds,
            },
        )

    @classmethod
    def unpack(cls, records: Records) -> Outcome:
        """From records.

        Raises:
            DataError: they are not those of an outcome, or a number is out of range.
        """
        metrics = records.metrics
        tensors = _unpacked(records.arrays, ("tensor", "class"))
        samples = _read(metrics, "num-examples", int)
        passes, seconds = (_read(metrics, name, float) for name in ("passes", "seconds"))
        if not 0 < samples < 2**53:
            raise _damaged("num-examples", samples, "a number of samples")
        for name, value in (("passes", passes), ("seconds", seconds)):
            if not 0 <= value < math.inf:
                raise _damaged(name, value, "a number of at least 0")
        return cls(
            tensors=tensors["tensor"],
            samples=samples,
            losses=(_read(metrics, "first_loss", float), _read(metrics, "last_loss", float)),
            passes=passes,
            seconds=seconds,
            classes=tensors["class"].get(""),
        )


_WORK = {
    "client": int,
    "task": int,
    "own": int,
    "seed": int,
    "steps": int,
    "rate": float,
    "proximal": float,
    "masked_outputs": bool,
    "verify": bool,
    "model": str,
}
"""Fields of a work that are plain values."""


def fingerprint(spec: PartitionSpec, tensors: Mapping[str, Tensor]) -> str:
    """What must be the same of a model at the server and at a client: all but its values."""
    kinds = ", ".join(f"{name} {tensor.dtype}" for name, tensor in tensors.items())
    return hashlib.sha256(f"{spec}\n{kinds}".encode()).hexdigest()[:16]


def _packed(kind: str, tensors: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
    packed = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        if plain.dtype == torch.bfloat16:
            packed[f"{_BFLOAT16}.{kind}/{name}"] = plain.view(torch.int16).numpy()
        else:
            packed[f"{kind}/{name}"] = plain.numpy()
    return packed


def _unpacked(
    arrays: Mapping[str, NDArray[Any]], kinds: Iterable[str]
) -> dict[str, dict[str, Tensor]]:
    """Tensors of each kind by name, in memory of their own that may be written to."""
    found: dict[str, dict[str, Tensor]] = {kind: {} for kind in kinds}
    for key, array in arrays.items():
        kind, _, name = key.partition("/")
        bits = kind.startswith(f"{_BFLOAT16}.")
        kind = kind.removeprefix(f"{_BFLOAT16}.")
        if kind not in found or name in found[kind] or (bits and array.dtype != np.int16):
            raise _damaged("arrays", key[:80], f"kinds {', '.join(found)}, each name once")
        try:
            tensor = torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("=")))
            found[kind][name] = tensor.view(torch.bfloat16) if bits else tensor
        except (TypeError, ValueError) as error:
            raise _damaged(key[:80], str(error)[:200], "an array of numbers") from error
    return found


def _read(values: Mapping[str, Any], name: str, kind: type) -> Any:
    """A plain value; whole numbers are floats, too."""
    value = values.get(name)
    allowed = (int, float) if kind is float else (kind,)
    if type(value) not in allowed:
        raise _damaged(name, repr(value)[:80], kind.__name__)
    return float(value) if kind is float else value  # type: ignore[arg-type]


def _damaged(what: str, got: Any, expected: str) -> DataError:
    return DataError(f"a message is damaged: {what}", got=got, expected=expected)
