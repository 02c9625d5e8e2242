"""Publishers and engines in plain processes: the sync without Ray, for faults on real processes."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import multiprocessing
import os
import queue
import signal
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

from rlbridge.errors import PeerLostError
from rlbridge_conformance.faults.signals import send
from rlbridge_conformance.nursery import Nursery

_Call = tuple[int, str, tuple[Any, ...], dict[str, Any]]


class ProcessParty:
    """A `rlbridge.sync.session.Party` over a pipe.

    Args:
        name: The party's name in the session.
        build: Called in the child. Returns an object whose `handle(method, payload)` returns one reply or a list of them; its
            other methods can be called with `do`.
        nursery: What the process is forked off: it has a clean state, and can be had while Ray runs here. By default it is
            this process, with its threads' locks as they are.
    """

    def __init__(self, name: str, build: Callable[[], Any], nursery: Nursery | None = None) -> None:
        self.name = name
        self._process = _Fork(name, build) if nursery is None else nursery.child(build)
        self._connection: Connection = self._process.connection
        _parties.add(self)
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._waiting: dict[int, Future[Any]] = {}
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._lost = False
        for target in (self._listen, self._speak):
            threading.Thread(target=target, name=f"{name}{target.__name__}", daemon=True).start()

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    @property
    def actor(self) -> Any:
        """None: this party is no Ray actor."""
        return None

    def call(self, method: str, payload: bytes, tensors: dict[str, Any] | None = None) -> Future[list[bytes]]:
        """Call `handle`."""
        return self._send("handle", (method, payload), {})

    def tensors(self, version: int, slot: int, sink: str, tensor_transport: str | None) -> Any:
        """Plain processes carry no Ray objects."""
        raise TypeError("a transport that moves Ray objects needs Ray actors")

    def do(self, method: str, *args: Any, timeout: float = 60.0, **kwargs: Any) -> Any:
        """Call another method of the child's object, and return what it returns."""
        return self.begin(method, *args, **kwargs).result(timeout)

    def begin(self, method: str, *args: Any, **kwargs: Any) -> Future[Any]:
        """Call another method of the child's object; do not wait for it."""
        return self._send(method, args, kwargs)

    def signal(self, number: signal.Signals) -> None:
        """Send the child a signal."""
        send(self.pid, number)

    def stop(self) -> None:
        """End the child, stopped or not, and wait for it."""
        self._process.kill(10)
        self._calls.put(None)

    def _send(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Future[Any]:
        future: Future[Any] = Future()
        with self._lock:
            number = next(self._numbers)
            if self._lost:
                future.set_exception(self._gone())
            else:
                self._waiting[number] = future
                self._calls.put((number, method, args, kwargs))
        return future

    def _speak(self) -> None:
        """Write the calls: on a thread of its own, since a child that is stopped may leave the pipe full."""
        while (call := self._calls.get()) is not None:
            try:
                self._connection.send(call)
            except OSError:  # the child is gone, and `_listen` says so to all who wait
                return

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


_parties: weakref.WeakSet[ProcessParty] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    """Multiprocessing's own end of children waits for ever for a stopped one."""
    for party in list(_parties):
        with contextlib.suppress(OSError, ValueError):
            party.stop()


class _Fork:
    """A fork of this process, with a pipe."""

    def __init__(self, name: str, build: Callable[[], Any]) -> None:
        context = multiprocessing.get_context("fork")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_in_fork, args=(build, self.connection, theirs), name=name)
        self._process.start()
        self.pid = int(self._process.pid or 0)
        theirs.close()

    def kill(self, seconds: float) -> None:
        self._process.kill()
        self._process.join(seconds)


def _in_fork(build: Callable[[], Any], parents: Connection, connection: Connection) -> None:
    parents.close()  # so that the end of the parent is the end of the pipe
    serve(build, connection)


def serve(build: Callable[[], Any], connection: Connection) -> None:
    """The child: answers calls on threads of its own, as an actor with several threads does."""
    target = build()
    lock = threading.Lock()

    def run(number: int, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            value = getattr(target, method)(*args, **kwargs)
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
