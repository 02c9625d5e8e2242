"""The source side of a sync, in every trainer rank. Needs no Ray."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from rlbridge.backend import Backend
from rlbridge.errors import DeadlineError, LayoutError, LeaseError, StaleVersionError, SyncError, TransportError
from rlbridge.plugins import registry
from rlbridge.roles.source import WeightSource
from rlbridge.roles.transport import Transport, TransportContext
from rlbridge.sync.epoch import Epoch
from rlbridge.sync.messages import (
    Acknowledge,
    Connect,
    Described,
    Digests,
    Nothing,
    Opened,
    OpenSource,
    Publish,
    Published,
    Send,
    Sent,
    Timed,
    TransportSpec,
    Wait,
    answer,
    unpack,
)
from rlbridge.weights.arena import Arena
from rlbridge.weights.digest import digests
from rlbridge.weights.plan import Segment


@dataclass
class _Slot:
    """One buffer that can hold a version; `waiting` are the sinks that have not acknowledged it."""

    segments: list[torch.Tensor]
    version: int = 0
    waiting: set[str] = field(default_factory=set)
    until: float = 0.0
    hashed: Future[Digests] | None = None


class Publisher:
    """Makes versions of a `WeightSource` readable, and keeps each unchanged until every subscriber has it.

    Publishing "snapshot" copies into one of two arenas, so training goes on at once. Publishing "barrier" lets the peers read
    the live parameters: `may_train` then refuses until they are done.

    Calls are answered one after the other, except for the waiting for digests.
    """

    def __init__(self, name: str, source: WeightSource, device: str = "cpu") -> None:
        self.name = name
        self._source = source
        self._device = device
        self._epoch = Epoch(name)
        self._slots: list[_Slot] = []
        self._next = 0
        self._version = 0  # newest that was published in this epoch, or acknowledged in any
        self._acknowledged = 0
        self._barrier = False
        self._lease = 0.0
        self._transport: Transport[Any] | None = None
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="rlbridge-digest")
        self._lock = threading.RLock()

    def handle(self, method: str, payload: bytes) -> bytes:
        """Answer one call of the session; see `rlbridge.sync.messages` for the types."""
        return answer(lambda: self._dispatch(method, payload))

    def _dispatch(self, method: str, payload: bytes) -> object:
        if method == "digests":
            return self._digests(unpack(payload, Wait))
        with self._lock:
            match method:
                case "layout":
                    return Described(self.name, self._source.layout())
                case "open":
                    return self._open(unpack(payload, OpenSource))
                case "connect":
                    return self._connect(unpack(payload, Connect))
                case "publish":
                    return self._publish(unpack(payload, Publish))
                case "send":
                    return self._send(unpack(payload, Send))
                case "acknowledge":
                    return self._acknowledge(unpack(payload, Acknowledge))
                case "close":
                    return self.close()
        raise SyncError(f"a publisher has no method {method!r}", role="trainer", rank=self.name)

    def may_train(self) -> None:
        """Refuse to change weights that peers are reading in place.

        Raises:
            LeaseError: a version was published with `barrier` and not all have it.
        """
        if not self._barrier:
            return
        for slot in self._slots:
            if slot.waiting and time.monotonic() < slot.until:
                raise LeaseError(
                    f"training would change version {slot.version} while {', '.join(sorted(slot.waiting))} reads it",
                    rank=self.name,
                    todo="wait for the sync to end, or publish with sync.publish=snapshot",
                )

    def tensors(self, version: int, slot: int, sink: str) -> list[torch.Tensor]:
        """What a transport that moves Ray objects sends to `sink`."""
        with self._lock:
            self._check_slot(version, slot)
            return self._connected().tensors(version, slot, sink)

    def close(self) -> Nothing:
        """End the epoch: deregister and free the arenas, in this order, so that no peer's read finds memory that is gone."""
        with self._lock:
            if self._transport is not None:
                self._transport.close()
            self._transport = None
            self._slots = []
            return Nothing()

    def _open(self, message: OpenSource) -> Opened:
        self._epoch.begin(message.session, message.epoch)
        self.close()
        start = time.monotonic()
        self._next = 0
        self._version = self._acknowledged  # nobody has what was published last: the version may be published again
        self._lease = message.lease_seconds
        self._barrier = message.publish == "barrier"
        share = message.share
        self._source.bind([segment.region for segment in share.segments])
        places: list[list[tuple[int, int]]] = []
        if self._barrier:
            live = self._source.live()
            _check_live(live, share.segments)
            blocks, places = _live_blocks(live)
            self._slots = [_Slot(live)]
        else:
            arenas = [Arena(share.arena_bytes, self._device) for _ in range(2)]
            blocks = [arena.tensor for arena in arenas]
            self._slots = [
                _Slot([arena.view(s.offset, s.nbytes, s.dtype, s.region.shape) for s in share.segments]) for arena in arenas
            ]
        self._transport = open_transport(message.transport, self.name, "source", message.epoch, self._device)
        return Opened(self._transport.open(blocks), time.monotonic() - start, places)

    def _connect(self, message: Connect) -> Timed:
        self._epoch.check(message.epoch)
        start = time.monotonic()
        self._connected().connect(message.peers, message.copies)
        return Timed(time.monotonic() - start)

    def _publish(self, message: Publish) -> Published:
        self._epoch.check(message.epoch, message.version)
        self._connected()
        if message.version <= self._version:
            raise StaleVersionError(
                f"version {message.version} cannot be published after version {self._version}",
                role="trainer",
                rank=self.name,
                version=message.version,
                todo="versions only grow",
            )
        index = self._next
        slot = self._slots[index]
        self._check_lease(slot)
        start = time.monotonic()
        slot.version, slot.hashed = 0, None
        if self._barrier:
            self._check_in_place(slot.segments, message.version)
        else:
            self._source.snapshot(slot.segments)
        synchronize(self._device)
        seconds = time.monotonic() - start
        self._version = slot.version = message.version
        self._next = (index + 1) % len(self._slots)
        slot.waiting = set(message.sinks)
        slot.until = time.monotonic() + self._lease
        slot.hashed = self._hasher.submit(_hash, slot.segments)
        return Published(index, seconds)

    def _check_in_place(self, registered: list[torch.Tensor], version: int) -> None:
        now = self._source.live()
        if [t.data_ptr() for t in now] != [t.data_ptr() for t in registered]:
            raise LayoutError(
                "the trainer's parameters have moved in memory since they were registered",
                role="trainer",
                rank=self.name,
                version=version,
                todo="sync again: it begins a new epoch. If they move at each step, use sync.publish=snapshot",
            )

    def _check_lease(self, slot: _Slot) -> None:
        if not slot.waiting:
            return
        peers = ", ".join(sorted(slot.waiting))
        left = slot.until - time.monotonic()
        if left > 0:
            raise LeaseError(
                f"version {slot.version} is still leased by {peers}, for {left:.1f} s more",
                role="trainer",
                rank=self.name,
                version=slot.version,
                todo="wait for the acknowledgement, or for the lease (sync.lease_seconds) to run out",
            )
        raise LeaseError(
            f"the lease of {peers} on version {slot.version} has run out: they are expelled from this epoch",
            role="trainer",
            rank=self.name,
            version=slot.version,
            expelled=peers,
            todo="the next sync begins a new epoch, with new arenas for all",
        )

    def _send(self, message: Send) -> Sent:
        self._epoch.check(message.epoch, message.version)
        self._check_slot(message.version, message.slot)
        transport = self._connected()
        start = time.monotonic()
        transport.send(message.version, message.slot, start + message.seconds)
        return Sent(time.monotonic() - start, transport.evidence())

    def _digests(self, message: Wait) -> Digests:
        with self._lock:
            self._epoch.check(message.epoch, message.version)
            hashed = next((s.hashed for s in self._slots if s.version == message.version), None)
        if hashed is None:
            raise SyncError(f"version {message.version} is not published here", rank=self.name, version=message.version)
        try:
            return hashed.result(timeout=max(message.seconds, 0.0))
        except FutureTimeoutError as error:
            raise DeadlineError(
                f"hashing did not end within {message.seconds:.1f} s", rank=self.name, version=message.version, phase="verify"
            ) from error

    def _acknowledge(self, message: Acknowledge) -> Nothing:
        self._epoch.check(message.epoch, message.version)
        for slot in self._slots:
            if slot.version != message.version:
                continue
            if self._barrier and slot.waiting and time.monotonic() >= slot.until:
                raise LeaseError(
                    f"version {slot.version} was read in place for longer than its lease: training may have changed it",
                    role="trainer",
                    rank=self.name,
                    version=slot.version,
                    todo="it is not installed; let sync.lease_seconds be longer than sync.deadline_seconds",
                )
            slot.waiting -= set(message.sinks)
            self._acknowledged = max(self._acknowledged, message.version)
        return Nothing()

    def _check_slot(self, version: int, slot: int) -> None:
        if not (slot < len(self._slots) and self._slots[slot].version == version):
            raise SyncError(f"version {version} is not in buffer {slot}", role="trainer", rank=self.name, version=version)

    def _connected(self) -> Transport[Any]:
        if self._transport is None:
            raise SyncError("no epoch is open", role="trainer", rank=self.name)
        return self._transport


def transport_backend(spec: TransportSpec) -> Backend:
    """What the spec names, its options looked at. Imports no transport.

    Raises:
        PluginError: there is no such transport.
        ValidationError: it has no such option, or another value is wanted.
    """
    registry().options_model("transport", spec.backend).model_validate(spec.options)
    return registry().backend("transport", spec.backend)


def open_transport(spec: TransportSpec, name: str, side: Literal["source", "sink"], epoch: int, device: str) -> Transport[Any]:
    """This end of the transport that the session asked for.

    Raises:
        PluginError: its backend is not installed in this environment.
        TransportError: it cannot work on this machine.
    """
    backend = registry().load("transport", spec.backend)
    options = registry().options_model("transport", spec.backend).model_validate(spec.options)
    reason = backend.unavailable(options, device)
    if reason is not None:
        raise TransportError(f"{spec.backend} cannot work here: {reason}", rank=name, phase="register")
    transport: Transport[Any] = backend(TransportContext(name, side, epoch, device, spec.options), options)
    return transport


def synchronize(device: str) -> None:
    """Wait until what was queued on the device is done: a transport, which reads and writes memory, knows no CUDA streams."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def use_device(device: str) -> None:
    """Make the device the calling thread's own: a new thread begins with the first."""
    index = torch.device(device).index
    if index is not None and device != "cpu":
        torch.accelerator.set_device_index(index)


def _hash(segments: list[torch.Tensor]) -> Digests:
    start = time.monotonic()
    joined = b"".join(digests(segments))
    return Digests(joined, time.monotonic() - start)


def _check_live(live: list[torch.Tensor], segments: list[Segment]) -> None:
    for view, segment in zip(live, segments, strict=True):
        held = str(view.dtype).removeprefix("torch.")
        if held != segment.dtype:
            raise LayoutError(
                f"the trainer holds {held} and the wire carries {segment.dtype}: live storage cannot be read in place",
                tensor=segment.region.tensor,
                todo="use sync.publish=snapshot, which casts",
            )
        if not view.is_contiguous():
            raise LayoutError(
                f"{segment.region} is not contiguous in the trainer's memory",
                tensor=segment.region.tensor,
                todo="use sync.publish=snapshot, which makes segments contiguous",
            )


def _live_blocks(live: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[list[tuple[int, int]]]]:
    """The storages behind the live views as flat byte blocks, and each view's (block, byte offset)."""
    blocks: dict[int, tuple[int, torch.Tensor]] = {}
    places = []
    for view in live:
        storage = view.untyped_storage()
        if storage.data_ptr() not in blocks:
            flat = torch.empty(0, dtype=torch.uint8, device=view.device).set_(storage)
            blocks[storage.data_ptr()] = (len(blocks), flat)
        places.append((blocks[storage.data_ptr()][0], int(view.storage_offset()) * view.element_size()))
    return [flat for _, flat in blocks.values()], [places]
