"""Level rdma: the wire is proven by counters, and no other wire steps in."""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from rlbridge.errors import TransportError
from rlbridge.rdma.counters import counted, counters
from rlbridge.roles.transport import Side
from rlbridge.sync.messages import TransportSpec
from rlbridge_conformance import by_hand
from rlbridge_conformance.by_hand import copies
from rlbridge_conformance.checks import Mismatch, check, expect, holds
from rlbridge_conformance.disturbed import attempt
from rlbridge_conformance.faults import SuiteError
from rlbridge_conformance.faults.locked import lock_little
from rlbridge_conformance.faults.machine import lacks
from rlbridge_conformance.faults.network import Link
from rlbridge_conformance.members import Member
from rlbridge_conformance.probes import registrations
from rlbridge_conformance.run import Stages, not_run
from rlbridge_conformance.stage import Stage
from rlbridge_conformance.suite.test_faults import lose
from rlbridge_conformance.suite.test_links import over

_BULK_MIB = 4
_PACKET = 4096
_SECONDS = 10.0
_TRIES = 3
"""Syncs until one has to have had the ports to itself."""

_PATIENCE = 10.0
"""Times the short deadlines of a disturbed sync: the kernel gives a peer up after some seconds of silence."""

_REFUSED = ("TransportError", "PeerLostError", "DeadlineError")
_SIZES = (64, 4096, 257, 1, 12288)
"""Bytes of the copies that a version is cut into, in turn: less than a packet, one, some."""

_ACTS = pytest.mark.parametrize("acts", ["sink", "source"])
"""Which end acts: a one-sided READ, a one-sided WRITE."""

_over_ports = functools.partial(
    check, "rdma", "transport", needs=["transport.rdma", "transport.plain_processes"], machine=["rdma"]
)


@_over_ports()
@_ACTS
@pytest.mark.parametrize("cut", ["large", "small"])
def test_the_ports_count_the_bytes(stages: Stages, cut: str, acts: Side) -> None:
    """Of one large tensor, and of many small copies: no fewer than arrived, and no more than the protocol adds."""
    stage = _stage(stages)
    with _session(stages, stage, acts), copies(by_hand.shredded(_SIZES)) if cut == "small" else contextlib.nullcontext():
        attached = stage.session.attach()
        stage.sync()
        seen = []
        for _ in range(_TRIES):
            stage.train()
            before = counters()
            moved = stage.sync().bytes
            counts = counted(before, counters())
            if counts is None:
                raise Mismatch("the RDMA ports of this machine count", "a counter", "none")
            holds(counts.received >= moved, "the RDMA ports have received a sync", f"{moved} bytes or more", counts)
            stage.holds(stage.saved())
            seen.append(counts.received)
            most = _most(moved, attached.copies, exact=counts.exact)
            if counts.received <= most:
                stages.remark(f"{moved} bytes: {counts.received} by {counts.known_from}{'' if counts.exact else ', at most'}")
                return
        raise Mismatch("the RDMA ports have received little more than a sync", f"{moved} to {most} bytes", seen)


@_over_ports()
@_ACTS
def test_the_evidence_names_an_rdma_wire(stages: Stages, acts: Side) -> None:
    stage = _stage(stages)
    with _session(stages, stage, acts):
        evidence = stage.sync().evidence
    holds(
        bool(evidence) and all(said.rdma for said in evidence),
        "the transport's own report names only RDMA wires",
        "RDMA, and nothing else",
        [said.wire for said in evidence],
    )


@_over_ports()
@_ACTS
def test_the_next_sync_registers_nothing(stages: Stages, acts: Side) -> None:
    """By the transport's own count, and by the kernel's where it can be asked."""
    stage = _stage(stages)
    claims = stages.triple.claims("transport")
    members = [(m, "trainer") for m in stage.trainers] + [(m, "generator") for m in stage.engines]

    def registered() -> tuple[object, ...]:
        return _kernel_regions(), *(m.apply(registrations, role, claims.registrations) for m, role in members)

    with _session(stages, stage, acts):
        stage.sync()
        before = registered()
        for _ in range(2):
            stage.train()
            stage.sync()
            expect("what is registered with the RDMA devices, and by each end", before, registered())


@_over_ports()
@_ACTS
def test_several_engines_receive_by_rdma(stages: Stages, acts: Side) -> None:
    """At once, and each all of it."""
    stage = _stage(stages)
    with _session(stages, stage, acts):
        for _ in range(2):
            stage.train()
            report = stage.sync()
            ports = stage.session.attached.sinks if stage.session.attached else []
            expect("the engines whose hosts' RDMA ports have counted", sorted(ports), sorted(report.ports))
            stage.holds(stage.saved())


@_over_ports()
@pytest.mark.parametrize("victim", ["trainer[0]", "generator[0]"])
def test_a_peer_dies_over_rdma(stages: Stages, victim: str) -> None:
    """Killed in the middle of a transfer: the sync ends in an error that names it, and the next one brings everything."""
    stage = _stage(stages)
    with _session(stages, stage, "sink"):
        lose(stage, victim, "wire", "during", "killed", _PATIENCE)


@_over_ports()
def test_receive_ends_after_the_last_byte(stages: Stages) -> None:
    """Looked at in the same thread as soon as it returns: a completion is no promise that bytes will come."""
    with _lent(stages) as (_, sink, spec, address):
        said = sink.apply(by_hand.borrow, spec, address, _SECONDS)
        expect("what has arrived when receive returns", f"{by_hand.LENT} bytes", said)


@_over_ports()
def test_a_wrong_key_is_refused(stages: Stages) -> None:
    """An address in which the key of the memory is another one: an error, and not a byte."""
    if shutil.which("rdma") is None:
        not_run("there is no program rdma (iproute2) to ask the kernel for the keys")
    with _lent(stages) as (source, sink, spec, address):
        keys = _kernel_keys(source.pid)
        forged = functools.reduce(lambda found, key: found.replace(key, _other(key)), keys, address)
        if forged == address:
            not_run("the transport's address does not show the keys of its memory")
        said = sink.apply(by_hand.borrow, spec, forged, _SECONDS)
        holds(said.startswith(_REFUSED), "reading memory with a wrong key ends in an error", " or ".join(_REFUSED), said)
        sink.apply(by_hand.let_go)
        said = sink.apply(by_hand.borrow, spec, address, _SECONDS)
        expect("what arrives with the right key", f"{by_hand.LENT} bytes", said)


@_over_ports()
def test_an_end_that_was_closed_is_not_read(stages: Stages) -> None:
    """Its address is known, and its memory still there: an error by the deadline."""
    with _lent(stages) as (source, sink, spec, address):
        said = sink.apply(by_hand.borrow, spec, address, _SECONDS)
        expect("what arrives before", f"{by_hand.LENT} bytes", said)
        source.apply(by_hand.let_go)
        said = sink.apply(by_hand.borrow_again, _SECONDS)
        holds(said.startswith(_REFUSED), "reading from an end that is closed ends in an error", " or ".join(_REFUSED), said)


@_over_ports()
def test_memory_that_may_not_be_locked_is_an_error(stages: Stages) -> None:
    """A process that may lock less than its arena says so, and what to do, when the epoch begins."""
    stage = stages.fresh({"generator": lock_little}, bulk_mib=1, model="awkward", transport=_options(stages, "sink"))
    error = attempt(stage.session.attach)
    holds(isinstance(error, TransportError), "the epoch fails", TransportError.__name__, repr(error))
    holds("MEMLOCK" in str(error), "the error names the limit", "RLIMIT_MEMLOCK", str(error))


@check("rdma", "transport", needs=["transport.cross_host", "transport.plain_processes"], machine=["network_namespaces", "tun"])
def test_the_interface_counts_the_bytes(stages: Stages) -> None:
    """Two network namespaces, joined by one link: its counters are not the transport's."""
    with Link(proxy=True) as link:
        stage = over(link, stages, bulk_mib=_BULK_MIB)
        stage.train()
        before = link.bytes()[1].received
        moved = stage.sync().bytes
        counted = link.bytes()[1].received - before
        holds(counted >= moved, "the interface has received the bytes of a sync", f"{moved} bytes or more", f"{counted}")
        stage.holds(stage.saved())


@check("rdma", "transport", needs=["transport.cross_host", "transport.plain_processes"])
def test_no_other_wire_steps_in(stages: Stages) -> None:
    """A wire that is not there: the sync fails, whatever else would do."""
    claims = stages.triple.claims("transport")
    impossible = {"the network interface nowhere0": claims.over_network("nowhere0")}
    if lacks("rdma") is not None and claims.claims("rdma"):
        impossible["RDMA, which this machine has not,"] = claims.over_rdma()
    asked = {what: options for what, options in impossible.items() if options is not None}
    if not asked:
        not_run("the transport has no option that forbids its other wires")
    for what, options in asked.items():
        error = attempt(lambda options=options: stages(transport=options).sync())  # type: ignore[misc]
        if error is None:
            raise Mismatch(f"a sync that is to go over {what} fails", "TransportError", "it went over another wire")
        expect(f"the error of a wire that is not there ({what})", "TransportError", type(error).__name__)


def _most(moved: int, number: int, *, exact: bool) -> int:
    """The most that the ports may count for a sync: what the bytes are, and what the protocol adds for each copy and in all.

    Where packets are counted, requests and acknowledgements count like packets that are full.
    """
    return moved * (5 if exact else 10) // 4 + 8 * number * _PACKET + (1 << 20)


def _kernel_regions() -> int | None:
    """How many memory regions are registered with the RDMA devices of this machine; None: there is nobody to ask."""
    return None if shutil.which("rdma") is None else sum(device.get("mr", 0) for device in _resources())


def _kernel_keys(pid: int) -> list[bytes]:
    """The keys of a process's memory regions, as its addresses hold them: four bytes in the machine's order."""
    threads = {int(path.name) for path in Path(f"/proc/{pid}/task").iterdir()}  # the kernel names the thread that registered
    return [int(region["rkey"], 16).to_bytes(4, sys.byteorder) for region in _resources("mr") if region.get("pid") in threads]


def _other(key: bytes) -> bytes:
    return bytes([key[0] ^ 0x7F, *key[1:]])


def _resources(*kind: str) -> list[dict[str, Any]]:
    """What the kernel says of the RDMA devices' resources."""
    command = ["rdma", "-j", "resource", "show", *kind]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=30)
    if shown.returncode != 0:
        raise SuiteError(f"{' '.join(command)} failed: {shown.stderr.strip()}")
    found: list[dict[str, Any]] = json.loads(shown.stdout)
    return found


@contextlib.contextmanager
def _lent(stages: Stages) -> Iterator[tuple[Member, Member, TransportSpec, bytes]]:
    """A trainer rank that lends some memory, an engine that may borrow it, over which wire, and at what address."""
    stage = _stage(stages)
    options = stages.triple.validated("transport", _options(stages, "sink"))
    spec = TransportSpec(stages.triple.transport.name, options.model_dump(mode="json"))
    source, sink = stage.trainers[0], stage.engines[0]
    try:
        yield source, sink, spec, source.apply(by_hand.lend, spec)
    finally:
        sink.apply(by_hand.let_go)
        source.apply(by_hand.let_go)


def _stage(stages: Stages) -> Stage:
    """The stage of nearly all checks: a trainer rank and two engines, with one tensor that is large."""
    keep = {"keep_dtypes": True}
    return stages(
        engines=2, model="awkward", bulk_mib=_BULK_MIB, trainer=keep, generator=keep, transport=_options(stages, "sink")
    )


def _session(stages: Stages, stage: Stage, acts: Side) -> contextlib.AbstractContextManager[None]:
    """Another session of the stage's, over RDMA, in which that end acts."""
    return stage.another_session(transport=_options(stages, acts))


def _options(stages: Stages, acts: Side) -> Mapping[str, Any]:
    """Those with which the transport goes over RDMA or fails, and that end acts.

    A transport of which only one end ever acts is taken as it is.
    """
    claims = stages.triple.claims("transport")
    over_rdma = claims.over_rdma()
    if over_rdma is None:
        not_run("the transport has no option that forbids its other wires")
    acting = claims.acting(acts)
    if acting is None and acts == "source":
        pytest.skip("not claimed by the transport: acting, of the source")
    return {**(over_rdma or {}), **(acting or {})}
