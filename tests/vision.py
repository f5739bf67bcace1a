"""torchvision and timm, importable with a build of torch that their compiled library is not for.

Where that library cannot be loaded, the operators that torchvision asks for while it is imported
are defined without an implementation; no model here uses them.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch

found = find_spec("torchvision")
assert found is not None
assert found.origin is not None
try:
    torch.ops.load_library(Path(found.origin).parent / "_C.so")
except OSError:
    _LIBRARY = torch.library.Library("torchvision", "DEF")  # alive as long as this module
    for name in ("nms", "qnms"):
        _LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import timm.layers  # noqa: E402
import timm.models.resnetv2 as resnetv2  # noqa: E402
import torchvision.models as torchvision_models  # noqa: E402

__all__ = ["resnetv2", "timm", "torchvision_models"]
