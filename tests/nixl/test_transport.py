from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rlbridge.errors import TransportError
from rlbridge.rdma.devices import has_rdma_device
from rlbridge_conformance.toy import ToyEngine, ToySource
from rlbridge_nixl.options import NixlOptions
from rlbridge_nixl.transport import NixlTransport
from tests.sync.stage import Stage

Make = Callable[..., Stage]


@pytest.mark.parametrize(("asked", "used"), [("any", "cma"), ("shm", "cma"), ("tcp", "tcp/lo")])
def test_the_wire_asked_for_is_the_wire_used(make_stage: Make, asked: str, used: str) -> None:
    stage = make_stage(transport={"wire": asked})
    report = stage.sync(1)
    assert report.wire == f"nixl over {used}"
    assert [e.wire for e in report.evidence] == [used]
    assert report.evidence[0].bytes_moved == report.bytes
    assert "UCX protocol report" in report.evidence[0].known_from


def test_one_process_can_use_one_wire_after_the_other(make_stage: Make) -> None:
    stage = make_stage()
    for version, (asked, used) in enumerate((("tcp", "tcp/lo"), ("any", "cma"), ("tcp", "tcp/lo")), 1):
        stage.session = stage.session_with({"wire": asked})
        assert stage.sync(version).wire == f"nixl over {used}"
        assert stage.serve(version)


@pytest.mark.skipif(has_rdma_device(), reason="this machine has an RDMA device")
def test_rdma_is_refused_where_there_is_none(make_stage: Make) -> None:
    reason = NixlTransport.unavailable(NixlOptions(wire="rdma"), "cpu")
    assert reason is not None
    assert "no RDMA device" in reason
    stage = make_stage(transport={"wire": "rdma"})
    with pytest.raises(TransportError, match="no RDMA device") as caught:
        stage.sync(1)
    assert caught.value.where["rank"] == "trainer[0]"


@pytest.mark.parametrize("operation", ["read", "write"])
@pytest.mark.parametrize(
    ("wires", "told"), [(["tcp/eth0"], "tcp/eth0"), (["cma", "tcp/lo"], "tcp/lo"), ([], "an unknown wire")]
)
def test_another_wire_than_the_one_asked_for_fails_the_sync(
    make_stage: Make, operation: str, wires: list[str], told: str
) -> None:
    stage = make_stage(transport={"wire": "shm", "operation": operation}, fresh=True)
    stage.sync(1)
    party = stage.engines[0] if operation == "read" else stage.trainers[0]
    party.do("apply", forge_wires, wires)
    with pytest.raises(TransportError, match=f"the bytes went by {told}, not by shm") as caught:
        stage.sync(2)
    assert caught.value.where["phase"] == "wire"
    assert stage.serve(1)
    party.do("apply", forge_wires, ["cma"])
    stage.sync(3)
    assert stage.serve(3)


def test_a_wire_that_nobody_knows_is_reported_as_unknown(make_stage: Make) -> None:
    stage = make_stage(fresh=True)
    stage.engines[0].do("apply", forge_wires, [])
    report = stage.sync(1)
    assert report.wire == "nixl over unknown"
    assert "reported no protocol" in report.evidence[0].known_from


def test_bytes_that_nixl_did_not_move_fail_the_sync(make_stage: Make) -> None:
    stage = make_stage()
    stage.sync(1)
    stage.engines[0].do("apply", expect_more)
    with pytest.raises(TransportError, match=r"NIXL moved \d+ of \d+ bytes"):
        stage.sync(2)
    assert stage.serve(1)


@pytest.mark.parametrize("wire", ["any", "tcp"])
def test_nothing_listens_off_the_pinned_interfaces(make_stage: Make, wire: str) -> None:
    stage = make_stage(2, (2,), transport={"wire": wire, "net_devices": "lo"})
    stage.sync(1)
    for party in (*stage.trainers, *stage.engines):
        assert set(listening(party.pid)) <= {"127.0.0.1"}


def test_an_idle_agent_costs_no_cpu_time(make_stage: Make) -> None:
    stage = make_stage()
    stage.sync(1)
    parties = [*stage.trainers, *stage.engines]
    start, before = time.monotonic(), [cpu_seconds(party.pid) for party in parties]
    time.sleep(1.0)
    for party, was in zip(parties, before, strict=True):
        assert cpu_seconds(party.pid) - was < 0.1 * (time.monotonic() - start)


@pytest.mark.parametrize("publish", ["snapshot", "barrier"])
@pytest.mark.parametrize("operation", ["read", "write"])
def test_a_trainer_rank_that_owns_nothing_takes_part(make_stage: Make, operation: str, publish: str) -> None:
    stage = make_stage(2, transport={"wire": "tcp", "operation": operation}, publish=publish)
    stage.trainers[1].do("apply", own_nothing)
    stage.trainers[0].do("apply", own_all)
    for version in (1, 2):
        stage.load(version)
        stage.session.sync(version)
        assert stage.serve(version)


def listening(pid: int) -> list[str]:
    """The addresses that a process listens on."""
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        target = str(link.readlink())
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    found = []
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            cells = line.split()
            if cells[9] in inodes and (cells[3] == "0A" or table.startswith("udp")):
                address = bytes.fromhex(cells[1].partition(":")[0])
                found.append(socket.inet_ntoa(address[::-1]) if len(address) == 4 else cells[1])
    return found


def cpu_seconds(pid: int) -> float:
    cells = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(cells[11]) + int(cells[12])) / os.sysconf("SC_CLK_TCK")


def forge_wires(_: ToyEngine | ToySource, wires: list[str]) -> None:
    import rlbridge_nixl.agent

    rlbridge_nixl.agent.wires_used = lambda agent_name, operation: wires


def expect_more(engine: ToyEngine) -> None:
    transport = engine.generator.subscribers[0]._transport
    assert isinstance(transport, NixlTransport)
    for transfers in transport._transfers.values():
        for transfer in transfers:
            transfer.nbytes += 1


def own_all(source: ToySource) -> None:
    """Become the only rank."""
    source.__init__(0, 1)  # type: ignore[misc]


def own_nothing(source: ToySource) -> None:
    """Keep the metadata, and no region."""
    layout = source.publisher._source.layout()
    layout.regions.clear()
