"""What there is of each environment."""

from __future__ import annotations

import contextlib
import enum
import os
from dataclasses import dataclass
from pathlib import Path

from rlbridge.env.brought import wanted
from rlbridge.env.location import directories, directory
from rlbridge.env.stamp import read_stamp
from rlbridge.environment import Environment
from rlbridge.errors import PluginError
from rlbridge.plugins import registry


class State(enum.StrEnum):
    """What there is of an environment."""

    BUILT = "built"
    NOT_BUILT = "not built"
    UNFINISHED = "unfinished"
    """its build was interrupted, or goes on at this moment"""
    OUTDATED = "outdated"
    """built for another lock, Python, Ray or rlbridge, or with other plugins"""
    NO_LOCK = "no lock"
    """its plugin declares it, and ships no lock"""


WHY = {
    State.NOT_BUILT: "is not built",
    State.UNFINISHED: "is unfinished: its build was interrupted, or goes on at this moment",
    State.OUTDATED: "is built for another lock, Python, Ray or rlbridge, or with other plugins",
    State.NO_LOCK: "has no lock",
}


@dataclass(frozen=True)
class Found:
    """An environment, or a directory of one; `path` is None where there is none."""

    name: str
    state: State
    path: Path | None
    summary: str = ""
    backends: tuple[str, ...] = ()
    distribution: str = ""
    built: str = ""

    @property
    def bytes(self) -> int:
        """What its files take on the disk; those that other environments and uv's cache share with it count too."""
        return _size(self.path) if self.path else 0


def state_of(environment: Environment) -> State:
    """What there is of it for this driver."""
    try:
        prefix = directory(environment)
    except PluginError:
        return State.NO_LOCK
    if not prefix.is_dir():
        others = (path for name, path in directories() if name == environment.name)
        return State.OUTDATED if any(read_stamp(path) for path in others) else State.NOT_BUILT
    stamp = read_stamp(prefix)
    if stamp is None:
        return State.UNFINISHED
    return State.BUILT if wanted(environment.distribution).items() <= stamp.brought.items() else State.OUTDATED


def found() -> list[Found]:
    """Every environment that a plugin declares, and every further directory of one: of another driver, or of a plugin gone."""
    rows, current = [], set()
    for environment in registry().environments():
        state = state_of(environment)
        prefix = None if state is State.NO_LOCK else directory(environment)
        there = prefix if prefix and prefix.is_dir() else None
        stamp = read_stamp(there) if there else None
        if there is None and state is State.OUTDATED:
            state = State.NOT_BUILT  # the directory that is outdated has a row of its own
        current.add(prefix)
        rows.append(
            Found(
                environment.name,
                state,
                there,
                environment.summary,
                _backends(environment.name),
                environment.distribution,
                stamp.built if stamp else "",
            )
        )
    for name, path in directories():
        if path not in current:
            stamp = read_stamp(path)
            state = State.OUTDATED if stamp else State.UNFINISHED
            built = stamp.built if stamp else ""
            rows.append(Found(name, state, path, "of another lock, Python, Ray or rlbridge", built=built))
    return sorted(rows, key=lambda row: row.name)


def _backends(name: str) -> tuple[str, ...]:
    rows = registry().listing()
    return tuple(f"{row.role} {row.name}" for row in rows if name in row.environments)


def _size(path: Path) -> int:
    seen: dict[tuple[int, int], int] = {}
    for folder, _, files in os.walk(path):
        for file in files:
            with contextlib.suppress(FileNotFoundError):  # it may be built, or removed, at this moment
                entry = os.lstat(Path(folder, file))
                seen[(entry.st_dev, entry.st_ino)] = entry.st_blocks * 512
    return sum(seen.values())
