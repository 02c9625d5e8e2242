"""The sink side of a sync, in every engine rank, whatever process that is. Needs no Ray.

Bytes land in an arena, are verified there, are installed, and are verified again over the live parameters. Until the install
begins, the rank goes on serving the version it has.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import torch

from rlbridge.errors import DeadlineError, DigestError, QuarantineError, RlbridgeError, StaleVersionError, SyncError
from rlbridge.rdma.counters import Reading, counted, counters
from rlbridge.roles.sink import WeightSink
from rlbridge.roles.transport import Transport
from rlbridge.sync.epoch import Epoch
from rlbridge.sync.messages import (
    Box,
    Connect,
    Described,
    Digests,
    Held,
    Nothing,
    Opened,
    OpenSink,
    Pull,
    Pulled,
    Read,
    Record,
    State,
    Timed,
    Verify,
    Wait,
    answer,
    unpack,
)
from rlbridge.sync.publisher import open_transport, synchronize, use_device
from rlbridge.weights.arena import Arena
from rlbridge.weights.digest import BYTES, digests
from rlbridge.weights.plan import SinkShare

Tensors = Mapping[str, list[torch.Tensor]]

_SLACK_SECONDS = 1.0
"""Waiting goes on for so long after a deadline: the transfer ends by it too, and its error names the peers."""


class _Receipt:
    """One pull, on a thread of its own. `ports`: what the RDMA ports of this host had counted before any of its bytes moved."""

    def __init__(self, transport: Transport[Any], message: Pull, tensors: Tensors, device: str, ports: Reading) -> None:
        self._device = device
        self._ports = ports
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
            use_device(self._device)
            nbytes = self._transport.receive(message.version, message.slot, self._tensors, start + message.seconds)
            seconds = time.monotonic() - start
            self.pulled = Pulled(nbytes, seconds, self._transport.evidence(), counted(self._ports, counters()))
        except BaseException as error:  # kept, and raised by the thread that waits
            self.error = error
        finally:
            self._tensors = {}
            self._done.set()


@dataclass
class _Grave:
    """An arena of an earlier epoch that may still be written to.

    `peers_closed`: no peer can begin to any more. `of_another`: it is of an earlier session, of whose peers nothing is known.
    """

    arena: Arena
    transport: Transport[Any]
    receipt: _Receipt | None
    peers_closed: bool = False
    of_another: bool = False

    def at_rest(self) -> bool:
        if self.receipt is not None and self.receipt.running:
            return False
        return self.transport.settled(self.peers_closed)


class Subscriber:
    """Receives versions into an arena and installs them through a `WeightSink`.

    Calls are answered one after the other, except for the waiting for a pull.

    Args:
        name: This rank's name in the session, for example "generator[0].rank[1]".
        sink: The engine rank's parameters.
        device: Where the arena lies.
        rank: Which entry of a call's list of payloads is for this rank.
        instead_of: The subscriber of an earlier session over the same parameters. It is closed; what transfers may still write
            into is kept.
    """

    def __init__(
        self, name: str, sink: WeightSink, device: str = "cpu", rank: int = 0, instead_of: Subscriber | None = None
    ) -> None:
        self.name = name
        self.state = "ready"
        self.version = 0
        self._sink = sink
        self._device = device
        self._rank = rank
        self._epoch = Epoch(name)
        self._share: SinkShare | None = None
        self._arena: Arena | None = None
        self._segments: list[torch.Tensor] = []
        self._transport: Transport[Any] | None = None
        self._receipt: _Receipt | None = None
        self._ports = Reading({})  # as they were when the last version had been installed, or the epoch began
        self._verified: tuple[int, list[bytes]] | None = None
        self._quarantined = False
        self._graveyard: list[_Grave] = [] if instead_of is None else instead_of._left()
        self._lock = threading.RLock()

    def handle(self, method: str, payload: bytes, tensors: Tensors | None = None) -> bytes:
        """Answer one call of the session, on any thread. `payload` is a list with one message for each rank of the engine."""
        use_device(self._device)
        messages = msgspec.msgpack.decode(payload, type=list[bytes])
        return answer(lambda: self._dispatch(method, messages[self._rank % len(messages)], tensors or {}))

    def _dispatch(self, method: str, payload: bytes, tensors: Tensors) -> object:
        if method == "wait_pull":
            return self._wait_pull(unpack(payload, Wait))
        with self._lock:
            match method:
                case "record":
                    return Described(self.name, self._sink.record(unpack(payload, Record).tensors))
                case "open":
                    return self._open(unpack(payload, OpenSink))
                case "connect":
                    return self._connect(unpack(payload, Connect))
                case "start_pull":
                    return self._start_pull(unpack(payload, Pull), tensors)
                case "verify":
                    return self._verify(unpack(payload, Verify))
                case "install":
                    return self._install(unpack(payload, Wait))
                case "check":
                    return self._check(unpack(payload, Wait))
                case "commit":
                    return self._commit(unpack(payload, Wait))
                case "state":
                    return State(self.state, self.version)
                case "live_digests":
                    return Digests(b"".join(digests(self._sink.live())), 0.0)
                case "read":
                    return self._read(unpack(payload, Read))
                case "scramble":
                    return self._scramble()
                case "close":
                    return self.close()
        raise SyncError(f"a subscriber has no method {method!r}", role="generator", rank=self.name)

    def close(self) -> Nothing:
        """End the epoch. An arena that a transfer may still write into is kept until that transfer is over."""
        with self._lock:
            self._bury()
            if self._transport is not None and self._arena is not None:
                grave = _Grave(self._arena, self._transport, self._receipt)
                # A pull may be running that nobody waited for, because the session gave up for another reason.
                if self._quarantined or not grave.at_rest():
                    self._graveyard.append(grave)
                else:
                    self._transport.close()
            self._transport, self._arena, self._share, self._receipt = None, None, None, None
            self._segments, self._verified, self._quarantined = [], None, False
            return Nothing()

    def _left(self) -> list[_Grave]:
        """Close, and hand over what may still be written into."""
        self.close()
        with self._lock:
            left, self._graveyard = self._graveyard, []
        for grave in left:
            grave.of_another = True
        return left

    def _bury(self) -> None:
        """Free the quarantined arenas whose transfers are over."""
        kept = []
        for grave in self._graveyard:
            if grave.at_rest():
                grave.transport.close()
            else:
                kept.append(grave)
        self._graveyard = kept

    def _open(self, message: OpenSink) -> Opened:
        self._epoch.begin(message.session, message.epoch)
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
        self._epoch.check(message.epoch)
        start = time.monotonic()
        self._connected().connect(message.peers, message.copies)
        self._ports = counters()
        for grave in self._graveyard:  # every peer has opened this epoch, and so has closed the earlier ones, or is gone
            grave.peers_closed = not grave.of_another
        return Timed(time.monotonic() - start)

    def _start_pull(self, message: Pull, tensors: Tensors) -> Nothing:
        self._epoch.check(message.epoch, message.version)
        transport = self._connected()
        self._bury()
        if self._quarantined or (self._receipt is not None and self._receipt.running):
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
        # Ray has moved the tensors of a call before the call begins.
        ports = self._ports if transport.moves_ray_objects else counters()
        self._receipt = _Receipt(transport, message, tensors, self._device, ports)
        return Nothing()

    def _wait_pull(self, message: Wait) -> Pulled:
        with self._lock:
            self._epoch.check(message.epoch, message.version)
            receipt = self._receipt
        if receipt is None or receipt.version != message.version:
            raise SyncError(f"no pull of version {message.version} was begun", rank=self.name, version=message.version)
        ended = receipt.wait(max(message.seconds, 0.0) + _SLACK_SECONDS)
        with self._lock:
            if receipt is self._receipt and not (ended and receipt.error is None):
                self._quarantined = True
        if not ended:
            raise DeadlineError(
                f"the transfer did not end within {message.seconds:.1f} s; its arena is quarantined",
                role="generator",
                rank=self.name,
                version=message.version,
                phase="wire",
                todo="is a peer stopped, or the link slower than sync.deadline_seconds allows?",
            )
        if receipt.error is not None:
            where: dict[str, Any] = {"role": "generator", "rank": self.name, "version": message.version, "phase": "wire"}
            if isinstance(receipt.error, RlbridgeError):
                raise receipt.error.at(**where)
            raise SyncError(f"the transfer failed: {type(receipt.error).__name__}: {receipt.error}", **where) from receipt.error
        assert receipt.pulled is not None
        return receipt.pulled

    def _verify(self, message: Verify) -> Timed:
        self._epoch.check(message.epoch, message.version)
        start = time.monotonic()
        receipt = self._receipt
        if receipt is None or receipt.version != message.version or receipt.pulled is None:
            raise SyncError(f"version {message.version} has not arrived", rank=self.name, version=message.version)
        share = self._opened()
        expected = [message.digests[p.source][p.segment * BYTES : (p.segment + 1) * BYTES] for p in share.parts]
        self._compare(expected, digests(self._segments), message.version, "verify", "in the arena")
        self._verified = (message.version, expected)
        return Timed(time.monotonic() - start)

    def _install(self, message: Wait) -> Timed:
        self._epoch.check(message.epoch, message.version)
        if self._verified is None or self._verified[0] != message.version:
            raise SyncError(
                f"version {message.version} is not verified: it is not installed",
                role="generator",
                rank=self.name,
                version=message.version,
            )
        start = time.monotonic()
        self.state = "updating"
        try:
            self._sink.install(self._segments)
            synchronize(self._device)
        except BaseException:
            self.state = "dirty"
            raise
        return Timed(time.monotonic() - start)

    def _check(self, message: Wait) -> Timed:
        """Hash the live parameters: what is served is what was published, not only what arrived."""
        start = time.monotonic()
        expected = self._installed(message)
        try:
            self._compare(expected, digests(self._sink.live()), message.version, "install", "in the live parameters")
        except DigestError:
            self.state = "dirty"
            raise
        return Timed(time.monotonic() - start)

    def _commit(self, message: Wait) -> State:
        self._installed(message)
        self.state, self.version = "ready", message.version
        self._ports = counters()
        self._bury()
        return State(self.state, self.version)

    def _installed(self, message: Wait) -> list[bytes]:
        """The digests of the version that is being installed."""
        self._epoch.check(message.epoch, message.version)
        if self.state != "updating" or self._verified is None or self._verified[0] != message.version:
            raise SyncError(
                f"version {message.version} is not installed", role="generator", rank=self.name, version=message.version
            )
        return self._verified[1]

    def _scramble(self) -> Nothing:
        self.state = "dirty"
        self._sink.scramble()
        return Nothing()

    def _read(self, message: Read) -> Held:
        parts, live = self._opened().parts, self._sink.live()
        some = slice(message.first, message.first + message.count)
        shown = zip(parts[some], live[some], strict=True)
        return Held(len(parts), [Box(p.region, str(t.dtype).removeprefix("torch."), _raw(t)) for p, t in shown])

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


def _raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy())
