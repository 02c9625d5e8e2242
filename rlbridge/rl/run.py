"""A run as observers see it, and the directory that it writes into."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlbridge.errors import ConfigError


@dataclass
class Run:
    """One run.

    Attributes:
        name: Of the run and of its directory.
        directory: Where everything of the run is written.
        config: The validated config.
        steps: Optimizer steps that the run is to make, those before a resume included.
        resumed_step: The step after which the run goes on; 0 for a new run.
        started: When the command began, in the seconds of `time.monotonic`.
    """

    name: str
    directory: Path
    config: Any
    steps: int
    resumed_step: int = 0
    started: float = field(default_factory=time.monotonic)


def open_run(runs_dir: Path, name: str | None, stem: str) -> Path:
    """Make the directory of a new run: `name`, or else the first free one of stem, stem-2, stem-3 ...

    Two runs that start at once never get the same directory.

    Raises:
        ConfigError: a run called `name` exists, `name` is no plain directory name, or `runs_dir` cannot be made.
    """
    try:
        runs_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"the directory for runs cannot be made: {error}", todo="set another runs_dir") from error
    if name is not None:
        return _named(runs_dir, name)
    candidates = (runs_dir / (stem if number == 1 else f"{stem}-{number}") for number in itertools.count(1))
    return next(directory for directory in candidates if _claim(directory))


def check_name(runs_dir: Path, name: str | None) -> None:
    """Refuse a name that cannot be a new run's, before anything is started.

    Raises:
        ConfigError: a run called `name` exists.
    """
    if name is not None and (runs_dir / name).exists():
        raise _taken(runs_dir / name)


def _named(runs_dir: Path, name: str) -> Path:
    if name in ("", ".", "..") or Path(name).name != name:
        raise ConfigError(f"{name!r} is not a name for a run: it has to be a plain directory name", todo="set another name=...")
    directory = runs_dir / name
    if not _claim(directory):
        raise _taken(directory)
    return directory


def _taken(directory: Path) -> ConfigError:
    return ConfigError(
        f"{directory} exists already", todo=f"pick another name=..., or go on with it: rlbridge run --resume {directory}"
    )


def _claim(directory: Path) -> bool:
    try:
        directory.mkdir()
    except FileExistsError:
        return False
    return True
