"""Options of datasets: the arguments of the functions that read or make them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from gist.errors import ConfigError

_GIVEN = frozenset({"card", "folder", "root", "seed"})
"""Arguments of loaders that are no options: all take some of them."""


def every_option(name: str, load: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a dataset, those that are given and the others at their defaults.

    Args:
        name: Of the dataset.
        load: Reads or makes it.
        options: Those that are given.

    Raises:
        ConfigError: one that it does not have, or a switch that is no boolean.
    """
    parameters = inspect.signature(load).parameters
    accepted = {key: p.default for key, p in parameters.items() if key not in _GIVEN}
    if unknown := sorted(options.keys() - accepted.keys()):
        raise ConfigError(
            f"options that {name} does not have",
            got=", ".join(unknown),
            expected=" or ".join(sorted(accepted)) or "none",
        )
    for key, value in options.items():
        if isinstance(accepted[key], bool) and not isinstance(value, bool):
            raise ConfigError(f"{key} is switched on or off", got=repr(value), expected="a boolean")
    return {**accepted, **options}
