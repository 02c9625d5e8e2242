"""Calls of the driver to the parties of a sync: all at once, and every wait with an end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, Protocol

from rlbridge.errors import DeadlineError, DigestError, PeerLostError, RlbridgeError
from rlbridge.sync.messages import result

GRACE_SECONDS = 0.5
"""After one party has failed the others get so long to fail too: one of them may know the reason."""


class Party(Protocol):
    """How the driver reaches a trainer rank or an engine. A call that finds the process gone fails with PeerLostError."""

    name: str

    def call(self, method: str, payload: bytes, tensors: dict[str, Any] | None = None) -> Future[list[bytes]]:
        """Call `handle`; the replies, one a rank. `tensors` are references that Ray resolves on the way."""

    def tensors(self, version: int, slot: int, sink: str, tensor_transport: str | None) -> Any:
        """A reference to what a transport that moves Ray objects sends to `sink`."""

    @property
    def actor(self) -> Any:
        """The Ray actor, where there is one."""


def gather(
    parties: Sequence[Party],
    futures: Sequence[Future[list[bytes]]],
    kinds: Sequence[type[Any]],
    phase: str,
    limit: float,
    version: int | None = None,
    *,
    grace: float | None = GRACE_SECONDS,
) -> list[list[Any]]:
    """The replies of every party, in order, or the error that says most about why there are not as many.

    A party that fails is not waited past: the others get `grace` seconds more (None: until the limit), since one that waits
    for a peer that is gone would use up the whole deadline.

    Raises:
        RlbridgeError: what a party answered, with its name, the version and the phase.
        DeadlineError: some did not answer before `limit`, in the seconds of `time.monotonic`; they are named.
    """
    replies: list[list[Any]] = [[] for _ in futures]
    errors: list[RlbridgeError] = []
    waiting = {future: index for index, future in enumerate(futures)}
    while waiting:
        done = wait(waiting, timeout=max(limit - time.monotonic(), 0.0), return_when=FIRST_COMPLETED).done
        if not done:
            break
        for future in done:
            index = waiting.pop(future)
            try:
                replies[index] = [result(reply, kinds[index]) for reply in future.result()]
            except RlbridgeError as error:
                errors.append(error.at(peer=parties[index].name, version=version, phase=phase))
                if grace is not None:
                    limit = min(limit, time.monotonic() + grace)
    if errors:
        raise _worst(errors)
    if waiting:
        limited_by = "cluster.start_seconds" if version is None else "sync.deadline_seconds"  # without a version: an attach
        late = [parties[index].name for index in waiting.values()]
        raise DeadlineError(
            f"{', '.join(late)} did not answer in time",
            peer=late[0],
            version=version,
            phase=phase,
            todo=f"is its process stopped or overloaded? the limit is {limited_by}",
        )
    return replies


def _worst(errors: Sequence[RlbridgeError]) -> RlbridgeError:
    """The error to raise of several: a lost peer explains the others' deadlines."""
    for kind in (PeerLostError, DigestError):
        for error in errors:
            if isinstance(error, kind):
                return error
    specific = [e for e in errors if not isinstance(e, DeadlineError)]
    return (specific or errors)[0]
