"""Requests to one server: each ends by its deadline, is repeated while the server is away or overloaded, and tells no key."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx2
import msgspec
import tenacity

from rlbridge.errors import ConfigError, DataError, DeadlineError, PeerLostError, RlbridgeError
from rlbridge_openai.messages import INSTANCE_HEADER
from rlbridge_openai.secret import Secret

_CONNECT_SECONDS = 10.0
_KEEP_SECONDS = 2.0
"""Less than uvicorn keeps an idle connection (5 s): none is used at the moment at which the server closes it."""

_REPEATED = frozenset({408, 429, 500, 502, 503, 504})
_NOT_BEGUN = frozenset({429, 503})
"""A server that says so has not begun with the request: it may be sent again, whatever it asks for."""


@dataclass(frozen=True)
class Reply:
    """What a server answered that it was asked for, or that there is no such thing (404, 405)."""

    status: int
    content: bytes
    secret: Secret

    @property
    def text(self) -> str:
        """The beginning of the content, to be shown."""
        return self.secret.hide_in(self.content.decode(errors="replace"))

    def json(self) -> Any:
        """The content.

        Raises:
            ValueError: it is no JSON.
        """
        return msgspec.json.decode(self.content)


class GivenUpError(Exception):
    """A request failed, and whoever asked does not want it repeated."""


class _AgainError(Exception):
    """An attempt failed in a way that another one need not. `lost`: nobody answered."""

    def __init__(self, reason: str, *, lost: bool, after: float = 0.0) -> None:
        super().__init__(reason)
        self.reason, self.lost, self.after = reason, lost, after


@dataclass
class _Failing:
    """Since when a request has failed, one attempt after the other."""

    seconds: float
    deadline: float
    since: float | None = field(default=None)
    said: str = field(default="")

    def is_over(self, state: tenacity.RetryCallState) -> bool:
        now = time.monotonic()
        self.since = now if self.since is None else self.since
        error = state.outcome.exception() if state.outcome is not None else None
        if isinstance(error, _AgainError) and not error.lost:
            self.said = error.reason
        pause = state.upcoming_sleep
        return now + pause > min(self.since + self.seconds, self.deadline)


class Client:
    """One server as one engine reaches it. May be used from many threads.

    Args:
        url: Without /v1.
        secret: The server's key.
        engine: The engine's name in the session.
        connections: Most of them at once.
        retry_seconds: How long a server may fail in one go.
    """

    def __init__(self, url: str, secret: Secret, engine: str, *, connections: int, retry_seconds: float) -> None:
        self.url, self.engine = url, engine
        self.instance = ""
        self._secret, self._retry_seconds = secret, retry_seconds
        self._met = False
        limits = httpx2.Limits(
            max_connections=connections, max_keepalive_connections=connections, keepalive_expiry=_KEEP_SECONDS
        )
        # No proxies and no .netrc of the environment: the key goes to the server alone. Redirections are not followed, either.
        self._http = httpx2.Client(base_url=url, headers=secret.headers(), limits=limits, trust_env=False)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def get(self, path: str, seconds: float) -> Reply:
        """What is to be read there."""
        return self.ask("GET", path, seconds, repeat=True)

    def post(self, path: str, body: Mapping[str, Any], seconds: float, give_up: Callable[[], bool] = lambda: False) -> Reply:
        """The answer to a request that may be repeated. `give_up` is asked before it is.

        Raises:
            GivenUpError: it failed, and was to be given up then.
        """
        content = msgspec.json.encode(body)
        return self.ask("POST", path, seconds, content=content, kind="application/json", repeat=True, give_up=give_up)

    def ask(
        self,
        method: str,
        path: str,
        seconds: float,
        *,
        content: bytes | None = None,
        kind: str = "application/octet-stream",
        params: Mapping[str, str] | None = None,
        repeat: bool,
        give_up: Callable[[], bool] = lambda: False,
    ) -> Reply:
        """One request, with its repetitions.

        Args:
            method: As of HTTP.
            path: As of the url.
            seconds: Longest that it may take in all.
            content: What is sent.
            kind: Its media type.
            params: The query.
            repeat: Whether the server may be asked twice. A request that has certainly not been begun is repeated anyway.
            give_up: Asked before a repetition.

        Raises:
            ConfigError: nobody has answered yet, ever; or the server does not take the key.
            DataError: the server refuses the request.
            DeadlineError: there was no answer in time, or none but that it cannot now.
            PeerLostError: the server is gone, or another one has taken its place.
            GivenUpError: the request failed, and `give_up` said so.
        """
        failing = _Failing(self._retry_seconds, time.monotonic() + seconds)
        headers = {INSTANCE_HEADER: self.instance} if self.instance else {}
        if content is not None:
            headers["Content-Type"] = kind
        backoff = tenacity.wait_random_exponential(multiplier=0.2, max=5.0)
        problem: RlbridgeError
        try:
            for attempt in tenacity.Retrying(
                stop=failing.is_over,
                wait=lambda state: max(backoff(state), _asked_to_wait(state)),
                retry=tenacity.retry_if_exception(lambda error: isinstance(error, _AgainError) and not give_up()),
                reraise=True,
            ):
                with attempt:
                    reply = self._attempt(method, path, failing, repeat, content=content, params=params, headers=headers)
                    self._met = True
                    return reply
            raise AssertionError("a retry ends with an answer or an error")
        except _AgainError as error:
            if give_up():
                raise GivenUpError from None
            problem = self._failed(error, failing, path)
        except RlbridgeError as error:
            problem = error
        problem.__context__ = None  # the client library's error holds the request, and so the key
        raise problem

    def _attempt(self, method: str, path: str, failing: _Failing, repeat: bool, **request: Any) -> Reply:
        left = failing.deadline - time.monotonic()
        timeout = httpx2.Timeout(max(left, 0.001), connect=max(min(left, _CONNECT_SECONDS), 0.001))
        try:
            with self._http.stream(method, path, timeout=timeout, **request) as response:
                content = self._read(response, failing.deadline)
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            raise _AgainError(self._secret.hide_in(str(error)) or type(error).__name__, lost=True) from None
        except httpx2.TimeoutException:
            raise self._late(path) from None
        except httpx2.RequestError as error:
            reason = f"the connection broke ({type(error).__name__}: {self._secret.hide_in(str(error))})"
            if repeat:
                raise _AgainError(reason, lost=True) from None
            raise self._lost(reason) from None
        return self._judged(response, content, path, repeat=repeat)

    def _read(self, response: httpx2.Response, deadline: float) -> bytes:
        parts = []
        for part in response.iter_bytes():
            parts.append(part)
            if time.monotonic() > deadline:
                raise httpx2.ReadTimeout("the answer is still coming")
        return b"".join(parts)

    def _judged(self, response: httpx2.Response, content: bytes, path: str, *, repeat: bool) -> Reply:
        status = response.status_code
        reply = Reply(status, content, self._secret)
        where: dict[str, Any] = {"role": "generator", "rank": self.engine, "peer": self.url}
        if status in _REPEATED and (repeat or status in _NOT_BEGUN):
            raise _AgainError(f"{status}: {reply.text}", lost=False, after=_retry_after(response))
        if self.instance and response.headers.get(INSTANCE_HEADER) != self.instance:
            raise PeerLostError(
                "the server was started anew, or another run has opened it: it holds other weights than this engine has synced",
                todo="a server is for one run at a time; go on from the last checkpoint: rlbridge run --resume",
                **where,
            )
        if status in (401, 403):
            variable = self._secret.variable
            what = f"does not take the key in {variable}" if self._secret else f"asks for a key, and {variable} is not set"
            todo = f"put its key into {variable} where the engine's actor runs"
            raise ConfigError(f"the server {what}: it answered {status}: {reply.text}", todo=todo, **where)
        if status in (404, 405) or 200 <= status < 300:
            return reply
        if 400 <= status < 500:
            raise DataError(f"the server refuses a request to {path} with {status}: {reply.text}", **where)
        raise RlbridgeError(f"the server answered {status} to a request to {path}: {reply.text}", **where)

    def malformed(self, path: str, what: str) -> RlbridgeError:
        """The error of an answer that cannot be read."""
        return RlbridgeError(
            f"the server's answer to {path} cannot be used: {self._secret.hide_in(what)}",
            role="generator",
            rank=self.engine,
            peer=self.url,
            todo="is it a server with OpenAI's API?",
        )

    def _failed(self, error: _AgainError, failing: _Failing, path: str) -> RlbridgeError:
        if error.lost:
            return self._lost(error.reason + (f"; before, it answered {failing.said}" if failing.said else ""))
        return DeadlineError(
            f"the server has failed for {self._retry_seconds:g} s at {path}; at last it answered {error.reason}",
            role="generator",
            rank=self.engine,
            peer=self.url,
            todo="is it overloaded? the limits are generator.retry_seconds and generator.concurrency",
        )

    def _lost(self, reason: str) -> RlbridgeError:
        where = {"role": "generator", "rank": self.engine, "peer": self.url}
        if not self._met:
            return ConfigError(f"no server answers at {self.url}: {reason}", todo="is it up? is generator.url right?", **where)
        return PeerLostError(
            f"the server at {self.url}, which is {self.engine}, is gone: {reason}",
            todo="start it again and go on from the last checkpoint: rlbridge run --resume",
            **where,
        )

    def _late(self, path: str) -> DeadlineError:
        return DeadlineError(
            f"the server did not answer a request to {path} in time",
            role="generator",
            rank=self.engine,
            peer=self.url,
            todo="the limits are generator.request_seconds, and generator.answer_seconds for calls of a sync",
        )


def _asked_to_wait(state: tenacity.RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome is not None else None
    return error.after if isinstance(error, _AgainError) else 0.0


def _retry_after(response: httpx2.Response) -> float:
    """Seconds that the server wants to be left alone; a date counts as none."""
    try:
        return max(float(response.headers.get("Retry-After", "0")), 0.0)
    except ValueError:
        return 0.0
