from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rlbridge.rdma.doctor import Finding, Host, findings
from tests.rdma.sysfs import IPV4, LINK_LOCAL, add_card, add_interface, add_port, write

ROCE = {"link": "Ethernet", "gids": {3: (IPV4, "RoCE v2", "eth0")}}


def look(root: Path, environment: Mapping[str, str] = {}, memlock: int | None = None) -> list[Finding]:
    """The findings on a host whose kernel shows what lies in `root`."""
    return findings(Host(root / "sys", root / "proc", root / "dev", environment, memlock))


def healthy(root: Path, name: str = "mlx5_0:1", **port: Any) -> None:
    """A host with a port that nothing is wrong with, but for what `port` says."""
    add_port(root / "sys", name, **port)
    add_interface(root / "sys", "eth0", 9000)
    write(root / "dev/infiniband/uverbs0", "")


def wrong(found: list[Finding]) -> dict[str, str]:
    """What is not in order, and how bad it is."""
    return {finding.about: finding.verdict for finding in found if finding.verdict != "ok"}


def test_nothing_is_wrong_with_a_healthy_host(tmp_path: Path) -> None:
    healthy(tmp_path)
    found = look(tmp_path)
    assert wrong(found) == {}
    assert found[0].said == "active: mlx5_core, InfiniBand, 400 Gbit/s"


def test_nothing_is_wrong_with_healthy_roce(tmp_path: Path) -> None:
    healthy(tmp_path, **ROCE)
    assert wrong(look(tmp_path)) == {}


def test_without_a_device_nothing_else_is_looked_at(tmp_path: Path) -> None:
    (finding,) = look(tmp_path, {"UCX_TLS": "tcp"})
    assert (finding.about, finding.verdict) == ("device", "problem")
    assert "--soft-roce" in finding.todo


@pytest.mark.parametrize(
    ("vendor", "device", "kind", "named"),
    [
        ("0x15b3", "0x1021", "0x020700", "NVIDIA (Mellanox)"),
        ("0x1d0f", "0xefa2", "0x020000", "Amazon"),
        ("0x1d0f", "0xec20", "0x020000", None),  # Amazon's card without RDMA
        ("0x15b3", "0x1021", "0x010802", None),  # not a network controller
        ("0x8086", "0x1572", "0x020000", None),
    ],
)
def test_a_card_without_its_driver_is_told_from_none(
    tmp_path: Path, vendor: str, device: str, kind: str, named: str | None
) -> None:
    add_card(tmp_path / "sys", vendor, device, kind)
    (finding,) = look(tmp_path)
    assert ("there is a card of" in finding.said) == (named is not None)
    assert named is None or named in finding.said


def test_a_port_that_is_down_is_a_problem_where_it_is_the_only_one(tmp_path: Path) -> None:
    healthy(tmp_path, state="1: DOWN")
    assert wrong(look(tmp_path)) == {"port mlx5_0:1": "problem"}
    add_port(tmp_path / "sys", "mlx5_1:1")
    assert wrong(look(tmp_path)) == {"port mlx5_0:1": "warning"}


def test_a_device_that_may_not_be_opened_is_a_problem(tmp_path: Path) -> None:
    healthy(tmp_path)
    (tmp_path / "dev/infiniband/uverbs0").unlink()
    assert wrong(look(tmp_path)) == {"device files": "problem"}


@pytest.mark.parametrize(
    ("memlock", "verdict", "amount"), [(64 << 10, "problem", "64 KiB"), (8 << 30, "warning", "8 GiB"), (None, "ok", "without")]
)
def test_memory_that_may_not_be_locked(tmp_path: Path, memlock: int | None, verdict: str, amount: str) -> None:
    healthy(tmp_path)
    found = {finding.about: finding for finding in look(tmp_path, memlock=memlock)}["memory lock"]
    assert found.verdict == verdict
    assert amount in found.said


@pytest.mark.parametrize(
    ("gids", "environment", "verdicts"),
    [
        ({0: (LINK_LOCAL, "IB/RoCE v1", "eth0")}, {}, {"addresses of mlx5_0:1": "problem"}),
        (ROCE["gids"], {"UCX_IB_GID_INDEX": "3"}, {}),
        (ROCE["gids"], {"UCX_IB_GID_INDEX": "auto"}, {}),
        (ROCE["gids"], {"UCX_IB_GID_INDEX": "1"}, {"addresses of mlx5_0:1": "problem"}),
    ],
)
def test_addresses_of_roce(tmp_path: Path, gids: Any, environment: dict[str, str], verdicts: dict[str, str]) -> None:
    healthy(tmp_path, link="Ethernet", gids=gids)
    assert wrong(look(tmp_path, environment)) == verdicts


def test_small_packets_are_a_warning(tmp_path: Path) -> None:
    healthy(tmp_path, **ROCE)
    add_interface(tmp_path / "sys", "eth0", 1500)
    assert wrong(look(tmp_path)) == {"packets of mlx5_0:1": "warning"}


@pytest.mark.parametrize(
    ("pkeys", "asked", "verdicts"),
    [
        (("0xffff", "0x8001"), "", {"partitions of mlx5_0:1": "warning"}),
        (("0xffff", "0x8001"), "0x8001", {"partitions of mlx5_0:1": "problem"}),
        (("0xffff", "0x8001"), "0x1", {}),
        (("0xffff", "0x8001"), "0x8002", {"partitions of mlx5_0:1": "problem"}),
        (("0x7fff",), "", {"partitions of mlx5_0:1": "problem"}),
        (("0x7fff",), "0x7fff", {}),
    ],
)
def test_partitions(tmp_path: Path, pkeys: tuple[str, ...], asked: str, verdicts: dict[str, str]) -> None:
    healthy(tmp_path, pkeys=pkeys)
    assert wrong(look(tmp_path, {"UCX_IB_PKEY": asked} if asked else {})) == verdicts


@pytest.mark.parametrize(
    ("name", "value", "bad"),
    [
        ("UCX_TLS", "tcp,self", True),
        ("UCX_TLS", "rc,cuda_copy", False),
        ("UCX_TLS", "rc_mlx5,self", False),
        ("UCX_TLS", "ib", False),
        ("UCX_TLS", "^ib", True),
        ("UCX_TLS", "^tcp", False),
        ("UCX_TLS", "all", False),
        ("UCX_MODULES", "^ib", True),
        ("UCX_MODULES", "all", False),
        ("UCX_NET_DEVICES", "eth0", True),
        ("UCX_NET_DEVICES", "mlx5_0:1", False),
        ("UCX_NET_DEVICES", "mlx5_0:1,eth0", False),
        ("UCX_NET_DEVICES", "mlx5_7:1", True),
        ("UCX_NET_DEVICES", "all", False),
    ],
)
def test_variables_that_leave_rdma_out(tmp_path: Path, name: str, value: str, bad: bool) -> None:
    healthy(tmp_path)
    assert wrong(look(tmp_path, {name: value})) == ({name: "problem"} if bad else {})


def test_several_ports_want_to_be_named(tmp_path: Path) -> None:
    healthy(tmp_path)
    add_port(tmp_path / "sys", "mlx5_1:1")
    assert wrong(look(tmp_path)) == {"rails": "warning"}
    assert wrong(look(tmp_path, {"UCX_NET_DEVICES": "mlx5_0:1,mlx5_1:1"})) == {}


def test_efa_is_a_warning(tmp_path: Path) -> None:
    healthy(tmp_path, "rdmap0s6:1", driver="efa", link="Unspecified")
    assert wrong(look(tmp_path)) == {"EFA": "warning"}


@pytest.mark.parametrize(
    ("version", "peermem", "verdicts"),
    [
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.1", False, {}),
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.1", True, {}),
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.1", False, {"GPUDirect": "warning"}),
    ],
)
def test_memory_of_gpus(tmp_path: Path, version: str, peermem: bool, verdicts: dict[str, str]) -> None:
    healthy(tmp_path)
    write(tmp_path / "proc/driver/nvidia/version", version)
    if peermem:
        (tmp_path / "sys/module/nvidia_peermem").mkdir(parents=True)
    assert wrong(look(tmp_path)) == verdicts


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_segments_that_expand_are_a_problem(tmp_path: Path, name: str) -> None:
    healthy(tmp_path)
    write(tmp_path / "proc/driver/nvidia/version", "Open Kernel Module")
    setting = {name: "max_split_size_mb:128,expandable_segments:True"}
    assert wrong(look(tmp_path, setting)) == {name: "problem"}


def test_every_finding_that_is_not_ok_says_what_to_do(tmp_path: Path) -> None:
    healthy(tmp_path, state="1: DOWN", **ROCE)
    healthy(tmp_path, "mlx5_1:1", pkeys=("0x7fff",))
    found = look(tmp_path, {"UCX_TLS": "tcp", "UCX_MODULES": "^ib", "UCX_NET_DEVICES": "lo"}, memlock=1)
    assert len(wrong(found)) >= 5
    assert all(finding.todo for finding in found if finding.verdict != "ok")
