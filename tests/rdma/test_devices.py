from __future__ import annotations

from pathlib import Path

from rlbridge.rdma.devices import Gid, has_rdma_device, ports
from tests.rdma.sysfs import IPV4, LINK_LOCAL, add_port, write


def test_a_machine_without_devices_has_no_ports(tmp_path: Path) -> None:
    assert not has_rdma_device(tmp_path)
    assert ports(tmp_path) == []


def test_a_port_is_what_the_kernel_says(tmp_path: Path) -> None:
    add_port(tmp_path, "mlx5_0:1", pkeys=("0xffff", "0x0000", "0x8001"))
    assert has_rdma_device(tmp_path)
    (port,) = ports(tmp_path)
    assert (port.name, port.driver, port.link_layer, port.state) == ("mlx5_0:1", "mlx5_core", "InfiniBand", "ACTIVE")
    assert (port.rate_gbits, port.active) == (400.0, True)
    assert port.pkeys == (0x8001, 0xFFFF)


def test_ports_come_by_device_and_number(tmp_path: Path) -> None:
    for name in ("mlx5_1:1", "mlx5_0:2", "mlx5_0:10", "mlx5_0:1"):
        add_port(tmp_path, name)
    assert [port.name for port in ports(tmp_path)] == ["mlx5_0:1", "mlx5_0:2", "mlx5_0:10", "mlx5_1:1"]


def test_addresses_have_their_kind_and_interface_and_none_is_empty(tmp_path: Path) -> None:
    add_port(tmp_path, "mlx5_0:1", link="Ethernet", gids={0: (LINK_LOCAL, "IB/RoCE v1", "eth0"), 3: (IPV4, "RoCE v2", "eth0")})
    (port,) = ports(tmp_path)
    assert port.gids == (Gid(0, LINK_LOCAL, "IB/RoCE v1", "eth0"), Gid(3, IPV4, "RoCE v2", "eth0"))
    assert port.interfaces == ("eth0",)


def test_what_the_kernel_does_not_say_is_not_guessed(tmp_path: Path) -> None:
    port = add_port(tmp_path, "mlx5_0:1", driver="", state="1: DOWN", rate="")
    write(port / "link_layer", "")
    (found,) = ports(tmp_path)
    assert (found.driver, found.link_layer, found.rate_gbits, found.active) == ("", "", 0.0, False)


def test_a_port_that_is_being_removed_is_left_out(tmp_path: Path) -> None:
    add_port(tmp_path, "mlx5_0:1")
    (add_port(tmp_path, "mlx5_1:1") / "state").unlink()
    assert [port.name for port in ports(tmp_path)] == ["mlx5_0:1"]
