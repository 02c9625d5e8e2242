"""The sink side of a sync, in every engine rank, whatever process that is. Needs no Ray.

Bytes land in an arena, are verified there, are installed, and are verified again over the live parameters. Until the install
begins, the rank goes on serving the version it has.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

import msgspec
import torch

from rlbridge.errors import DeadlineError, DigestError, DirtyError, QuarantineError, RlbridgeError, StaleVersionError, SyncError
from rlbridge.roles.sink import WeightSink
from rlbridge.roles.transport import Transport
from rlbridge.sync.messages import (
    Connect,
    Described,
    Digests,
    Nothing,
    Opened,
    OpenSink,
    Pull,
    Pulled,
    Record,
    State,
    Timed,
    Verify,
    Wait,
    answer,
    unpack,
)
from rlbridge.sync.publisher import open_transport
from rlbridge.weights.arena import Arena
from rlbridge.weights.digest import BYTES, digests
from rlbridge.weights.plan import SinkShare

Tensors = Mapping[str, list[torch.Tensor]]


class _Receipt:
    """One pull, on a thread of its own."""

    def __init__(self, transport: Transport[Any], message: Pull, tensors: Tensors) -> None:
        self.version = message.version
        self.pulled: Pulled | None = None
        self.error: BaseException | None = None
        self._done = threading.Event()
        self._transport, self._message, self._tensors = transport, message, tensors
        self._thread = threading.Thread(target=self._run, name=f"rlbridge-pull-{message.version}", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        return not self._done.is_set()

    def wait(self, seconds: float) -> bool:
        return self._done.wait(seconds)

    def _run(self) -> None:
        start = time.monotonic()
        message = self._message
        try:
            nbytes = self._transport.receive(message.version, message.slot, self._tensors, start + message.seconds)
            self.pulled = Pulled(nbytes, time.monotonic() - start)
        except BaseException as error:  # kept, and raised by the thread that waits
            self.error = error
        finally:
            self._tensors = {}
            self._done.set()


class Subscriber:
    """Receives versions into an arena and installs them through a `WeightSink`.

    Args:
        name: This rank's name in the session, for example "generator[0].rank[1]".
        sink: The engine rank's parameters.
        device: Where the arena lies.
        rank: Which entry of a call's list of payloads is for this rank.
    """

    def __init__(self, name: str, sink: WeightSink, device: str = "cpu", rank: int = 0) -> None:
        self.name = name
        self.state = "ready"
        self.version = 0
        self._sink = sink
        self._device = device
        self._rank = rank
        self._share: SinkShare | None = None
        self._arena: Arena | None = None
        self._segments: list[torch.Tensor] = []
        self._transport: Transport[Any] | None = None
        self._receipt: _Receipt | None = None
        self._verified: tuple[int, list[bytes]] | None = None
        self._quarantined = False
        self._graveyard: list[tuple[Arena, Transport[Any], _Receipt | None]] = []

    def handle(self, method: str, payload: bytes, tensors: Tensors | None = None) -> bytes:
        """Answer one call of the session. `payload` is a list with one message for each rank of the engine."""
        messages = msgspec.msgpack.decode(payload, type=list[bytes])
        return answer(lambda: self._dispatch(method, messages[self._rank % len(messages)], tensors or {}))

    def _dispatch(self, method: str, payload: bytes, tensors: Tensors) -> object:
        match method:
            case "record":
                return Described(self.name, self._sink.record(unpack(payload, Record).tensors))
            case "open":
                return self._open(unpack(payload, OpenSink))
            case "connect":
                return self._connect(unpack(payload, Connect))
            case "start_pull":
                return self._start_pull(unpack(payload, Pull), tensors)
            case "wait_pull":
                return self._wait_pull(unpack(payload, Wait))
            case "verify":
                return self._verify(unpack(payload, Verify))
            case "install":
                return self._install(unpack(payload, Wait).version)
            case "check":
                return self._check(unpack(payload, Wait).version)
            case "commit":
                return self._commit(unpack(payload, Wait).version)
            case "state":
                return State(self.state, self.version)
            case "live_digests":
                return Digests(b"".join(digests(self._sink.live())), 0.0)
            case "scramble":
                return self._scramble()
            case "evidence":
                return self._connected().evidence()
            case "close":
                return self.close()
        raise SyncError(f"a subscriber has no method {method!r}", role="generator", rank=self.name)

    def close(self) -> Nothing:
        """End the epoch. An arena that a transfer may still write into is kept until that transfer is over."""
        self._bury()
        if self._transport is not None and self._arena is not None:
            if self._quarantined:
                self._graveyard.append((self._arena, self._transport, self._receipt))
            else:
                self._transport.close()
        self._transport, self._arena, self._share, self._receipt = None, None, None, None
        self._segments, self._verified, self._quarantined = [], None, False
        return Nothing()

    def _bury(self) -> None:
        """Free the quarantined arenas whose transfers are over."""
        alive = []
        for arena, transport, receipt in self._graveyard:
            if (receipt is not None and receipt.running) or not transport.settled():
                alive.append((arena, transport, receipt))
            else:
                transport.close()
        self._graveyard = alive

    def _open(self, message: OpenSink) -> Opened:
        self.close()
        start = time.monotonic()
        share = message.share
        self._sink.bind([(part.piece, part.region) for part in share.parts])
        self._arena = Arena(share.arena_bytes, self._device)
        self._segments = [self._arena.view(p.offset, p.nbytes, p.dtype, p.region.shape) for p in share.parts]
        self._share = share
        self._transport = open_transport(message.transport, self.name, "sink", message.epoch, self._device)
        return Opened(self._transport.open([self._arena.tensor]), time.monotonic() - start)

    def _connect(self, message: Connect) -> Timed:
        start = time.monotonic()
        self._connected().connect(message.peers, message.copies)
        return Timed(time.monotonic() - start)

    def _start_pull(self, message: Pull, tensors: Tensors) -> Nothing:
        transport = self._connected()
        if self._quarantined:
            raise QuarantineError(
                "an earlier transfer may still write into this arena",
                role="generator",
                rank=self.name,
                version=message.version,
                todo="begin a new epoch: it gets a new arena",
            )
        if message.version <= self.version:
            raise StaleVersionError(
                f"version {message.version} is not newer than version {self.version}, which is served",
                role="generator",
                rank=self.name,
                version=message.version,
            )
        self._verified = None
        self._receipt = _Receipt(transport, message, tensors)
        return Nothing()

    def _wait_pull(self, message: Wait) -> Pulled:
        receipt = self._receipt
        if receipt is None or receipt.version != message.version:
            raise SyncError(f"no pull of version {message.version} was begun", rank=self.name, version=message.version)
        if not receipt.wait(message.seconds):
            self._quarantined = True
            raise DeadlineError(
                f"the transfer did not end within {message.seconds:.1f} s; its arena is quarantined",
                role="generator",
                rank=self.name,
                version=message.version,
                phase="wire",
                todo="is a peer stopped, or the link slower than sync.deadline_seconds allows?",
            )
        if receipt.error is not None:
            self._quarantined = True
            if isinstance(receipt.error, RlbridgeError):
                raise receipt.error.at(role="generator", rank=self.name, version=message.version, phase="wire")
            raise SyncError(
                f"the transfer failed: {type(receipt.error).__name__}: {receipt.error}",
                role="generator",
                rank=self.name,
                version=message.version,
                phase="wire",
            ) from receipt.error
        assert receipt.pulled is not None
        return receipt.pulled

    def _verify(self, message: Verify) -> Timed:
        start = time.monotonic()
        receipt = self._receipt
        if receipt is None or receipt.version != message.version or receipt.pulled is None:
            raise SyncError(f"version {message.version} has not arrived", rank=self.name, version=message.version)
        share = self._opened()
        expected = [message.digests[p.source][p.segment * BYTES : (p.segment + 1) * BYTES] for p in share.parts]
        self._compare(expected, digests(self._segments), message.version, "verify", "in the arena")
        self._verified = (message.version, expected)
        return Timed(time.monotonic() - start)

    def _install(self, version: int) -> Timed:
        if self._verified is None or self._verified[0] != version:
            raise SyncError(
                f"version {version} is not verified: it is not installed", role="generator", rank=self.name, version=version
            )
        start = time.monotonic()
        self.state = "updating"
        try:
            self._sink.install(self._segments)
        except BaseException:
            self.state = "dirty"
            raise
        return Timed(time.monotonic() - start)

    def _check(self, version: int) -> Timed:
        """Hash the live parameters: what is served is what was published, not only what arrived."""
        start = time.monotonic()
        if self.state != "updating" or self._verified is None or self._verified[0] != version:
            raise SyncError(f"version {version} is not installed", role="generator", rank=self.name, version=version)
        try:
            self._compare(self._verified[1], digests(self._sink.live()), version, "install", "in the live parameters")
        except DigestError:
            self.state = "dirty"
            raise
        return Timed(time.monotonic() - start)

    def _commit(self, version: int) -> State:
        if self.state != "updating" or self._verified is None or self._verified[0] != version:
            raise SyncError(f"version {version} is not installed", role="generator", rank=self.name, version=version)
        self.state, self.version = "ready", version
        return State(self.state, self.version)

    def _scramble(self) -> Nothing:
        self.state = "dirty"
        self._sink.scramble()
        return Nothing()

    def serving(self) -> int:
        """The version that may be served.

        Raises:
            DirtyError: the parameters are a mixture of versions, or are being written.
        """
        if self.state != "ready":
            raise DirtyError(
                f"the weights are {self.state}: no whole version is held",
                role="generator",
                rank=self.name,
                version=self.version,
                todo="a sync that succeeds makes the engine ready again",
            )
        return self.version

    def _compare(self, expected: list[bytes], found: list[bytes], version: int, phase: str, place: str) -> None:
        if expected == found:
            return
        wrong = [i for i, (a, b) in enumerate(zip(expected, found, strict=True)) if a != b]
        part = self._opened().parts[wrong[0]]
        raise DigestError(
            f"{len(wrong)} of {len(expected)} segments {place} are not what trainer[{part.source}] published;"
            f" the first is {part.region}",
            role="generator",
            rank=self.name,
            peer=f"trainer[{part.source}]",
            version=version,
            phase=phase,
            tensor=part.region.tensor,
            todo="the version is not served; sync again",
        )

    def _opened(self) -> SinkShare:
        if self._share is None:
            raise SyncError("no epoch is open", role="generator", rank=self.name)
        return self._share

    def _connected(self) -> Transport[Any]:
        if self._transport is None:
            raise SyncError("no epoch is open", role="generator", rank=self.name)
        return self._transport
