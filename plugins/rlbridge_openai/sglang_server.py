"""An SGLang server with rlbridge's control in it: `python -m rlbridge_openai.sglang_server --model-path MODEL ...`.

Takes the arguments of `sglang.launch_server`, and is that server: with a subscriber in each rank, and routes under /v1/rlbridge
that carry the calls of a sync to them. SGLang's own routes take weights from disk, from a group of NCCL, or pickled; none of
them reaches the ranks' memory.
"""

from __future__ import annotations

import asyncio
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rlbridge.errors import RlbridgeError, SyncError
from rlbridge.importing import import_target
from rlbridge.sync.messages import Nothing, unpack
from rlbridge_openai.messages import Facts, Open, Opened
from rlbridge_openai.routes import App, Message, Receive, Send, Session, add_routes, naming

_WITH_KEY = "start it with --api-key"
_THREADS = 16
"""A session asks each engine a few things at once; one of them may wait for bytes."""


def main() -> int:
    """Run the server until it is ended."""
    serve = import_target("rlbridge_sglang.hosted:serve", "SGLang's part of the control")
    try:
        serve(sys.argv[1:], add_control)
    except RlbridgeError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


def add_control(app: Any, engine: Any) -> None:
    """Put the control of an engine into SGLang's application."""
    session = Session()
    app.add_middleware(_Named, session=session)
    add_routes(app, session, _Calls(session, engine).answer, engine.has_key, _WITH_KEY)


class _Named:
    """The middleware that names the session in each answer."""

    def __init__(self, app: App, session: Session) -> None:
        self._app, self._session = app, session

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, naming(send, self._session))


class _Calls:
    """What an engine may ask of its server."""

    def __init__(self, session: Session, engine: Any) -> None:
        self._session, self._engine = session, engine
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="rlbridge-control")

    async def answer(self, call: str, method: str, query: dict[str, str], body: bytes) -> object:
        loop = asyncio.get_running_loop()
        self._engine.begin(loop)
        return await loop.run_in_executor(self._threads, self._answer, call, method, query, body)

    def _answer(self, call: str, method: str, query: dict[str, str], body: bytes) -> object:
        match call:
            case "ranks":
                return self._engine.ranks(method, body)
            case "facts":
                return Facts(
                    **self._engine.facts(),
                    server="SGLang",
                    stop_ids=[],  # SGLang stops at them by itself
                    apis=["tokens"],
                    dev_mode=False,
                    missing=[],
                )
            case "open":
                name = self._session.renew()  # first: nobody else's call comes in between
                return Opened(name, self._engine.open(unpack(body, Open).engine, float(query["seconds"])))
            case "pause":
                self._engine.pause(query["mode"])
            case "resume":
                self._engine.resume()
            case "drop_caches":
                return self._engine.drop_caches()
            case "version":
                self._engine.set_version(int(query["version"]))
            case other:
                raise SyncError(f"the server has no call {other!r}: is its rlbridge another version?", role="generator")
        return Nothing()


if __name__ == "__main__":
    sys.exit(main())
