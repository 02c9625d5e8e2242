"""What has to hold while and after a sync is disturbed: it ends, nothing torn is served, the next one recovers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import AbstractContextManager
from typing import Any

import torch

from rlbridge.errors import DeadlineError, DirtyError, RlbridgeError, SyncError, TransportError
from rlbridge_conformance.checks import Mismatch, expect, holds
from rlbridge_conformance.members import Member
from rlbridge_conformance.oracle import compare
from rlbridge_conformance.stage import Stage

LIMIT_SECONDS = 20.0
"""When a disturbed sync counts as hanging: many times its deadlines."""

_SHORT = {"deadline_seconds": 0.6, "late_seconds": 0.3, "setup_seconds": 0.9}
"""Deadlines of the sync that is disturbed: a stopped process uses them up."""

PATIENCE = (1.0, 6.0)
"""Times those deadlines. A case is tried again with the second where the first was too short for who was not disturbed."""

Saved = Mapping[str, torch.Tensor]


def serving(stage: Stage) -> Saved:
    """A version that every engine serves, and its weights."""
    stage.train()
    stage.sync()
    return stage.saved()


def attempt(call: Callable[[], Any]) -> RlbridgeError | None:
    """The error of ours that a call ends in; one that does not end is a failure of its own."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="rlbridge-attempt")
    future = pool.submit(call)
    pool.shutdown(wait=False)
    try:
        future.result(LIMIT_SECONDS)
    except FutureTimeoutError:
        raise Mismatch("a sync that is disturbed ends", f"an error, within {LIMIT_SECONDS:.0f} s", "it goes on") from None
    except RlbridgeError as error:
        return error
    return None


def named(error: RlbridgeError, *names: str) -> None:
    """Hold an error to be one of a sync, and to name one of the peers."""
    holds(isinstance(error, (SyncError, TransportError)), "the error is one of a sync", "SyncError", repr(error))
    holds(any(name in str(error) for name in names), "the error names the peer", " or ".join(names), str(error))


def too_short(error: RlbridgeError | None, name: str, patience: float) -> bool:
    """Whether a deadline was over for others than `name`: on a busy machine that says nothing, the first time."""
    return patience == PATIENCE[0] and isinstance(error, DeadlineError) and name not in str(error)


def whole(stage: Stage, engines: list[Member], *versions: Saved) -> None:
    """Each engine serves one of the versions, every byte of it, or refuses to serve."""
    for engine in engines:
        index = stage.engines.index(engine)
        if _settled(stage, index) != "ready":
            error = attempt(lambda index=index: stage.generate([[5, 6, 7]], index))  # type: ignore[misc]
            holds(isinstance(error, DirtyError), f"{engine.name}, which is not ready, refuses to serve", "DirtyError", error)
            continue
        boxes = stage.served(index)
        if not any(_is(saved, engine.name, boxes) for saved in versions):
            raise Mismatch(f"{engine.name} serves one version, all of it", "the old one or the new one", "a mixture")


def _settled(stage: Stage, engine: int) -> str:
    """The state of an engine that is not in the middle of an update: one that goes on after a stop may end it first."""
    limit = time.monotonic() + LIMIT_SECONDS
    while (state := stage.state(engine).state) == "updating" and time.monotonic() < limit:
        time.sleep(0.005)
    return state


def _is(saved: Saved, engine: str, boxes: Any) -> bool:
    try:
        compare(saved, engine, boxes)
    except Mismatch:
        return False
    return True


def recovers(stage: Stage) -> None:
    """The next sync brings the trainers' weights to every engine, whole."""
    stage.train()
    stage.sync()
    stage.holds(stage.saved())
    expect("every engine is ready", ["ready"] * len(stage.engines), [stage.state(i).state for i in range(len(stage.engines))])


def has_ranks_inside(count: int) -> None:
    """Hold an engine to its claim that its ranks live in its own process.

    Raises:
        Mismatch: none of them does.
    """
    holds(count > 0, "the generator claims ranks_inside: its ranks live in its own process", "a rank or more", count)


def short(stage: Stage, patience: float = PATIENCE[0]) -> AbstractContextManager[None]:
    """Short deadlines for the syncs within."""
    return stage.syncing(**{name: seconds * patience for name, seconds in _SHORT.items()})
