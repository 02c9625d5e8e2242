"""What a check of the suite says of itself: its level, whose contract it is, what it needs; and how it fails."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import pytest

from rlbridge.errors import RlbridgeError
from rlbridge_conformance.levels import Level, Role

MARK = "rlbridge_check"

F = TypeVar("F", bound=Callable[..., None])


@dataclass(frozen=True)
class Check:
    """What `check` was told.

    Attributes:
        level: The level that the check belongs to.
        role: Whose contract it holds; the other two roles are then the suite's own. None: the triple as a run would use it.
        needs: Claims without which it is skipped, as "role.property" of the requirements.
        machine: What this machine must have, or it is not run; see `rlbridge_conformance.faults.machine`.
        ray: It is about Ray: its parties are Ray actors whatever the level's are.
    """

    level: Level
    role: Role | None = None
    needs: tuple[str, ...] = ()
    machine: tuple[str, ...] = ()
    ray: bool = False


def check(
    level: Level, role: Role | None = None, *, needs: Iterable[str] = (), machine: Iterable[str] = (), ray: bool = False
) -> Callable[[F], F]:
    """Make a test function a check of the suite. Its name, without "test_", is what it is called in a report."""
    mark: Callable[[F], F] = getattr(pytest.mark, MARK)(Check(level, role, tuple(needs), tuple(machine), ray))
    return mark


def check_of(item: pytest.Item) -> Check | None:
    """The check that a test is; None for a test that is none of the suite's."""
    mark = item.get_closest_marker(MARK)
    return None if mark is None else mark.args[0]


class Mismatch(AssertionError):  # noqa: N818  (it is what is found, not a fault of the suite)
    """A backend does not do what its contract says.

    Args:
        what: What was looked at, as a sentence that should be true.
        expected: What should have been seen.
        got: What was seen.
    """

    def __init__(self, what: str, expected: object, got: object) -> None:
        self.what, self.expected, self.got = what, str(expected), str(got)
        super().__init__(f"{what}\n  expected: {expected}\n  got:      {got}")


def in_full(error: Mismatch | RlbridgeError) -> str:
    """What an error says, and the traceback of the backend's own exception where there is one."""
    origin = error.origin if isinstance(error, RlbridgeError) else ""
    return f"{error}\n{origin}" if origin else str(error)


def expect(what: str, expected: object, got: object) -> None:
    """Hold `got` to `expected`.

    Raises:
        Mismatch: they differ.
    """
    if expected != got:
        raise Mismatch(what, expected, got)


def holds(condition: bool, what: str, expected: object, got: object) -> None:
    """Hold a condition that is no equality; `expected` and `got` are its words.

    Raises:
        Mismatch: it is false.
    """
    if not condition:
        raise Mismatch(what, expected, got)
