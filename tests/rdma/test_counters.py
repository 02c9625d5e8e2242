from __future__ import annotations

from pathlib import Path

import pytest

from rlbridge.rdma.counters import Reading, counted, counters
from tests.rdma.sysfs import add_interface, add_port, write

_DATA = ("counters/port_rcv_data", "counters/port_xmit_data")
_BYTES = ("hw_counters/rx_bytes", "hw_counters/tx_bytes")
_PACKETS = ("hw_counters/rcvd_pkts", "hw_counters/sent_pkts")


@pytest.mark.parametrize(
    ("files", "received", "exact"), [(_DATA, 400, True), (_BYTES, 100, True), (_PACKETS, 100 * 4096, False)]
)
def test_bytes_are_counted_in_the_drivers_unit(tmp_path: Path, files: tuple[str, str], received: int, exact: bool) -> None:
    port = add_port(tmp_path, "mlx5_0:1", counters=dict.fromkeys(files, 1000))
    before = counters(tmp_path)
    write(port / files[0], "1100")
    found = counted(before, counters(tmp_path))
    assert found is not None
    assert (found.received, found.sent, found.exact) == (received, 0, exact)
    assert found.known_from == f"{files[0].partition('/')[2]} of mlx5_0:1"


@pytest.mark.parametrize(("mtu", "largest"), [(9000, 4096), (4200, 4096), (1500, 1024), (2200, 2048)])
def test_packets_carry_what_the_interface_lets_them(tmp_path: Path, mtu: int, largest: int) -> None:
    add_interface(tmp_path, "roce0", mtu)
    port = add_port(tmp_path, "rxe0:1", link="Ethernet", counters=dict.fromkeys(_PACKETS, 0))
    write(port.parent.parent / "parent", "roce0")
    before = counters(tmp_path)
    write(port / _PACKETS[1], "3")
    found = counted(before, counters(tmp_path))
    assert found is not None
    assert found.sent == 3 * largest


def test_ports_are_added_up(tmp_path: Path) -> None:
    files = [add_port(tmp_path, f"mlx5_{i}:1", counters=dict.fromkeys(_DATA, 7)) / _DATA[0] for i in range(2)]
    before = counters(tmp_path)
    for file in files:
        write(file, "10")
    found = counted(before, counters(tmp_path))
    assert found is not None
    assert found.received == 2 * 3 * 4
    assert found.known_from == "port_rcv_data of mlx5_0:1, port_rcv_data of mlx5_1:1"


def test_a_driver_that_counts_bytes_and_packets_is_asked_for_bytes(tmp_path: Path) -> None:
    add_port(tmp_path, "mlx5_0:1", counters={**dict.fromkeys(_PACKETS, 5), **dict.fromkeys(_DATA, 5)})
    reading = counters(tmp_path)
    assert list(reading.values) == [("mlx5_0:1", _DATA[0])]


def test_where_nothing_counts_nothing_is_known(tmp_path: Path) -> None:
    add_port(tmp_path, "mlx5_0:1")
    assert counted(counters(tmp_path), counters(tmp_path)) is None
    assert counted(Reading({}), Reading({})) is None


def test_a_port_that_came_in_between_is_left_out(tmp_path: Path) -> None:
    before = counters(tmp_path)
    add_port(tmp_path, "mlx5_0:1", counters=dict.fromkeys(_DATA, 7))
    assert counted(before, counters(tmp_path)) is None
