"""A tree like the kernel's for RDMA devices that this machine has not: it stands in for sysfs, and is read by the same code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

IPV4 = "0000:0000:0000:0000:0000:ffff:0a4e:0001"
LINK_LOCAL = "fe80:0000:0000:0000:0225:90ff:fe01:0203"
ZERO = "0000:0000:0000:0000:0000:0000:0000:0000"


def add_port(
    root: Path,
    name: str,
    *,
    driver: str = "mlx5_core",
    link: str = "InfiniBand",
    state: str = "4: ACTIVE",
    rate: str = "400 Gb/sec (4X NDR)",
    gids: Mapping[int, tuple[str, str, str]] = {},
    pkeys: tuple[str, ...] = ("0xffff",),
    counters: Mapping[str, int] = {},
) -> Path:
    """A port "mlx5_0:1"; `gids` are value, type and interface by index, `counters` values by file. Returns its directory."""
    device, number = name.split(":")
    port = root / "class/infiniband" / device / "ports" / number
    for folder in ("gids", "gid_attrs/types", "gid_attrs/ndevs", "pkeys"):
        (port / folder).mkdir(parents=True)
    write(port / "state", state)
    write(port / "rate", rate)
    write(port / "link_layer", link)
    write(port / "gids/9", ZERO)
    for index, (value, kind, interface) in gids.items():
        write(port / f"gids/{index}", value)
        write(port / f"gid_attrs/types/{index}", kind)
        write(port / f"gid_attrs/ndevs/{index}", interface)
    for index, key in enumerate(pkeys):
        write(port / f"pkeys/{index}", key)
    for file, value in counters.items():
        write(port / file, str(value))
    bus = root / "class/infiniband" / device / "device"
    bus.mkdir(exist_ok=True)
    if driver:
        (root / "bus/pci/drivers" / driver).mkdir(parents=True, exist_ok=True)
        if not (bus / "driver").exists():
            (bus / "driver").symlink_to(root / "bus/pci/drivers" / driver)
    return port


def add_interface(root: Path, name: str, mtu: int) -> None:
    """A network interface."""
    write(root / "class/net" / name / "mtu", str(mtu))


def add_card(root: Path, vendor: str, device: str = "0x1021", kind: str = "0x020700") -> None:
    """A PCI card."""
    card = root / "bus/pci/devices" / f"0000:{len(list(root.glob('bus/pci/devices/*'))):02x}:00.0"
    for name, value in (("vendor", vendor), ("device", device), ("class", kind)):
        write(card / name, value)


def write(path: Path, text: str) -> None:
    """A file of one line, with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")
