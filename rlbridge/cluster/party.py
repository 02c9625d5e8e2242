"""Ray actors as the session's parties; what Ray raises becomes our errors."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError

from rlbridge.errors import PeerLostError, RlbridgeError, SyncError


class ActorParty:
    """A trainer rank or an engine that is a Ray actor."""

    def __init__(self, name: str, actor: Any) -> None:
        self.name = name
        self._actor = actor

    @property
    def actor(self) -> Any:
        """The actor handle."""
        return self._actor

    def call(self, method: str, payload: bytes, tensors: dict[str, Any] | None = None) -> Future[list[bytes]]:
        """Call the actor's `call`."""
        if tensors:
            return self.future(self._actor.call.remote(method, payload, list(tensors), *tensors.values()))
        if self.name.startswith("generator"):
            return self.future(self._actor.call.remote(method, payload, []))
        return self.future(self._actor.call.remote(method, payload))

    def tensors(self, version: int, slot: int, sink: str, tensor_transport: str | None) -> Any:
        """A reference to what the trainer sends to `sink`."""
        method = self._actor.tensors
        if tensor_transport is not None:
            method = method.options(tensor_transport=tensor_transport)
        return method.remote(version, slot, sink)

    def future(self, ref: Any) -> Future[Any]:
        """The value behind a reference; a process that is gone is PeerLostError."""
        return _translated(ref.future(), lambda error: translate(error, self.name))


def translate(error: BaseException, name: str) -> BaseException:
    """What Ray raised about `name`, as our error."""
    if isinstance(error, RlbridgeError):
        return error
    if isinstance(error, (ActorDiedError, ActorUnavailableError)):
        return PeerLostError(
            f"the process of {name} is gone: {_first_line(error)}",
            peer=name,
            todo="its log is in the Ray session directory; go on from the last checkpoint with rlbridge run --resume",
        )
    if isinstance(error, (RayError, ray.exceptions.RayTaskError)):
        return SyncError(f"{name} failed: {_first_line(error)}", peer=name)
    return error


def _translated(inner: Future[Any], change: Callable[[BaseException], BaseException]) -> Future[Any]:
    outer: Future[Any] = Future()

    def done(finished: Future[Any]) -> None:
        error = finished.exception()
        if error is None:
            outer.set_result(finished.result())
        else:
            outer.set_exception(change(error))

    inner.add_done_callback(done)
    return outer


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (
        lines[-1][:300]
        if isinstance(error, ray.exceptions.RayTaskError) and lines
        else (lines or [type(error).__name__])[0][:300]
    )
