"""Bytes between an engine's process and its ranks' processes: a Unix socket in a private directory, one connection a call.

A rank is a process that SGLang starts and feeds itself, and whose own calls answer no more than whether they succeeded. So
each rank listens on a socket of its own. A call that may only happen between two forward passes is announced here, told to
begin by the scheduler's own thread (`RankServer.run`), and answered here. Nothing is pickled, and only processes of this user
reach the sockets: the directory is theirs alone.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from rlbridge.errors import DeadlineError, PeerLostError, SyncError

_LENGTH = struct.Struct(">Q")
_ANNOUNCED = b"announced"

Handle = Callable[[str, bytes], bytes]


class Call(msgspec.Struct, frozen=True):
    """A call of a rank. One with a `ticket` waits until the scheduler runs it, or until `seconds` are over."""

    method: str
    payload: bytes
    ticket: int = 0
    seconds: float = 0.0


def socket_path(directory: str, rank: int) -> Path:
    """Where a rank listens."""
    return Path(directory) / f"rank{rank}.sock"


class RankServer:
    """Answers the calls of one rank, each on a thread of its own.

    Args:
        path: The socket to make.
        handle: Answers (method, payload).
    """

    def __init__(self, path: Path, handle: Handle) -> None:
        self._handle = handle
        self._announced: dict[int, _Turn] = {}
        self._lock = threading.Lock()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(str(path))
        self._socket.listen(64)
        threading.Thread(target=self._accept, name="rlbridge-rank", daemon=True).start()

    def run(self, ticket: int) -> None:
        """Run a call that was announced, on this thread.

        Raises:
            SyncError: it was not announced, or nobody waits for it any more.
        """
        with self._lock:
            turn = self._announced.pop(ticket, None)
        if turn is None:
            raise SyncError(f"no call {ticket} is announced")
        try:
            turn.reply = self._handle(turn.call.method, turn.call.payload)
        finally:
            turn.done.set()

    def close(self) -> None:
        """Take no calls any more."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), name="rlbridge-call", daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):  # who asked is gone: the answer concerns nobody
            call = msgspec.msgpack.decode(_receive(connection), type=Call)
            reply = self._in_turn(connection, call) if call.ticket else self._handle(call.method, call.payload)
            if reply is not None:
                _send(connection, reply)

    def _in_turn(self, connection: socket.socket, call: Call) -> bytes | None:
        turn = _Turn(call)
        with self._lock:
            self._announced[call.ticket] = turn
        _send(connection, _ANNOUNCED)
        turn.done.wait(call.seconds)
        with self._lock:
            self._announced.pop(call.ticket, None)
        return turn.reply


class _Turn:
    def __init__(self, call: Call) -> None:
        self.call = call
        self.done = threading.Event()
        self.reply: bytes | None = None


class RankClient:
    """One rank as the engine's process reaches it.

    Args:
        name: The rank's name, for example "generator[0].rank[1]".
        path: Where it listens.
        gone: Says what is known of the rank's end, for the error.
    """

    def __init__(self, name: str, path: Path, gone: Callable[[], str] = lambda: "") -> None:
        self.name, self._path, self._gone = name, path, gone

    @contextlib.contextmanager
    def calling(self, call: Call, seconds: float) -> Iterator[Callable[[], bytes]]:
        """Send a call. What is yielded waits for its answer, or first for the word that it is announced.

        Raises:
            PeerLostError: the rank's process is gone.
            DeadlineError: it did not answer within `seconds`.
        """
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(seconds)

            def receive() -> bytes:
                with self._errors(call, seconds):
                    return _receive(connection)

            with self._errors(call, seconds):
                connection.connect(str(self._path))
                _send(connection, msgspec.msgpack.encode(call))
            yield receive

    @contextlib.contextmanager
    def _errors(self, call: Call, seconds: float) -> Iterator[None]:
        try:
            yield
        except TimeoutError as error:
            raise DeadlineError(
                f"{self.name} did not answer {call.method!r} within {seconds:g} s",
                role="generator",
                peer=self.name,
                phase=call.method,
                todo="is its process stopped or overloaded? the limit is generator.rank_seconds",
            ) from error
        except OSError as error:
            raise PeerLostError(
                f"the process of {self.name} is gone" + (f": {why}" if (why := self._gone()) else ""),
                role="generator",
                peer=self.name,
                phase=call.method,
                todo="the engine has to be started again",
            ) from error


def _send(connection: socket.socket, payload: bytes) -> None:
    connection.sendall(_LENGTH.pack(len(payload)))
    connection.sendall(payload)


def _receive(connection: socket.socket) -> bytes:
    (length,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size))
    return bytes(_exactly(connection, length))


def _exactly(connection: socket.socket, count: int) -> bytearray:
    found = bytearray(count)
    view, filled = memoryview(found), 0
    while filled < count:
        got = connection.recv_into(view[filled:])
        if not got:
            raise ConnectionResetError("the other side is gone")
        filled += got
    return found
