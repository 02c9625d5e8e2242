"""The reference transport: what it reads out of other processes, and how it says what stands in its way."""

from __future__ import annotations

import ctypes
import errno
import signal
import subprocess
import time
from typing import Any

import msgspec
import pytest
import torch

from rlbridge.errors import DeadlineError, PeerLostError, RlbridgeError, TransportError
from rlbridge.roles.transport import Copy, TransportContext
from rlbridge_conformance.faults.signals import send
from rlbridge_conformance.processes import ProcessParty
from rlbridge_conformance.reference import transport as wire
from rlbridge_conformance.reference.options import ReferenceTransportOptions
from rlbridge_conformance.reference.transport import ReferenceTransport


def test_transport_reads_in_buckets_within_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(wire, "time", clock)
    source, sink, blocks = connected(bucket_bytes=700, delay_seconds=0.01)
    assert sink.receive(1, 0, {}, clock.now + 5) == 3000
    assert torch.equal(blocks["sink"][:3000], blocks["source"][96:3096])
    assert (sink.evidence().wire, sink.evidence().bytes_moved) == ("cma", 3000)
    assert source.evidence().wire == ""
    blocks["sink"].zero_()
    with pytest.raises(DeadlineError, match=r"not read: trainer\[0\]"):
        sink.receive(2, 0, {}, clock.now + 0.025)
    arrived = blocks["sink"].clone()
    assert 0 < int((arrived != 0).sum()) < 3000
    time.sleep(0.03)
    assert torch.equal(blocks["sink"], arrived)
    assert sink.settled(peers_closed=False)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"source_block": 1}, "leaves the source's blocks"),
        ({"source_offset": 1097}, "leaves the source's blocks"),
        ({"sink_offset": 1001}, "leaves the sink's blocks"),
        ({"sink_offset": -1}, "leaves the sink's blocks"),
        ({"source": "trainer[7]"}, "without an address"),
    ],
)
def test_transport_refuses_copies_that_leave_the_blocks(change: dict[str, Any], what: str) -> None:
    with pytest.raises(TransportError, match=what):
        connected(change)


def test_transport_reads_another_process_also_while_it_is_stopped() -> None:
    child = ProcessParty("trainer[0]", _Source)
    sink = ReferenceTransport(TransportContext("generator[0].rank[0]", "sink", 1, "cpu", {}), ReferenceTransportOptions())
    arrived = torch.zeros(5000, dtype=torch.uint8)
    sink.open([arrived])
    sink.connect({"trainer[0]": child.do("open")}, [Copy("trainer[0]", "generator[0].rank[0]", 0, 0, 0, 0, 0, 5000)])
    child.signal(signal.SIGSTOP)
    assert sink.receive(1, 0, {}, time.monotonic() + 5) == 5000
    assert (arrived == 9).all()
    child.stop()
    with pytest.raises(PeerLostError):
        sink.receive(2, 0, {}, time.monotonic() + 5)


class Clock:
    """A `time` of which none passes but while somebody sleeps."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class _Source:
    """The source's end, in a process of its own."""

    def open(self) -> bytes:
        self._end = ReferenceTransport(TransportContext("trainer[0]", "source", 1, "cpu", {}), ReferenceTransportOptions())
        return self._end.open([torch.full((5000,), 9, dtype=torch.uint8)])


def test_transport_names_a_peer_that_is_gone() -> None:
    child = subprocess.Popen(["sleep", "60"])
    here = wire.Address(wire._here(), child.pid, wire._started(child.pid) or 0, [wire.Block(4096, 10)])
    sink = ReferenceTransport(TransportContext("generator[0].rank[0]", "sink", 1, "cpu", {}), ReferenceTransportOptions())
    sink.open([torch.zeros(10, dtype=torch.uint8)])
    copy = Copy("trainer[0]", "generator[0].rank[0]", 0, 0, 0, 0, 0, 10)
    sink.connect({"trainer[0]": packed(here)}, [copy])
    with pytest.raises(TransportError, match="begin a new one"):
        sink.receive(1, 0, {}, time.monotonic() + 5)  # nothing is mapped at 4096
    send(child.pid, signal.SIGKILL)
    with pytest.raises(PeerLostError) as error:  # a zombie: it has a pid and a start, and no memory
        sink.receive(1, 0, {}, time.monotonic() + 5)
    assert error.value.where["peer"] == "trainer[0]"
    child.wait()
    with pytest.raises(PeerLostError):
        sink.receive(1, 0, {}, time.monotonic() + 5)


@pytest.mark.parametrize(("change", "kind"), [({"started": 1}, PeerLostError), ({"where": "elsewhere"}, TransportError)])
def test_transport_refuses_another_process_of_the_same_pid(change: dict[str, Any], kind: type[RlbridgeError]) -> None:
    sink = ReferenceTransport(TransportContext("generator[0].rank[0]", "sink", 1, "cpu", {}), ReferenceTransportOptions())
    address = msgspec.structs.replace(msgspec.msgpack.decode(sink.open([]), type=wire.Address), **change)
    with pytest.raises(kind) as error:
        sink.connect({"trainer[0]": packed(address)}, [])
    assert error.value.where["peer"] == "trainer[0]"


def test_transport_loops_over_short_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = wire._readv
    monkeypatch.setattr(wire, "_readv", lambda pid, remote, local, nbytes: whole(pid, remote, local, min(nbytes, 64)))
    _, sink, blocks = connected()
    sink.receive(1, 0, {}, time.monotonic() + 5)
    assert torch.equal(blocks["sink"][:3000], blocks["source"][96:3096])


def test_transport_says_what_a_refused_read_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        ctypes.set_errno(errno.EPERM)
        return -1

    monkeypatch.setattr(wire, "_readv", refuse)
    _, sink, _ = connected()
    with pytest.raises(TransportError, match="ptrace_scope"):
        sink.receive(1, 0, {}, time.monotonic() + 5)
    assert "forbidden here" in (ReferenceTransport.unavailable(ReferenceTransportOptions(), "cpu") or "")


def test_transport_is_unavailable_where_the_call_is(monkeypatch: pytest.MonkeyPatch) -> None:
    options = ReferenceTransportOptions()
    assert ReferenceTransport.unavailable(options, "cpu") is None
    assert "cuda" in (ReferenceTransport.unavailable(options, "cuda") or "")
    monkeypatch.setattr(wire, "_process_vm_readv", None)
    assert "Linux" in (ReferenceTransport.unavailable(options, "cpu") or "")


def connected(
    change: dict[str, Any] | None = None, **options: Any
) -> tuple[ReferenceTransport, ReferenceTransport, dict[str, torch.Tensor]]:
    """A source and a sink in this process, with one copy of 3000 bytes; and their blocks."""
    chosen = ReferenceTransportOptions(**options)
    source = ReferenceTransport(TransportContext("trainer[0]", "source", 1, "cpu", {}), chosen)
    sink = ReferenceTransport(TransportContext("generator[0].rank[0]", "sink", 1, "cpu", {}), chosen)
    blocks = {"source": torch.randint(1, 256, (4096,), dtype=torch.uint8), "sink": torch.zeros(4000, dtype=torch.uint8)}
    address = source.open([blocks["source"]])
    sink.open([blocks["sink"]])
    copy = msgspec.structs.replace(Copy("trainer[0]", "generator[0].rank[0]", 0, 0, 96, 0, 0, 3000), **(change or {}))
    sink.connect({"trainer[0]": address}, [copy, msgspec.structs.replace(copy, slot=1)])
    return source, sink, blocks


def packed(address: wire.Address) -> bytes:
    return msgspec.msgpack.encode(address)
