"""Where the workers of an epoch leave messages for one another: a Ray actor that holds bytes, and waits with them.

verl calls its workers, and they cannot call each other. What is left here is msgspec messages; the weights never come by.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import msgspec
import ray

from rlbridge.errors import DeadlineError, PeerLostError, RlbridgeError, WireError, from_wire, to_wire

T = TypeVar("T")

SETUP = 0
"""The turn of what is said once an epoch; the syncs of the epoch are its turns from 1 on."""

_LATE_SECONDS = 5.0
"""How long the actor may take beyond the time that it is told to wait."""


class Answer(msgspec.Struct, frozen=True):
    """What was found of the keys asked for, and the failure that ended the epoch, if one has."""

    found: dict[str, bytes]
    failure: bytes = b""


class Meeting:
    """The actor. A failure that anybody reports is everybody's answer from then on."""

    def __init__(self) -> None:
        self._left: dict[tuple[int, str], bytes] = {}
        self._failure = b""
        self._changed = asyncio.Condition()

    async def put(self, turn: int, name: str, message: bytes) -> None:
        """Leave a message. What was left for earlier syncs is forgotten."""
        async with self._changed:
            self._left = {key: value for key, value in self._left.items() if key[0] == SETUP or key[0] >= turn}
            self._left[turn, name] = message
            self._changed.notify_all()

    async def get(self, turn: int, names: list[str], seconds: float) -> bytes:
        """An `Answer` with the messages of those names, once all are there, or what is there after `seconds`."""

        def ready() -> bool:
            return bool(self._failure) or all((turn, name) in self._left for name in names)

        async with self._changed:
            with contextlib.suppress(TimeoutError):  # what is missing is missing in the answer
                await asyncio.wait_for(self._changed.wait_for(ready), seconds)
            found = {name: self._left[turn, name] for name in names if (turn, name) in self._left}
            return msgspec.msgpack.encode(Answer(found, self._failure))

    async def fail(self, failure: bytes) -> None:
        """End the epoch for all; the first failure stays."""
        async with self._changed:
            self._failure = self._failure or failure
            self._changed.notify_all()


class Correspondent:
    """One worker's side of the meeting; `name` is "trainer[0]" or "rollout[3]"."""

    def __init__(self, meeting: Any, name: str) -> None:
        self.name = name
        self._meeting = meeting

    def put(self, turn: int, name: str, message: object) -> None:
        """Leave a message. Nothing is waited for: that it cannot be left, the next `get` says."""
        self._meeting.put.remote(turn, name, msgspec.msgpack.encode(message))

    async def get(self, turn: int, names: Mapping[str, str], kind: type[T], limit: float, phase: str) -> list[T]:
        """The messages of those names, in order; each is mapped to the peer that leaves it.

        Raises:
            DeadlineError: they were not all there at `limit`, in the seconds of time.monotonic; names the peers.
            RlbridgeError: what another worker has failed with.
        """
        seconds = max(limit - time.monotonic(), 0.0)
        raw = await self._called(self._meeting.get.remote(turn, list(names), seconds), seconds + _LATE_SECONDS)
        answer = msgspec.msgpack.decode(raw, type=Answer)
        if answer.failure:
            raise from_wire(msgspec.msgpack.decode(answer.failure, type=WireError))
        missing = [peer for name, peer in names.items() if name not in answer.found]
        if missing:
            raise DeadlineError(
                f"{', '.join(missing)} did not get through {phase} in time",
                rank=self.name,
                peer=missing[0],
                phase=phase,
                todo="is it alive, and busy with something else? deadline_seconds and setup_seconds say how long is waited",
            )
        return [msgspec.msgpack.decode(answer.found[name], type=kind) for name in names]

    def fail(self, error: BaseException) -> None:
        """Tell the others, who would wait for what does not come. Nothing is waited for."""
        if isinstance(error, RlbridgeError):
            error.at(rank=self.name)
        told = to_wire(error)
        place = told.where if isinstance(error, RlbridgeError) else {"rank": self.name}
        self._meeting.fail.remote(msgspec.msgpack.encode(msgspec.structs.replace(told, where=place)))

    async def _called(self, reference: Any, seconds: float) -> Any:
        try:
            return await asyncio.wait_for(asyncio.wrap_future(reference.future()), seconds)
        except TimeoutError as error:
            raise DeadlineError(
                f"the meeting place of this epoch did not answer within {seconds:.0f} s", rank=self.name
            ) from error
        except ray.exceptions.RayError as error:
            raise PeerLostError(
                f"the meeting place of this epoch is gone: {str(error).splitlines()[0]}", rank=self.name, peer="the driver"
            ) from error


def names_of(side: str, count: int) -> Sequence[str]:
    """The names of verl's workers on a side, "trainer" or "rollout"."""
    return [f"{side}[{index}]" for index in range(count)]
