"""Drift guards: the functions of a framework that a plugin calls, and the parameters that it calls them with."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rlbridge.errors import PluginError
from rlbridge.importing import distribution_version

_OPEN = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@dataclass(frozen=True)
class Seam:
    """A function or class that a plugin stands on.

    Attributes:
        target: "module:attribute.attribute", for example "verl.workers.engine:BaseEngine.train_batch".
        parameters: Names of the parameters that the plugin gives, in their order; `self` counts. None: it need only be there.
    """

    target: str
    parameters: tuple[str, ...] | None = None


def check_seams(distribution: str, tested: str, seams: Sequence[Seam]) -> None:
    """Hold a framework to what its plugin was written for, before a call fails somewhere within it.

    Args:
        distribution: The framework's, whose version the error names.
        tested: Requirement of the versions that the plugin was tested with.
        seams: Everything that the plugin calls.

    Raises:
        PluginError: names each function that is gone or that takes other parameters.
    """
    changes = [change for seam in seams if (change := _change(seam))]
    if changes:
        raise PluginError(
            f"{distribution} {distribution_version(distribution)} is not what its plugin was written for: {'; '.join(changes)}",
            todo=f"pip install '{tested}', or a newer rlbridge",
        )


def _change(seam: Seam) -> str:
    module, _, path = seam.target.partition(":")
    try:
        found: Any = functools.reduce(getattr, path.split("."), importlib.import_module(module))
    except Exception as error:  # an import runs a stranger's code
        return f"{path} of {module} is gone ({type(error).__name__}: {error})"
    if seam.parameters is None:
        return ""
    signature = inspect.signature(found)
    if not _accepts(signature, seam.parameters):
        return f"{path} takes {signature}, and was called with ({', '.join(seam.parameters)})"
    return ""


def _accepts(signature: inspect.Signature, wanted: Sequence[str]) -> bool:
    """Whether the wanted parameters are there in their order, and nothing else has to be given."""
    named = [p for p in signature.parameters.values() if p.kind not in _OPEN]
    keyword_only = {p.name for p in named if p.kind is inspect.Parameter.KEYWORD_ONLY}
    positional = [p.name for p in named if p.name in wanted and p.name not in keyword_only]
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.parameters.values())
    known = positional == [name for name in wanted if name in positional] and all(
        name in positional or name in keyword_only or takes_any for name in wanted
    )
    return known and not list(_required(named, wanted))


def _required(named: Sequence[inspect.Parameter], wanted: Sequence[str]) -> Iterator[str]:
    return (p.name for p in named if p.default is inspect.Parameter.empty and p.name not in wanted)
