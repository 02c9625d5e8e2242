"""Publishers and engines in plain forked processes: the sync without Ray, for faults on real processes."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

from rlbridge.errors import PeerLostError

_fork = multiprocessing.get_context("fork")


class ProcessParty:
    """A `rlbridge.sync.session.Party` over a pipe.

    Args:
        name: The party's name in the session.
        build: Called in the child. Returns an object whose `handle(method, payload)` returns one reply or a list of them; its
            other methods can be called with `do`.
    """

    def __init__(self, name: str, build: Callable[[], Any]) -> None:
        self.name = name
        ours, theirs = _fork.Pipe()
        self._connection: Connection = ours
        self._process = _fork.Process(target=_serve, args=(build, theirs), name=name, daemon=True)
        self._process.start()
        theirs.close()
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._waiting: dict[int, Future[Any]] = {}
        self._lost = False
        threading.Thread(target=self._listen, name=f"{name}-replies", daemon=True).start()

    @property
    def pid(self) -> int:
        """The child's process id."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def actor(self) -> Any:
        """None: this party is no Ray actor."""
        return None

    def call(self, method: str, payload: bytes, tensors: dict[str, Any] | None = None) -> Future[list[bytes]]:
        """Call `handle`."""
        return self._send(("handle", (method, payload)))

    def tensors(self, version: int, slot: int, sink: str, tensor_transport: str | None) -> Any:
        """Plain processes carry no Ray objects."""
        raise TypeError("a transport that moves Ray objects needs Ray actors")

    def do(self, method: str, *args: Any, timeout: float = 60.0) -> Any:
        """Call another method of the child's object, and return what it returns."""
        return self._send((method, args)).result(timeout)

    def signal(self, number: signal.Signals) -> None:
        """Send the child a signal."""
        os.kill(self.pid, number)

    def stop(self) -> None:
        """End the child and wait for it."""
        self._process.kill()
        self._process.join(10)

    def _send(self, request: tuple[str, tuple[Any, ...]]) -> Future[Any]:
        future: Future[Any] = Future()
        with self._lock:
            number = next(self._numbers)
            self._waiting[number] = future
            try:
                if self._lost:
                    raise BrokenPipeError
                self._connection.send((number, *request))
            except (BrokenPipeError, OSError):
                self._waiting.pop(number, None)
                future.set_exception(self._gone())
        return future

    def _listen(self) -> None:
        while True:
            try:
                number, ok, value = self._connection.recv()
            except (EOFError, OSError):
                break
            with self._lock:
                future = self._waiting.pop(number)
            if ok:
                future.set_result(value)
            else:
                future.set_exception(value)
        with self._lock:
            self._lost = True
            left, self._waiting = self._waiting, {}
        for future in left.values():
            future.set_exception(self._gone())

    def _gone(self) -> PeerLostError:
        return PeerLostError(f"the process of {self.name} (pid {self.pid}) is gone", peer=self.name)


def _serve(build: Callable[[], Any], connection: Connection) -> None:
    """The child: answers calls on threads of its own, as an actor with several threads does."""
    target = build()
    lock = threading.Lock()

    def run(number: int, method: str, args: tuple[Any, ...]) -> None:
        try:
            value = getattr(target, method)(*args)
            reply = (number, True, [value] if method == "handle" and isinstance(value, bytes) else value)
        except Exception as error:
            reply = (number, False, error)
        with lock:
            connection.send(reply)

    pool = ThreadPoolExecutor(4)
    while True:
        try:
            request = connection.recv()
        except (EOFError, OSError):
            os._exit(0)  # a process that made a NIXL agent may crash in its exit handlers
        pool.submit(run, *request)


