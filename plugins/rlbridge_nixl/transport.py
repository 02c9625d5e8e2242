"""NIXL between the arenas: transfers are prepared once an epoch and posted again for each version.

With a READ the sinks act and the sources' memory is passive. With a WRITE the sources act, and NIXL's completion notes, which
are delivered after the bytes, tell each sink that a source is done.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
import torch

from rlbridge.errors import DeadlineError, PeerLostError, QuarantineError, TransportError
from rlbridge.rdma import ucx
from rlbridge.rdma.devices import has_rdma_device
from rlbridge.rdma.doctor import memory_lock
from rlbridge.roles.transport import Copy, Transport, TransportContext, WireEvidence
from rlbridge_nixl import agent as nixl_face
from rlbridge_nixl.options import NixlOptions

_log = logging.getLogger(__name__)
_POLL_SECONDS = 0.0002


_POOLS = 128 << 20
"""Bytes that UCX registers for itself beside the blocks, amply: 68 MB, by the kernel's count (UCX 1.23, one device)."""

_ONE_HOST = ("cma", "sysv", "posix", "xpmem", "knem", "cuda_ipc")


class _Block(msgspec.Struct, frozen=True):
    address: int
    nbytes: int
    device: int
    kind: str


class _Address(msgspec.Struct, frozen=True):
    agent: str
    metadata: bytes
    blocks: list[_Block]


class _Transfer(msgspec.Struct):
    """A prepared transfer with one peer out of one slot."""

    peer: str
    handle: Any
    nbytes: int
    state: str = "IDLE"


class NixlTransport(Transport[NixlOptions]):
    """One end of a NIXL wire."""

    @classmethod
    def unavailable(cls, options: NixlOptions, device: str) -> str | None:
        """NIXL's wheel is for Linux; a wire may need hardware."""
        if options.wire == "rdma" and not has_rdma_device():
            return "transport.wire=rdma, and this machine has no RDMA device (/sys/class/infiniband is empty)"
        return None

    def __init__(self, context: TransportContext, options: NixlOptions) -> None:
        self._context = context
        self._options = options
        self._acts = (options.operation == "read") == (context.side == "sink")
        self._check_lock(0)  # an agent that may lock too little is never finished with (NIXL 1.5.1)
        self._agent: Any
        self._agent, self._agent_name = nixl_face.make_agent(context.name, options.wire, options.net_devices, context.device)
        self._blocks: list[torch.Tensor] = []
        self._registered: Any = None
        self._peers: dict[str, str] = {}  # the peer's name in the session -> its agent
        self._transfers: dict[int, list[_Transfer]] = {}
        self._expected: dict[str, int] = {}  # sink of a WRITE: bytes to come from each source
        self._notes: dict[int, set[str]] = {}  # sink of a WRITE: who has finished writing which version
        self._awaited: int | None = None
        self._moved = 0

    def open(self, blocks: Sequence[torch.Tensor]) -> bytes:
        self._blocks = list(blocks)
        if self._blocks:
            self._registered = self._register()
        described = [_Block(b.data_ptr(), b.numel(), nixl_face.device_id(b), nixl_face.memory_kind(b)) for b in self._blocks]
        return msgspec.msgpack.encode(_Address(self._agent_name, self._agent.get_agent_metadata(), described))

    def _register(self) -> Any:
        nbytes = sum(block.numel() for block in self._blocks)
        self._check_lock(nbytes)
        try:
            return self._agent.register_memory(self._blocks)
        except Exception as error:
            raise TransportError(
                f"NIXL cannot register {nbytes} bytes: {type(error).__name__}: {error}",
                rank=self._context.name,
                phase="register",
                todo="rlbridge doctor --rdma, in the environment and with the limits of this rank, says what is in the way",
            ) from error

    def _check_lock(self, nbytes: int) -> None:
        """Refuse to begin what this process may not lock, where an RDMA device may be used."""
        limit = memory_lock()
        if limit is None or self._options.wire not in ("any", "rdma") or not has_rdma_device():
            return
        if limit < nbytes + _POOLS:
            raise TransportError(
                f"RLIMIT_MEMLOCK is {limit} bytes; RDMA takes {nbytes + _POOLS}: of the arena {nbytes}, the rest of UCX's own",
                rank=self._context.name,
                phase="register",
                todo="ulimit -l unlimited before ray start, docker --ulimit memlock=-1, LimitMEMLOCK=infinity in the service;"
                " or transport.wire=tcp",
            )

    def connect(self, peers: Mapping[str, bytes], copies: Sequence[Copy]) -> None:
        addresses = {name: msgspec.msgpack.decode(raw, type=_Address) for name, raw in peers.items()}
        for name, address in addresses.items():
            self._agent.add_remote_agent(address.metadata)
            self._peers[name] = address.agent
        if self._acts:
            self._prepare(addresses, copies)
        elif self._context.side == "sink":
            for copy in copies:
                if copy.slot == 0:
                    self._expected[copy.source] = self._expected.get(copy.source, 0) + copy.nbytes

    def send(self, version: int, slot: int, deadline: float) -> None:
        if self._acts:
            self._run(version, slot, deadline)

    def receive(self, version: int, slot: int, tensors: Mapping[str, list[torch.Tensor]], deadline: float) -> int:
        if self._acts:
            return self._run(version, slot, deadline)
        return self._await_notes(version, deadline)

    def settled(self, peers_closed: bool) -> bool:
        if not self._acts:
            self._collect_notes()
            return peers_closed or self._awaited is None or not self._missing(self._awaited)
        return not any(self._in_flight(t) for transfers in self._transfers.values() for t in transfers)

    def evidence(self) -> WireEvidence:
        if not self._acts:
            return WireEvidence("nixl", "", "the other end acts")
        wires = nixl_face.wires_used(self._agent_name, self._options.operation)
        if not wires:
            return WireEvidence("nixl", "unknown", "UCX reported no protocol; bytes by NIXL telemetry", self._moved)
        known = "UCX protocol report; bytes by NIXL telemetry"
        return WireEvidence("nixl", "+".join(wires), known, self._moved, ucx.is_rdma(wires))

    def close(self) -> None:
        """Give everything back, whatever state the peers are in; the agent ends here, and with it all that it still sends.

        A READ that is in flight must be waited for first (`settled`): over TCP the source's process is aborted by UCX 1.23
        ("Fatal: unexpected error: Endpoint timeout") when it goes on and finds that the reader has hung up.
        """
        if self._agent is None:
            return
        for transfer in [t for transfers in self._transfers.values() for t in transfers]:
            with _best_effort("release a transfer"):
                self._agent.release_xfer_handle(transfer.handle)
        for agent in self._peers.values():
            with _best_effort("forget a peer"):
                self._agent.remove_remote_agent(agent)
        if self._registered is not None:
            with _best_effort("deregister memory"):
                self._agent.deregister_memory(self._registered)
        self._transfers, self._peers, self._registered, self._agent = {}, {}, None, None
        self._blocks = []

    def _prepare(self, addresses: Mapping[str, _Address], copies: Sequence[Copy]) -> None:
        read = self._options.operation == "read"
        groups: dict[tuple[int, str], list[Copy]] = {}
        for copy in copies:
            groups.setdefault((copy.slot, copy.source if read else copy.sink), []).append(copy)
        for (slot, peer), group in sorted(groups.items()):
            local, remote = [], []
            for copy in group:
                here = (copy.sink_block, copy.sink_offset) if read else (copy.source_block, copy.source_offset)
                there = (copy.source_block, copy.source_offset) if read else (copy.sink_block, copy.sink_offset)
                block = addresses[peer].blocks[there[0]]
                local.append(
                    (self._blocks[here[0]].data_ptr() + here[1], copy.nbytes, nixl_face.device_id(self._blocks[here[0]]))
                )
                remote.append((block.address + there[1], copy.nbytes, block.device))
            handle = self._agent.initialize_xfer(
                self._options.operation.upper(),
                nixl_face.descriptors(self._agent, local, nixl_face.memory_kind(self._blocks[0])),
                nixl_face.descriptors(self._agent, remote, addresses[peer].blocks[0].kind),
                self._peers[peer],
                b"",
            )
            self._transfers.setdefault(slot, []).append(_Transfer(peer, handle, sum(c.nbytes for c in group)))

    def _run(self, version: int, slot: int, deadline: float) -> int:
        """Post every transfer of the slot, then wait for all."""
        transfers = self._transfers.get(slot, [])
        busy = [t.peer for t in transfers if t.state == "PROC"]
        if busy:
            raise QuarantineError(
                f"an earlier transfer with {busy[0]} is not over", peer=busy[0], version=version, phase="wire"
            )
        note = f"{self._context.epoch}:{version}".encode() if self._options.operation == "write" else b""
        for transfer in transfers:
            transfer.state = self._guarded(transfer, lambda t=transfer: self._agent.transfer(t.handle, note))
        waiting = [t for t in transfers if t.state == "PROC"]
        while waiting := [t for t in waiting if self._poll(t) == "PROC"]:
            if time.monotonic() > deadline:
                raise DeadlineError(
                    f"{', '.join(sorted({t.peer for t in waiting}))} did not answer a NIXL {self._options.operation}",
                    peer=waiting[0].peer,
                    version=version,
                    phase="wire",
                )
            time.sleep(_POLL_SECONDS)
        moved = sum(self._finished(t, version) for t in transfers)
        self._moved += moved
        if moved:
            self._check_wire()
        return moved

    def _finished(self, transfer: _Transfer, version: int) -> int:
        """The bytes that NIXL says it has moved, which have to be all."""
        if transfer.state != "DONE":
            raise TransportError(f"NIXL reports {transfer.state}", peer=transfer.peer, version=version)
        moved = int(self._agent.get_xfer_telemetry(transfer.handle).totalBytes)
        if moved != transfer.nbytes:
            raise TransportError(f"NIXL moved {moved} of {transfer.nbytes} bytes", peer=transfer.peer, version=version)
        return moved

    def _await_notes(self, version: int, deadline: float) -> int:
        """Wait until every source has said that its WRITE of `version` is done."""
        self._awaited = version
        while missing := self._missing(version):
            self._collect_notes()
            if time.monotonic() > deadline:
                raise DeadlineError(
                    f"{', '.join(sorted(missing))} did not finish writing", peer=min(missing), version=version, phase="wire"
                )
            time.sleep(_POLL_SECONDS)
        self._awaited = None
        self._notes = {v: names for v, names in self._notes.items() if v > version}
        return sum(self._expected.values())

    def _missing(self, version: int) -> set[str]:
        return set(self._expected) - self._notes.get(version, set())

    def _collect_notes(self) -> None:
        sources = {agent: name for name, agent in self._peers.items()}
        for agent, notes in self._agent.get_new_notifs().items():
            for note in notes:
                epoch, _, version = note.decode().partition(":")
                if int(epoch) == self._context.epoch and agent in sources:
                    self._notes.setdefault(int(version), set()).add(sources[agent])

    def _in_flight(self, transfer: _Transfer) -> bool:
        if transfer.state == "PROC":
            with contextlib.suppress(PeerLostError, TransportError):  # it is over then too, and its state says so
                self._poll(transfer)
        return transfer.state == "PROC"

    def _poll(self, transfer: _Transfer) -> str:
        transfer.state = self._guarded(transfer, lambda: self._agent.check_xfer_state(transfer.handle))
        return transfer.state

    def _guarded(self, transfer: _Transfer, call: Any) -> str:
        """The state of a transfer; a peer that is gone is our error."""
        try:
            return str(call())
        except Exception as error:
            transfer.state = "ERR"
            kind = type(error).__name__
            if "RemoteDisconnect" in kind or "Canceled" in kind:
                raise PeerLostError(f"the connection broke ({kind})", peer=transfer.peer, phase="wire") from error
            raise TransportError(f"NIXL failed: {kind}: {error}", peer=transfer.peer, phase="wire") from error

    def _check_wire(self) -> None:
        """The wire asked for is the wire used, or the sync fails."""
        wanted = self._options.wire
        if wanted == "any":
            return
        used = ucx.wires(nixl_face.wires_used(self._agent_name, self._options.operation))
        fits = {"shm": _ONE_HOST, "tcp": ("tcp",), "rdma": ucx.RDMA}[wanted]
        strange = [w for w in used if not w.startswith(fits)]
        if strange or not used:
            raise TransportError(
                f"the bytes went by {', '.join(strange) or 'an unknown wire'}, not by {wanted}",
                rank=self._context.name,
                todo="transport.wire says which wire has to be used; transport.wire=any allows all",
            )


@contextlib.contextmanager
def _best_effort(what: str) -> Iterator[None]:
    """For the end of an agent: a peer that is gone makes NIXL fail there, and what is left ends with the agent."""
    try:
        yield
    except Exception as error:
        _log.debug("NIXL could not %s: %s: %s", what, type(error).__name__, error)
