"""Level rdma: the wire is proven by counters, and no other wire steps in."""

from __future__ import annotations

from pathlib import Path

from rlbridge_conformance.checks import Mismatch, check, expect, holds
from rlbridge_conformance.disturbed import attempt
from rlbridge_conformance.faults.machine import lacks
from rlbridge_conformance.faults.network import Link
from rlbridge_conformance.run import Stages, not_run
from rlbridge_conformance.stage import Stage
from rlbridge_conformance.suite.test_links import over

_DEVICES = Path("/sys/class/infiniband")
_WIRES = ("rc", "dc", "ud")
"""How UCX's names of RDMA wires begin."""

_BULK_MIB = 8


@check("rdma", "transport", needs=["transport.rdma", "transport.plain_processes"], machine=["rdma"])
def test_the_ports_count_the_bytes(stages: Stages) -> None:
    stage = _over_rdma(stages)
    stage.sync()
    before = port_bytes()
    moved = stage.sync().bytes
    counted = port_bytes() - before
    holds(counted >= moved, "the RDMA ports have received the bytes of a sync", f"{moved} bytes or more", f"{counted}")


@check("rdma", "transport", needs=["transport.rdma", "transport.plain_processes"], machine=["rdma"])
def test_the_evidence_names_an_rdma_wire(stages: Stages) -> None:
    stage = _over_rdma(stages)
    wires = {evidence.wire for evidence in stage.sync().evidence}
    holds(
        bool(wires) and all(part.startswith(_WIRES) for wire in wires for part in wire.split("+")),
        "the transport's own report names only RDMA wires",
        " or ".join(_WIRES),
        sorted(wires),
    )


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


def port_bytes() -> int:
    """Bytes that the RDMA ports of this machine have received: the counters are in words of four bytes."""
    return sum(int(file.read_text()) * 4 for file in _DEVICES.glob("*/ports/*/counters/port_rcv_data"))


def _over_rdma(stages: Stages) -> Stage:
    options = stages.triple.claims("transport").over_rdma()
    if options is None:
        not_run("the transport has no option that forbids its other wires")
    return stages(
        model="awkward",
        bulk_mib=_BULK_MIB,
        trainer={"keep_dtypes": True},
        generator={"keep_dtypes": True},
        transport=options or {},
    )
