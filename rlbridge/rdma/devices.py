"""RDMA devices and their ports, out of sysfs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SYSFS = Path("/sys")

_ZERO_GID = "0000:0000:0000:0000:0000:0000:0000:0000"


@dataclass(frozen=True)
class Gid:
    """An address of a port.

    Attributes:
        index: Its place in the port's table: `UCX_IB_GID_INDEX`.
        value: Eight groups of four hexadecimal digits.
        kind: "IB/RoCE v1", "RoCE v2" or "" where the kernel does not say.
        interface: The network interface that it is of, or "".
    """

    index: int
    value: str
    kind: str
    interface: str


@dataclass(frozen=True)
class Port:
    """A port of an RDMA device.

    Attributes:
        device: The kernel's name, for example "mlx5_0".
        number: From 1 on.
        driver: The kernel module: "mlx5_core", "efa", "rdma_rxe"; "" where it is not known.
        link_layer: "InfiniBand", "Ethernet" or "Unspecified".
        state: "ACTIVE", "DOWN", "INIT", "ARMED".
        rate_gbits: Gbit/s, 0 where it is not known.
        gids: Its addresses.
        pkeys: Its partition keys; the highest bit means full membership.
    """

    device: str
    number: int
    driver: str
    link_layer: str
    state: str
    rate_gbits: float
    gids: tuple[Gid, ...]
    pkeys: tuple[int, ...]

    @property
    def name(self) -> str:
        """As UCX writes it: "mlx5_0:1"."""
        return f"{self.device}:{self.number}"

    @property
    def active(self) -> bool:
        """Whether it can carry anything."""
        return self.state == "ACTIVE"

    @property
    def interfaces(self) -> tuple[str, ...]:
        """The network interfaces of its addresses."""
        return tuple(dict.fromkeys(gid.interface for gid in self.gids if gid.interface))


def has_rdma_device(sysfs: Path = SYSFS) -> bool:
    """Whether the kernel knows an RDMA device."""
    devices = sysfs / "class/infiniband"
    return devices.is_dir() and any(devices.iterdir())


def ports(sysfs: Path = SYSFS) -> list[Port]:
    """Every port of every RDMA device that this process can see, by name. None of a device that is just being removed."""
    found = []
    for path in port_paths(sysfs):
        try:
            found.append(_port(path))
        except FileNotFoundError:
            continue
    return found


def port_paths(sysfs: Path = SYSFS) -> list[Path]:
    """The directories of the ports, by name: to read all of a port takes hundreds of files, and a counter one."""
    return sorted(sysfs.glob("class/infiniband/*/ports/*"), key=lambda path: (path.parent.parent.name, int(path.name)))


def read(path: Path) -> str:
    """A sysfs file's text; "" where there is none, or the kernel has no answer."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _port(path: Path) -> Port:
    device = path.parent.parent
    rate = read(path / "rate").partition(" ")[0]
    return Port(
        device=device.name,
        number=int(path.name),
        driver=_driver(device),
        link_layer=read(path / "link_layer"),
        state=(path / "state").read_text().partition(":")[2].strip(),
        rate_gbits=float(rate) if rate.replace(".", "", 1).isdigit() else 0.0,
        gids=tuple(_gids(path)),
        pkeys=tuple(sorted({key for key in (int(read(file) or "0", 16) for file in path.glob("pkeys/*")) if key})),
    )


def _driver(device: Path) -> str:
    link = device / "device/driver"
    if link.is_symlink():
        return link.readlink().name
    # A device of software has no bus; its kind of name is the driver's own default.
    return "rdma_rxe" if (device / "parent").exists() and device.name.startswith("rxe") else ""


def _gids(path: Path) -> Iterator[Gid]:
    for file in sorted(path.glob("gids/*"), key=lambda file: int(file.name)):
        value = read(file)
        if value and value != _ZERO_GID:
            attributes = path / "gid_attrs"
            index = int(file.name)
            yield Gid(index, value, read(attributes / "types" / file.name), read(attributes / "ndevs" / file.name))
