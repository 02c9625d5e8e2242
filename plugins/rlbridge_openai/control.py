"""The engine's side of the control in a server: facts, ranks, pauses, caches and versions."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from rlbridge.errors import RlbridgeError
from rlbridge.roles.generator import PauseMode
from rlbridge.sync.messages import Nothing, longest_wait, pack, result
from rlbridge_openai.client import Client, Reply
from rlbridge_openai.messages import ROUTE, Facts, Open, Opened

T = TypeVar("T")

_SLACK_SECONDS = 5.0
"""The server is given so much longer than it gives itself: its own error says more."""


class ServerControl:
    """One server's control.

    Args:
        client: The server.
        seconds: Longest that a call may take.
    """

    def __init__(self, client: Client, seconds: float) -> None:
        self._client, self._seconds = client, seconds

    def facts(self) -> Facts | Reply:
        """What the server is, or what it answered where it has no such control."""
        reply = self._client.ask("POST", f"{ROUTE}/facts", self._seconds, content=b"", repeat=True)
        if reply.status in (404, 405):
            return reply
        return self._result(reply, Facts, "facts")

    def open(self, engine: str, install: str) -> list[str]:
        """Put subscribers over the parameters; how each rank takes weights.

        Raises:
            LayoutError: `install` is direct, and a tensor cannot be copied.
        """
        opened = self._call("open", Opened, content=pack(Open(engine, install)))
        self._client.instance = opened.instance
        return [how for _, _, how in (result(reply, tuple[int, int, str]) for reply in opened.ranks)]

    def ranks(self, method: str, payload: bytes) -> list[bytes]:
        """`Subscriber.handle` in every rank."""
        return self._call(f"ranks/{method}", list[bytes], content=payload, besides=longest_wait(method, payload))

    def pause(self, mode: PauseMode) -> None:
        """Stop making tokens."""
        self._call("pause", Nothing, mode=mode)

    def resume(self) -> None:
        """Go on."""
        self._call("resume", Nothing)

    def drop_caches(self) -> bool:
        """Forget all keys and values. Whether that was done."""
        return self._call("drop_caches", bool)

    def set_version(self, version: int) -> None:
        """Stamp tokens with it from now on."""
        self._call("version", Nothing, version=str(version))

    def score_at(self, temperature: float | None) -> None:
        """Let a vLLM score prompts at that temperature; None: no more."""
        self._call("score_at", Nothing, temperature="" if temperature is None else repr(temperature))

    def _call(self, call: str, kind: type[T], *, content: bytes = b"", besides: float = 0.0, **query: str) -> T:
        params = {"seconds": repr(self._seconds), **query}
        path = f"{ROUTE}/{call}"
        seconds = self._seconds + besides + _SLACK_SECONDS
        reply = self._client.ask("POST", path, seconds, content=content, params=params, repeat=False)
        return self._result(reply, kind, call)

    def _result(self, reply: Reply, kind: type[T], call: str) -> T:
        try:
            return result(reply.content, kind)
        except RlbridgeError as error:
            raise error.at(role="generator", rank=self._client.engine) from None
        except msgspec.DecodeError as error:
            raise self._client.malformed(f"{ROUTE}/{call}", f"{reply.status}, {error}; it begins {reply.text!r}") from None
