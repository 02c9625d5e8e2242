"""The `shm` transport: a source leaves a version in shared memory, a file for each sink, and the sink takes it away."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlbridge import Backend, Capability, hookimpl
from rlbridge.errors import DeadlineError, TransportError
from rlbridge.roles.transport import Copy, Transport, TransportContext, TransportOptions, WireEvidence

_SHM = Path("/dev/shm")


@hookimpl
def rlbridge_transports() -> Sequence[Backend]:
    """The backend `shm`."""
    capabilities = frozenset({Capability.ABORTABLE, Capability.LIVE_STORAGE})
    return [Backend("shm", "shm_transport:ShmTransport", "Shared memory of one host", capabilities=capabilities)]


class ShmTransport(Transport[TransportOptions]):
    """One end of the wire, for one epoch."""

    @classmethod
    def unavailable(cls, options: TransportOptions, device: str) -> str | None:
        """It needs /dev/shm, and weights in the memory of the host."""
        if device != "cpu":
            return f"it copies memory of the host, and the weights are on {device}"
        return None if os.access(_SHM, os.W_OK) else f"{_SHM} is no directory that can be written to"

    def __init__(self, context: TransportContext, options: TransportOptions) -> None:
        self._context = context
        self._name = f"rlbridge-{uuid.uuid4().hex}"  # new in each epoch, so that nothing of an earlier one is taken
        self._peers: dict[str, str] = {}
        self._copies: Sequence[Copy] = []
        self._moved = 0

    def open(self, blocks: Sequence[Any]) -> bytes:
        """The address is what the names of this end's files begin with."""
        self._blocks = [memoryview(block.numpy()) for block in blocks]  # the same memory
        return self._name.encode()

    def connect(self, peers: Mapping[str, bytes], copies: Sequence[Copy]) -> None:
        """Both ends see the copies between them in the same order, so a file needs no table of contents."""
        self._peers = {name: address.decode() for name, address in peers.items()}
        self._copies = copies

    def send(self, version: int, slot: int, deadline: float) -> None:
        """A file gets its name when all is in it."""
        for sink in self._peers:
            part = _SHM / f"{self._name}.part"
            try:
                with part.open("wb", buffering=0) as file:
                    for copy in self._between(self._context.name, sink, slot):
                        _all(file.write, self._blocks[copy.source_block][copy.source_offset :][: copy.nbytes], sink, deadline)
            except OSError as error:
                part.unlink(missing_ok=True)
                raise TransportError(f"{_SHM}: {error.strerror}", peer=sink, version=version, todo=f"df -h {_SHM}") from error
            part.rename(self._path(self._name, sink, version))

    def receive(self, version: int, slot: int, tensors: Mapping[str, list[Any]], deadline: float) -> int:
        """Wait for the file of each source, read it into place, and remove it."""
        wanted = {source: self._between(source, self._context.name, slot) for source in self._peers}
        for source, copies in wanted.items():
            path = self._path(self._peers[source], self._context.name, version)
            while not path.exists():
                _in_time(source, deadline)
                time.sleep(0.0005)
            with path.open("rb", buffering=0) as file:
                for copy in copies:
                    _all(file.readinto, self._blocks[copy.sink_block][copy.sink_offset :][: copy.nbytes], source, deadline)
            path.unlink()
        received = sum(copy.nbytes for copies in wanted.values() for copy in copies)
        self._moved += received
        return received

    def evidence(self) -> WireEvidence:
        """A source reports no wire: the sinks do."""
        wire = "shm" if self._context.side == "sink" else ""
        return WireEvidence("shm", wire, "this transport writes and reads the files itself", self._moved)

    def close(self) -> None:
        """Either end removes the files of both, since the other one may have been killed."""
        for name in [self._name, *self._peers.values()]:
            for path in _SHM.glob(f"{name}.*"):
                path.unlink(missing_ok=True)

    def _between(self, source: str, sink: str, slot: int) -> list[Copy]:
        return [copy for copy in self._copies if (copy.source, copy.sink, copy.slot) == (source, sink, slot)]

    def _path(self, name: str, sink: str, version: int) -> Path:
        return _SHM / f"{name}.{sink}.{version}"


def _all(move: Any, view: memoryview, peer: str, deadline: float) -> None:
    """Write or read all of a copy, a piece at a time; a call may move less than it was asked to."""
    while view:
        _in_time(peer, deadline)
        moved = move(view[: 1 << 20])
        if not moved:
            raise TransportError("a file ends before its copies do", peer=peer)
        view = view[moved:]


def _in_time(peer: str, deadline: float) -> None:
    if time.monotonic() > deadline:
        raise DeadlineError("it was not done in time", peer=peer, phase="wire")
