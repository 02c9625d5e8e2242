"""What RDMA ports count: the proof that a transport cannot forge.

The counters are a port's, so they count whatever crosses it, ours or not: they can show that too little went by RDMA, and with
everything else still, how much did.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from rlbridge.rdma.devices import SYSFS, port_paths, read

_LARGEST_MTU = 4096
_ROCE_HEADERS = 80
"""What rdma_rxe keeps of an interface's MTU for headers (Linux, drivers/infiniband/sw/rxe/rxe_hdr.h: RXE_MAX_HDR_LENGTH)."""

_WORD = 4
"""port_rcv_data and port_xmit_data are in units of four bytes (InfiniBand specification, PortCounters)."""


class Counted(msgspec.Struct, frozen=True):
    """What the ports of a host have counted between two readings.

    Attributes:
        received: Bytes that came in.
        sent: Bytes that went out.
        exact: False: they were counted in packets, and these are the most bytes that so many can carry.
        known_from: Which counters of which ports.
    """

    received: int
    sent: int
    exact: bool
    known_from: str


@dataclass(frozen=True)
class _Kind:
    """How a driver counts: files below a port's directory, and bytes a unit; 0: a packet, of at most the port's MTU."""

    received: str
    sent: str
    unit: int


_KINDS = (
    _Kind("counters/port_rcv_data", "counters/port_xmit_data", _WORD),  # InfiniBand, and RoCE of mlx5, bnxt_re, irdma
    _Kind("hw_counters/rx_bytes", "hw_counters/tx_bytes", 1),  # efa
    _Kind("hw_counters/rcvd_pkts", "hw_counters/sent_pkts", 0),  # rdma_rxe
)


@dataclass(frozen=True)
class Reading:
    """The counters of all ports at one moment, by port and file."""

    values: Mapping[tuple[str, str], tuple[int, int, int]]  # -> received, sent, the most bytes of one


def counters(sysfs: Path = SYSFS) -> Reading:
    """Read them now."""
    return Reading(
        {
            (f"{path.parent.parent.name}:{path.name}", kind.received): value
            for path in port_paths(sysfs)
            for kind, value in _values(path, sysfs)
        }
    )


def counted(before: Reading, after: Reading) -> Counted | None:
    """What came between two readings; None: no port counts here, or none that was there both times."""
    common = [(key, before.values[key], now) for key, now in after.values.items() if key in before.values]
    if not common:
        return None
    return Counted(
        received=sum((now[0] - was[0]) * now[2] for _, was, now in common),
        sent=sum((now[1] - was[1]) * now[2] for _, was, now in common),
        exact=not any(file.endswith("_pkts") for (_, file), _, _ in common),
        known_from=", ".join(f"{file.rpartition('/')[2]} of {name}" for (name, file), _, _ in common),
    )


def _values(port: Path, sysfs: Path) -> Iterator[tuple[_Kind, tuple[int, int, int]]]:
    """Of the first kind that the port has."""
    for kind in _KINDS:
        received, sent = (read(port / file) for file in (kind.received, kind.sent))
        if received.isdigit() and sent.isdigit():
            yield kind, (int(received), int(sent), kind.unit or _mtu(port, sysfs))
            return


def _mtu(port: Path, sysfs: Path) -> int:
    """The most payload of a packet: the largest power of two that the interface below an rdma_rxe device leaves room for."""
    mtu = read(sysfs / "class/net" / read(port.parent.parent / "parent") / "mtu")
    room = int(mtu) - _ROCE_HEADERS if mtu.isdigit() else _LARGEST_MTU
    return int(min(_LARGEST_MTU, 1 << (max(room, 1).bit_length() - 1)))
