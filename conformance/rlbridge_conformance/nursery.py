"""A clean process that others are forked off, under any interpreter: what it has imported, all of them have."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rlbridge.errors import ResourceError

_START_SECONDS = 300.0
"""For an interpreter and its imports, and for the answer to each request."""


class Child:
    """A process that a `Nursery` has forked off; it is not a child of this process.

    Attributes:
        pid: Its process id.
        connection: This end of its pipe.
    """

    def __init__(self, pid: int, connection: Connection) -> None:
        self.pid, self.connection = pid, connection
        self._handle: int | None = None
        with contextlib.suppress(ProcessLookupError):
            self._handle = os.pidfd_open(pid)

    def kill(self, seconds: float) -> None:
        """End it, stopped or not, and wait until it is gone, `seconds` at most."""
        if self._handle is None:
            return
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._handle, signal.SIGKILL)
        select.select([self._handle], [], [], seconds)
        os.close(self._handle)
        self._handle = None


class Nursery:
    """Starts when the first child is asked for.

    Args:
        serve: "module:function", called in each child with what `build` returns and its end of the pipe.
        modules: What to import before the first child.
        python: The interpreter; this one's own by default.
        variables: Environment variables beside this process's.
    """

    def __init__(
        self, serve: str, modules: Sequence[str] = (), python: Path | None = None, variables: Mapping[str, str] | None = None
    ) -> None:
        self._serve, self._modules, self._python = serve, list(modules), python
        self._variables = dict(variables or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._lock = threading.Lock()

    def child(self, build: Callable[[], Any]) -> Child:
        """A new process that has called `build`, which is pickled.

        Raises:
            ResourceError: the interpreter does not start, or cannot import the modules.
        """
        ours, theirs = socket.socketpair()
        connection = Connection(ours.detach())
        try:
            with self._lock, theirs:
                answer = self._ask(theirs)
        except BaseException:
            connection.close()
            raise
        connection.send_bytes(pickle.dumps(build))
        return Child(int(answer), connection)

    def close(self) -> None:
        """End it; its children go on until their pipes end."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            self._process = None

    def _ask(self, pipe: socket.socket) -> bytes:
        """The process id of a new child, which has this end of a pipe."""
        channel = self._channel or self._start()
        try:
            socket.send_fds(channel, [b"child"], [pipe.fileno()])
            answer = channel.recv(16)
        except OSError:
            answer = b""
        if not answer:
            raise self._ended()
        return answer

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        path = sys.path if self._python is None else _foreign_path()
        told = {"serve": self._serve, "modules": self._modules, "path": path, "own": self._python is None}
        command = [str(self._python or sys.executable), "-P", "-m", __name__, str(theirs.fileno())]
        with theirs:
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env={**os.environ, **self._variables})
        self._channel = ours
        ours.settimeout(_START_SECONDS)
        ours.sendall(json.dumps(told).encode())
        try:
            ready = ours.recv(1)
        except OSError:
            ready = b""
        if not ready:
            raise self._ended()
        return ours

    def _ended(self) -> ResourceError:
        self.close()
        return ResourceError(
            f"{self._python or sys.executable} did not start in {_START_SECONDS:.0f} s, or ended",
            todo=f"what it said stands above; it has to import {', '.join(self._modules) or 'rlbridge'}",
        )


def _foreign_path() -> list[str]:
    """What is on this process's path and is not this interpreter's own: the current directory, a test's folder."""
    own = {Path(prefix).resolve() for prefix in (sys.prefix, sys.base_prefix)}
    return [p for p in sys.path if not any(Path(p or ".").resolve().is_relative_to(prefix) for prefix in own)]


def _import(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


@contextlib.contextmanager
def _ending_with(channel: socket.socket) -> Iterator[None]:
    """Imports take seconds: if whoever asked for them goes away meanwhile, so does this process."""
    imported = threading.Event()
    poll = select.poll()
    poll.register(channel, 0)  # the hang-up alone

    def watch() -> None:
        while not imported.is_set():
            if poll.poll(100):
                os._exit(0)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield
    finally:
        imported.set()
        watching.join()


def main(descriptor: int) -> None:
    """The process itself: one request after the other until the pipe ends."""
    channel = socket.socket(fileno=descriptor)
    told = json.loads(channel.recv(1 << 20))
    sys.path[:] = told["path"] if told["own"] else [*sys.path, *told["path"]]
    with _ending_with(channel):
        for module in told["modules"]:
            importlib.import_module(module)
        serve = _import(told["serve"])
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's interrupt is for who asked for them
    with contextlib.suppress(BrokenPipeError):  # then the next request is the end
        channel.sendall(b"r")
    while True:
        request, descriptors, _, _ = socket.recv_fds(channel, 16, 1)
        if not request:
            os._exit(0)
        pid = os.fork()
        if pid:
            os.close(descriptors[0])
            channel.sendall(str(pid).encode())
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        channel.close()
        connection = Connection(descriptors[0])
        serve(pickle.loads(connection.recv_bytes()), connection)
        os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
