"""`rlbridge env remove`: the directories of an environment, of this driver and of any other."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from rlbridge.env.location import directories, root
from rlbridge.env.turn import turn
from rlbridge.errors import BuildError

_GOING = ".going-"


def remove(name: str) -> list[Path]:
    """Remove every directory of the environment of that name, and return them.

    Raises:
        BuildError: one is being built, or cannot be removed.
    """

    def refuse() -> None:
        raise BuildError(
            f"the environment {name!r} is being built by another process", todo="wait for it to end, or end it, and try again"
        )

    removed = [path for other, path in directories() if other == name]
    for path in removed:
        with turn(path, refuse):
            # Renamed first: what an interrupted removal leaves is no environment, not even an unfinished one.
            going = path.with_name(f"{_GOING}{path.name}-{os.getpid()}")
            try:
                path.rename(going)
                shutil.rmtree(going)
            except OSError as error:
                raise BuildError(f"the environment {name!r} cannot be removed: {error}") from error
    _sweep()
    return removed


def _sweep() -> None:
    """What a removal left that was interrupted."""
    for path in root().glob(f"{_GOING}*") if root().is_dir() else ():
        shutil.rmtree(path, ignore_errors=True)
