"""What baselines need that subnet training does not: a whole model in memory."""

from __future__ import annotations

from torch import nn

from gist.config import TrainConfig
from gist.errors import ConfigError
from gist.execution.initialise import has_no_memory


def require_memory(model: nn.Module, config: TrainConfig) -> None:
    """Refuses a store on disk, and a model without values.

    Raises:
        ConfigError: see above.
    """
    if config.store == "disk":
        raise ConfigError(
            "this baseline keeps the whole model in memory",
            got="store='disk'",
            remedy="leave store out",
        )
    if has_no_memory(model):
        raise ConfigError(
            "a model on the meta device has no values",
            got=type(model).__name__,
            remedy="build the model in memory",
        )
