"""Objects named as "module:attribute": looked for without importing anything, and imported on demand."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Sequence
from importlib.machinery import PathFinder
from typing import Any

from rlbridge.errors import PluginError

_TARGET = re.compile(r"[^\W\d][\w.]*:[^\W\d]\w*")


def is_target(text: str) -> bool:
    """Whether `text` has the form "module:attribute"."""
    return _TARGET.fullmatch(text) is not None


def missing_module(name: str, path: Sequence[str] | None = None) -> str | None:
    """The outermost part of the dotted `name` that is not installed, or None. Imports nothing, not even parent packages.

    A folder of that name without an `__init__.py` is no installed module: a checkout or a report of the same name lies in
    many a current directory.

    Args:
        path: Folders to look in, in place of this interpreter's.
    """
    if path is None and name in sys.modules:
        return None
    top, *parts = name.split(".")
    spec = importlib.util.find_spec(top) if path is None else PathFinder.find_spec(top, path)
    dotted = top
    for part in parts:
        if spec is None:
            break
        dotted = f"{dotted}.{part}"
        # By its last name: for a dotted one a folder without an `__init__.py` would ask for its parents' modules.
        spec = PathFinder.find_spec(part, list(spec.submodule_search_locations or ()))
    return dotted if spec is None or spec.origin is None else None


def import_target(target: str, what: str, todo: str = "") -> Any:
    """The object that "module:attribute" names. `what` names it to a reader of the error, `todo` says how to get it.

    Raises:
        PluginError: the module cannot be imported, or has no such attribute.
    """
    module_name, _, attribute = target.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if module_name == missing or module_name.startswith(f"{missing}."):
            raise PluginError(f"{what} is not installed: no module named {missing!r}", todo=todo) from error
        raise PluginError(f"{what} cannot be imported: {module_name} needs {missing!r}, which is not installed") from error
    # A framework's import can fail in any way: a missing shared library, a version check of its own, a driver.
    except Exception as error:
        raise PluginError(
            f"{what} cannot be imported from {module_name}: {type(error).__name__}: {error}", todo=todo
        ) from error
    if not hasattr(module, attribute):
        raise PluginError(f"{what} cannot be imported: {module_name} has no {attribute!r}")
    return getattr(module, attribute)


def install_hint(requirement: str) -> str:
    """The pip command for an extra of rlbridge, or for any other requirement; empty for none."""
    if not requirement:
        return ""
    return f"pip install 'rlbridge[{requirement}]'" if requirement in extras() else f"pip install '{requirement}'"


@functools.cache
def extras() -> frozenset[str]:
    """The extras of the installed rlbridge."""
    return frozenset(importlib.metadata.metadata("rlbridge").get_all("Provides-Extra") or ())


@functools.cache
def distribution_version(distribution: str) -> str:
    """The installed version of a distribution; empty where it is not installed, or has no name."""
    if not distribution:
        return ""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""
