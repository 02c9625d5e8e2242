"""`transport.require: rdma`: what a transport says, and what the ports of a host have counted, decide."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from rlbridge.errors import TransportError
from rlbridge.rdma.counters import Counted
from rlbridge.roles.transport import WireEvidence
from rlbridge.sync.messages import Pulled
from rlbridge.sync.wire import require_rdma
from tests.sync.stage import Stage

SINK = "generator[0].rank[0]"


def said(wire: str, rdma: bool | None) -> WireEvidence:
    return WireEvidence("nixl", wire, "a test says so", 100, rdma)


def pulled(ports: int | None, nbytes: int = 100) -> dict[str, Pulled]:
    counts = None if ports is None else Counted(ports, 0, True, "port_rcv_data of mlx5_0:1")
    return {SINK: Pulled(nbytes, 1.0, None, counts)}


@pytest.mark.parametrize("ports", [100, 108, 10**9, None])
def test_rdma_by_name_that_no_port_contradicts_is_rdma(ports: int | None) -> None:
    require_rdma(3, pulled(ports), [said("rc_mlx5/mlx5_0:1", True)])


def test_a_wire_that_nobody_knows_is_rdma_if_the_ports_have_counted_it() -> None:
    require_rdma(3, pulled(100), [said("nixl", None)])
    require_rdma(3, pulled(None, nbytes=0), [said("nixl", None)])


@pytest.mark.parametrize(
    ("ports", "wire", "rdma", "message"),
    [
        (10**9, "tcp/eth0", False, "the bytes went by tcp/eth0, which is no RDMA"),
        (99, "rc_mlx5/mlx5_0:1", True, "100 bytes arrived, and the RDMA ports have counted 99 (port_rcv_data of mlx5_0:1)"),
        (99, "nixl", None, "have counted 99"),
        (None, "nixl", None, "nobody knows whether the bytes went by RDMA"),
    ],
)
def test_anything_else_fails_and_names_what_is_known(ports: int | None, wire: str, rdma: bool | None, message: str) -> None:
    with pytest.raises(TransportError) as caught:
        require_rdma(3, pulled(ports), [said("rc_mlx5/mlx5_1:1", True), said(wire, rdma)])
    assert message in caught.value.what
    assert (caught.value.where["version"], caught.value.where["phase"]) == ("3", "wire")
    assert "rlbridge doctor --rdma" in caught.value.todo


def test_without_any_evidence_the_ports_decide() -> None:
    require_rdma(3, pulled(100), [])
    with pytest.raises(TransportError, match="nobody knows") as caught:
        require_rdma(3, pulled(None), [])
    assert caught.value.where["rank"] == SINK


def test_a_sync_that_did_not_go_by_rdma_fails_before_anything_is_installed(make_stage: Callable[..., Stage]) -> None:
    """The transport is told to use shared memory, and the session to require RDMA."""
    stage = make_stage(transport={"wire": "shm"})
    stage.sync(1)
    stage.session._transport_options.require = "rdma"  # type: ignore[attr-defined]
    with pytest.raises(TransportError, match="the bytes went by cma, which is no RDMA"):
        stage.sync(2)
    assert stage.serve(1)
