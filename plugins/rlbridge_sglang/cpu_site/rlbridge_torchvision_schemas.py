"""The schemas of two torchvision ops, without the ops: torchvision's own library is built for CUDA, and does not load here.

torchvision describes the shapes of its ops when it is imported, which fails where the ops are not declared. They are declared
when somebody first imports torchvision, so that a process that does not is spared the import of torch. A call of one fails:
it has no kernel.
"""

from __future__ import annotations

import importlib.abc
import sys
from typing import Any

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_kept: list[Any] = []


class _Declares(importlib.abc.MetaPathFinder):
    """Finds no module; declares the ops when torchvision is looked for."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            library: Any = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
            for op in ("nms", "qnms"):
                library.define(op + _SCHEMA)
            _kept.append(library)  # the ops are declared as long as it lives


sys.meta_path.insert(0, _Declares())
