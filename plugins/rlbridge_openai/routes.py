"""The control's routes in a server's own application: behind the server's key, for no stranger where it asks for none."""

from __future__ import annotations

import ipaddress
import os
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from rlbridge.errors import ConfigError, PeerLostError, to_wire
from rlbridge.sync.messages import Failed, Ok, pack
from rlbridge_openai.messages import INSTANCE_HEADER, ROUTE

INSECURE_VARIABLE = "RLBRIDGE_INSECURE"
"""1: hosts other than this one are answered without a key, too."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]
Answer = Callable[[str, str, dict[str, str], bytes], Awaitable[object]]
"""Answers (call, method of the ranks, query, body)."""


class Session:
    """What the server holds since it was started, or opened, by a name that no other time has."""

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> str:
        """Another name: whoever knows the old one is refused from now on."""
        self.name = secrets.token_hex(8)
        return self.name

    def check(self, told: str | None) -> None:
        """Refuse who knows another name. `told`: None where none is known.

        Raises:
            PeerLostError: that is so.
        """
        if told is not None and told != self.name:
            raise PeerLostError(
                "another run has opened this server", role="generator", todo="a server is for one run at a time"
            )


def naming(send: Send, session: Session) -> Send:
    """`send`, with the session's name in the head of each answer."""

    async def named(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), (INSTANCE_HEADER.encode(), session.name.encode())]
        await send(message)

    return named


def add_routes(app: Any, session: Session, answer: Answer, has_key: Callable[[], bool], todo: str) -> None:
    """Put the control's routes into a Starlette application.

    Args:
        app: The application.
        session: Whose callers are answered.
        answer: Answers a call.
        has_key: Whether the server asks for a key.
        todo: How it is started with one.
    """
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    async def handle(request: Request) -> Response:
        """An answer of ours, or an error of ours: both as bytes."""
        try:
            check_stranger(request.client.host if request.client else None, has_key(), todo)
            session.check(request.headers.get(INSTANCE_HEADER))
            path = request.path_params
            found = await answer(
                path.get("call", "ranks"), path.get("method", ""), dict(request.query_params), await request.body()
            )
            reply = pack(Ok(pack(found)))
        except Exception as error:
            reply = pack(Failed(to_wire(error)))
        return Response(reply, media_type="application/octet-stream")

    # The first: a server may have a route that takes every path.
    app.router.routes.insert(0, Route(f"{ROUTE}/{{call}}", handle, methods=["POST"]))
    app.router.routes.insert(0, Route(f"{ROUTE}/ranks/{{method}}", handle, methods=["POST"]))


def check_stranger(host: str | None, has_key: bool, todo: str) -> None:
    """Answer nobody on another host where the server asks for no key: these calls read and change weights.

    Raises:
        ConfigError: that is so.
    """
    if host is None or has_key or os.environ.get(INSECURE_VARIABLE) == "1" or ipaddress.ip_address(host).is_loopback:
        return
    raise ConfigError(
        "the server asks for no key: whoever reaches it could change its weights",
        role="generator",
        todo=f"{todo} ({INSECURE_VARIABLE}=1 in its environment allows it without)",
    )
