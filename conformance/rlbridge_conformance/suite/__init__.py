"""Every check of the suite: `from rlbridge_conformance.suite import *` is a third party's whole test file."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator


def _checks() -> Iterator[tuple[str, Callable[..., None]]]:
    """The checks that the modules of this package define; what they import is none."""
    for found in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{found.name}")
        for name, value in vars(module).items():
            if name.startswith("test_") and getattr(value, "__module__", None) == module.__name__:
                yield name, value


_found = dict(_checks())
globals().update(_found)
__all__ = list(_found)
