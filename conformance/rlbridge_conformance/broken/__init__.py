"""Backends that are broken on purpose, one rule each: the proof that the suite can fail.

They are registered where `RLBRIDGE_PLUGINS` names this package, and nowhere else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import rlbridge_nixl
import rlbridge_ray
from rlbridge import Backend, hookimpl
from rlbridge_conformance import reference
from rlbridge_conformance.broken.catalogue import catalogue
from rlbridge_conformance.levels import Role

_TWINS = (reference, rlbridge_nixl, rlbridge_ray)


@hookimpl
def rlbridge_trainers() -> Sequence[Backend]:
    """Broken trainers."""
    return _backends("trainer")


@hookimpl
def rlbridge_generators() -> Sequence[Backend]:
    """Broken generators."""
    return _backends("generator")


@hookimpl
def rlbridge_transports() -> Sequence[Backend]:
    """Broken transports."""
    return _backends("transport")


def _backends(role: Role) -> list[Backend]:
    """Each is what its twin is, but for its class."""
    twins = {twin.name: twin for module in _TWINS for twin in getattr(module, f"rlbridge_{role}s", tuple)()}
    mine = [b for b in catalogue() if b.role == role]
    changes: list[dict[str, Any]] = [{"name": b.name, "summary": b.rule, b.replaces: b.target} for b in mine]
    return [dataclasses.replace(twins[b.twin], **change) for b, change in zip(mine, changes, strict=True)]
