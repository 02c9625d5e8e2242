"""Which broken backends there are: what each does wrong, and the check that is meant for it."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

from pydantic import BaseModel

from rlbridge_conformance.levels import Level

Part = Literal["trainer", "generator", "transport", "publisher", "engine"]

C = TypeVar("C", bound=type)

_MODULES = ("trainers", "generators", "transports", "protocol", "triple", "faults", "rdma")
_found: list[Broken] = []


@dataclass(frozen=True)
class Broken:
    """A broken class.

    Attributes:
        name: Its backend's name: the class's, in words.
        role: What it is; "publisher" and "engine" are parts of the core's own protocol, between the suite's own backends.
        target: "module:Class". The class differs from its twin, the one it derives from, by one overridden method.
        replaces: The attribute of the twin's `Backend` that the class takes the place of.
        rule: What it does wrong, in one line.
        check: The id of the check that is meant for it, without the brackets of its cases.
        twin: The name of its twin's backend.
        ray: It only shows where the parties are Ray actors.
        machine: What its check must have of the machine, where not every one has it.
    """

    name: str
    role: Part
    target: str
    rule: str
    check: str
    replaces: Literal["load", "options"] = "load"
    twin: str = "reference"
    ray: bool = False
    machine: tuple[str, ...] = ()

    @property
    def level(self) -> Level:
        """The level of the check."""
        level: Level = self.check.partition(".")[0]  # type: ignore[assignment]
        return level


def broken(
    role: Part, *, check: str, twin: str = "reference", ray: bool = False, machine: tuple[str, ...] = ()
) -> Callable[[C], C]:
    """Enter a class in the catalogue; the first line of its docstring is its rule."""

    def enter(cls: C) -> C:
        name = re.sub(r"(?<!^)(?=[A-Z])", "-", cls.__name__).lower()
        rule = (cls.__doc__ or "").strip().splitlines()[0]
        replaces: Literal["load", "options"] = "options" if issubclass(cls, BaseModel) else "load"
        _found.append(Broken(name, role, f"{cls.__module__}:{cls.__name__}", rule, check, replaces, twin, ray, machine))
        return cls

    return enter


@functools.cache
def catalogue() -> tuple[Broken, ...]:
    """Every broken class, by role and name."""
    for module in _MODULES:
        importlib.import_module(f"rlbridge_conformance.broken.{module}")
    return tuple(sorted(_found, key=lambda b: (b.role, b.name)))
