"""The source side of a sync, in every trainer rank. Needs no Ray."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field
from typing import Any

import torch

from rlbridge.errors import DeadlineError, LayoutError, LeaseError, StaleVersionError, SyncError
from rlbridge.plugins import registry
from rlbridge.roles.source import WeightSource
from rlbridge.roles.transport import Transport, TransportContext
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
    Timed,
    TransportSpec,
    Wait,
    answer,
    unpack,
)
from rlbridge.weights.arena import Arena
from rlbridge.weights.digest import digests


@dataclass
class _Slot:
    """One buffer that can hold a version; `waiting` are the sinks that have not acknowledged it."""

    segments: list[torch.Tensor]
    version: int = 0
    waiting: set[str] = field(default_factory=set)
    until: float = 0.0


class Publisher:
    """Makes versions of a `WeightSource` readable, and keeps each unchanged until every subscriber has it.

    Publishing "snapshot" copies into one of two arenas, so training goes on at once. Publishing "barrier" lets the peers read
    the live parameters: `may_train` then refuses until they are done.
    """

    def __init__(self, name: str, source: WeightSource, device: str = "cpu") -> None:
        self.name = name
        self._source = source
        self._device = device
        self._slots: list[_Slot] = []
        self._version = 0
        self._barrier = False
        self._lease = 0.0
        self._transport: Transport[Any] | None = None
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="rlbridge-digest")
        self._hashes: dict[int, Future[Digests]] = {}

    def handle(self, method: str, payload: bytes) -> bytes:
        """Answer one call of the session; see `rlbridge.sync.messages` for the types."""
        return answer(lambda: self._dispatch(method, payload))

    def _dispatch(self, method: str, payload: bytes) -> object:
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
            case "digests":
                return self._digests(unpack(payload, Wait))
            case "acknowledge":
                return self._acknowledge(unpack(payload, Acknowledge))
            case "evidence":
                return self._connected().evidence()
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
        self._check_slot(version, slot)
        return self._connected().tensors(version, slot, sink)

    def close(self) -> Nothing:
        """End the epoch: deregister and free the arenas."""
        if self._transport is not None:
            self._transport.close()
        self._transport = None
        self._slots = []
        self._hashes = {}
        return Nothing()

    def _open(self, message: OpenSource) -> Opened:
        self.close()
        start = time.monotonic()
        self._lease = message.lease_seconds
        self._barrier = message.publish == "barrier"
        share = message.share
        self._source.bind([segment.region for segment in share.segments])
        places: list[list[tuple[int, int]]] = []
        if self._barrier:
            live = self._source.live()
            _check_live(live, [s.dtype for s in share.segments])
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
        start = time.monotonic()
        self._connected().connect(message.peers, message.copies)
        return Timed(time.monotonic() - start)

    def _publish(self, message: Publish) -> Published:
        if message.version <= self._version:
            raise StaleVersionError(
                f"version {message.version} cannot be published after version {self._version}",
                role="trainer",
                rank=self.name,
                version=message.version,
                todo="versions only grow",
            )
        index = message.version % len(self._slots)
        slot = self._slots[index]
        self._check_lease(slot)
        start = time.monotonic()
        if not self._barrier:
            self._source.snapshot(slot.segments)
        else:
            slot.segments = self._source.live()
        seconds = time.monotonic() - start
        self._version = slot.version = message.version
        slot.waiting = set(message.sinks)
        slot.until = time.monotonic() + self._lease
        segments = slot.segments
        self._hashes = {v: f for v, f in self._hashes.items() if v > message.version - 2}
        self._hashes[message.version] = self._hasher.submit(_hash, segments)
        return Published(index, seconds)

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
            todo="the next sync begins a new epoch without what they were reading",
        )

    def _send(self, message: Send) -> Timed:
        self._check_slot(message.version, message.slot)
        start = time.monotonic()
        self._connected().send(message.version, message.slot, start + message.seconds)
        return Timed(time.monotonic() - start)

    def _digests(self, message: Wait) -> Digests:
        if message.version not in self._hashes:
            raise SyncError(f"version {message.version} is not published here", rank=self.name, version=message.version)
        try:
            return self._hashes[message.version].result(timeout=message.seconds)
        except FutureTimeoutError as error:
            raise DeadlineError(
                f"hashing did not end within {message.seconds:.1f} s", rank=self.name, version=message.version, phase="verify"
            ) from error

    def _acknowledge(self, message: Acknowledge) -> Nothing:
        for slot in self._slots:
            if slot.version == message.version:
                slot.waiting -= set(message.sinks)
        return Nothing()

    def _check_slot(self, version: int, slot: int) -> None:
        if not (slot < len(self._slots) and self._slots[slot].version == version):
            raise SyncError(f"version {version} is not in buffer {slot}", role="trainer", rank=self.name, version=version)

    def _connected(self) -> Transport[Any]:
        if self._transport is None:
            raise SyncError("no epoch is open", role="trainer", rank=self.name)
        return self._transport


def open_transport(spec: TransportSpec, name: str, side: Any, epoch: int, device: str) -> Transport[Any]:
    """This end of the transport that the session asked for.

    Raises:
        PluginError: its backend is not installed in this environment.
    """
    backend = registry().load("transport", spec.backend)
    options = registry().options_model("transport", spec.backend).model_validate(spec.options)
    transport: Transport[Any] = backend(TransportContext(name, side, epoch, device, spec.options), options)
    return transport


def _hash(segments: list[torch.Tensor]) -> Digests:
    start = time.monotonic()
    joined = b"".join(digests(segments))
    return Digests(joined, time.monotonic() - start)


def _check_live(live: list[torch.Tensor], dtypes: list[str]) -> None:
    for view, dtype in zip(live, dtypes, strict=True):
        held = str(view.dtype).removeprefix("torch.")
        if held != dtype:
            raise LayoutError(
                f"the trainer holds {held} and the wire carries {dtype}: live storage cannot be read in place",
                todo="use sync.publish=snapshot, which casts",
            )
        if not view.is_contiguous():
            raise LayoutError(
                f"a segment of shape {tuple(view.shape)} is not contiguous in the trainer's memory",
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
        places.append((blocks[storage.data_ptr()][0], view.storage_offset() * view.element_size()))
    return [flat for _, flat in blocks.values()], [places]
