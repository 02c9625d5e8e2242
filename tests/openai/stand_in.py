"""A stand-in for a server: HTTP over a real socket, with answers that a test has chosen. It serves no model."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar, Self

from rlbridge.sync.messages import Nothing, answer
from rlbridge_openai.messages import INSTANCE_HEADER, ROUTE, Facts, Opened

FACTS = Facts("somewhere/model", "vLLM", "0.32.0", 64, 67, "float32", [1], ["completions"], dev_mode=False, missing=[])

Answer = tuple[int, Any] | tuple[int, Any, dict[str, str]]


class StandIn:
    """Answers as vLLM with rlbridge's control would. `routes` (path: function of the request) come first.

    A route that returns None closes the connection without an answer.

    Attributes:
        seen: (path, headers, body) of every request.
        most: Most requests that were under way at once.
    """

    def __init__(self) -> None:
        self.routes: dict[str, Callable[[Request], Answer | None]] = {}
        self.facts, self.instance = FACTS, "one"
        self.seen: list[Request] = []
        self.most = self._now = 0
        self._lock = threading.Lock()
        self._stopped = False

    def __enter__(self) -> Self:
        handler = type("Handler", (_Handler,), {"stand_in": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Listen no more, and answer nobody."""
        self._stopped = True
        self._server.shutdown()
        self._server.server_close()

    def of(self, path: str) -> list[Request]:
        """The requests to a path."""
        return [request for request in self.seen if request.path == path]

    def answer(self, request: Request) -> Answer | None:
        with self._lock:
            self.seen.append(request)
            self._now += 1
            self.most = max(self.most, self._now)
        try:
            if self._stopped:
                return None
            route = self.routes.get(request.path)
            return route(request) if route else self._usual(request)
        finally:
            with self._lock:
                self._now -= 1

    def _usual(self, request: Request) -> Answer:
        path = request.path
        if path == "/v1/models":
            return 200, {"data": [{"id": "served"}]}
        if path == "/v1/completions":
            return 200, completion([request.json()["prompt"][0] + 1] * request.json()["max_tokens"])
        if path.startswith(ROUTE):
            return 200, self._control(path.removeprefix(ROUTE))
        return 404, {"detail": "Not Found"}

    def _control(self, call: str) -> bytes:
        ranks = [answer(lambda: (1, 1, "direct"))]
        found: dict[str, object] = {"/facts": self.facts, "/open": Opened(self.instance, ranks), "/drop_caches": True}
        return answer(lambda: [b"rank 0"] if call.startswith("/ranks/") else found.get(call, Nothing()))


class Request:
    """What was asked."""

    def __init__(self, path: str, query: str, headers: dict[str, str], body: bytes) -> None:
        self.path, self.query, self.headers, self.body = path, query, headers, body

    def json(self) -> Any:
        return json.loads(self.body)


def completion(tokens: list[int], logprob: float = -0.5, reason: str = "length") -> dict[str, Any]:
    """An answer of /v1/completions."""
    told = {"token_logprobs": [logprob] * len(tokens), "tokens": [f"token_id:{t}" for t in tokens]}
    return {"choices": [{"token_ids": tokens, "logprobs": told, "finish_reason": reason}]}


def after(seconds: float, then: Answer) -> Callable[[Request], Answer]:
    """A route that takes its time."""

    def route(request: Request) -> Answer:
        time.sleep(seconds)
        return then

    return route


def first(times: int, this: Answer | None, then: Callable[[Request], Answer | None]) -> Callable[[Request], Answer | None]:
    """A route that answers `this` the first `times`."""
    left = [times]

    def route(request: Request) -> Answer | None:
        left[0] -= 1
        return this if left[0] >= 0 else then(request)

    return route


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    stand_in: ClassVar[StandIn]

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        length = int(self.headers.get("Content-Length", "0"))
        headers = {name.lower(): value for name, value in self.headers.items()}
        found = self.stand_in.answer(Request(path, query, headers, self.rfile.read(length)))
        if found is None:
            self.close_connection = True
            return
        status, body, more = found if len(found) == 3 else (*found, {})
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {INSTANCE_HEADER: self.stand_in.instance, "Content-Length": str(len(content)), **more}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_GET

    def log_message(self, *args: Any) -> None:
        """Nothing."""
