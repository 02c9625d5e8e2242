"""A fault at a chosen moment: before, during or after a call of the session to one of its parties."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, Literal

from rlbridge.sync.calls import Party
from rlbridge.sync.session import SyncSession

Moment = Literal["before", "during", "after"]


class _StandIn:
    """A `Party` that is another one, but for its calls."""

    def __init__(self, party: Party) -> None:
        self.name = party.name
        self._party = party

    @property
    def actor(self) -> Any:
        """The party's."""
        return self._party.actor

    def tensors(self, version: int, slot: int, sink: str, tensor_transport: str | None) -> Any:
        """The party's."""
        return self._party.tensors(version, slot, sink, tensor_transport)


class Tripwire(_StandIn):
    """A `Party` that is another one, but for what happens at its first call of `method`.

    Args:
        party: The party that it stands for.
        method: The call of the protocol that it waits for.
        moment: "before" the call is sent, "during" it, "after" its answer, which the session then has not seen yet.
        act: What happens.
        seconds: "during": how long after the sending.
    """

    def __init__(self, party: Party, method: str, moment: Moment, act: Callable[[], None], seconds: float = 0.0) -> None:
        super().__init__(party)
        self.tripped = threading.Event()
        self._method, self._moment, self._act, self._seconds = method, moment, act, seconds
        self._ready = True

    def call(self, method: str, payload: bytes, tensors: dict[str, Any] | None = None) -> Future[list[bytes]]:
        """The party's, and the fault."""
        if method != self._method or not self._ready:
            return self._party.call(method, payload, tensors)
        self._ready = False
        if self._moment == "before":
            self._trip()
        future = self._party.call(method, payload, tensors)
        if self._moment == "during":
            threading.Thread(target=self._later, name="rlbridge-fault", daemon=True).start()
        return _after(future, self._trip) if self._moment == "after" else future

    def _later(self) -> None:
        time.sleep(self._seconds)
        self._trip()

    def _trip(self) -> None:
        try:
            self._act()
        finally:
            self.tripped.set()


class Deaf(_StandIn):
    """A `Party` whose first call of `method`, or the answer to it, is lost on the way."""

    def __init__(self, party: Party, method: str, lost: Literal["call", "answer"]) -> None:
        super().__init__(party)
        self._method, self._lost = method, lost
        self._ready = True

    def call(self, method: str, payload: bytes, tensors: dict[str, Any] | None = None) -> Future[list[bytes]]:
        """The party's, or silence."""
        if method != self._method or not self._ready:
            return self._party.call(method, payload, tensors)
        self._ready = False
        if self._lost == "answer":
            self._party.call(method, payload, tensors)
        return Future()


@contextmanager
def in_place_of(session: SyncSession, party: Tripwire | Deaf) -> Iterator[None]:
    """Let the session reach the party of that name through `party`."""
    for parties in (session.trainers, session.engines):
        for index, old in enumerate(parties):
            if old.name == party.name:
                parties[index] = party
                try:
                    yield
                finally:
                    parties[index] = old
                return
    raise KeyError(party.name)


def _after(inner: Future[list[bytes]], act: Callable[[], None]) -> Future[list[bytes]]:
    outer: Future[list[bytes]] = Future()

    def done(finished: Future[list[bytes]]) -> None:
        act()
        error = finished.exception()
        if error is None:
            outer.set_result(finished.result())
        else:
            outer.set_exception(error)

    inner.add_done_callback(done)
    return outer
