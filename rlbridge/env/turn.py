"""One process at a time builds or removes an environment; the others wait their turn."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def turn(prefix: Path, wait: Callable[[], None]) -> Iterator[int]:
    """Hold the turn for the environment in a directory; `wait` is called where another process has it.

    Yields a file descriptor. A child that it is passed to holds the turn too: should this process be killed, nobody else writes
    into the directory until the child has ended. What holds a turn is the open file, so a dead process holds none.
    """
    turns = prefix.parent / ".turns"
    turns.mkdir(parents=True, exist_ok=True)
    with (turns / prefix.name).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()
