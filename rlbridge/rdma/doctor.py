"""Why RDMA would or would not be used by a process here: everything that the kernel, the limits and the variables tell.

Each finding says what it would look like in a run, and what to do. What can only be known by moving bytes, `rlbridge doctor`
finds out by moving some.
"""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rlbridge.rdma.devices import SYSFS, Port, ports, read
from rlbridge.rdma.ucx import RDMA

Verdict = Literal["ok", "warning", "problem"]

_GIB = 1 << 30
_LOCK_CAPABILITY = 14  # CAP_IPC_LOCK of capabilities(7): its holder may lock any amount
_FULL_MEMBER = 0x8000
_JUMBO = 4200
"""The interface MTU that leaves room for packets of 4096 bytes over RoCE."""

_CARDS = {"0x15b3": "NVIDIA (Mellanox)", "0x14e4": "Broadcom", "0x1d0f": "Amazon"}
"""Makers of cards with RDMA, by PCI vendor; of Amazon's, those whose PCI device begins with 0xefa."""

_UCX_GROUPS = ("all", "ib", "rc", "dc", "ud", "rc_v", "rc_x", "ud_v", "ud_x", "dc_x", "srd")
"""UCX's names in UCX_TLS that stand for several transports, all or some of them RDMA."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        about: What.
        verdict: problem: RDMA is not used, or fails. warning: it is used, and something is lost or may fail.
        said: What was seen, and what comes of it.
        todo: What to do.
    """

    about: str
    verdict: Verdict
    said: str
    todo: str = ""


@dataclass(frozen=True)
class Host:
    """Where the facts are read from.

    Attributes:
        sysfs, proc, dev: Where the kernel shows them.
        environment: The variables of the process that would transfer.
        memlock: Bytes that it may lock; None: without a limit.
    """

    sysfs: Path = SYSFS
    proc: Path = Path("/proc")
    dev: Path = Path("/dev")
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    memlock: int | None = field(default_factory=lambda: memory_lock())


def findings(host: Host | None = None) -> list[Finding]:
    """All of them, in the order in which a transfer would meet them. Without a device nothing else is looked at."""
    host = host or Host()
    found = ports(host.sysfs)
    if not found:
        return [_no_device(host)]
    return [finding for look in _LOOKS for finding in look(host, found)]


def _no_device(host: Host) -> Finding:
    cards = sorted({maker for path in host.sysfs.glob("bus/pci/devices/*") if (maker := _maker(path))})
    if not cards:
        return Finding(
            "device",
            "problem",
            "there is no RDMA device, and no card of a maker of some: the bytes go by shared memory or TCP",
            "on a host that has one, start the container with it (--device=/dev/infiniband, or the cluster's RDMA resource);"
            " rlbridge conform --level rdma --soft-roce tries the software without",
        )
    return Finding(
        "device",
        "problem",
        f"there is a card of {' and '.join(cards)}, and /sys/class/infiniband is empty: its RDMA driver is not loaded, or the"
        " card is not given to this container",
        "modprobe mlx5_ib (NVIDIA), bnxt_re (Broadcom), or install the EFA driver; in a container: --device=/dev/infiniband",
    )


def _maker(path: Path) -> str:
    vendor = read(path / "vendor")
    if vendor == "0x1d0f" and not read(path / "device").startswith("0xefa"):
        return ""
    if not read(path / "class").startswith("0x02"):  # a network controller
        return ""
    return _CARDS.get(vendor, "")


def _states(_: Host, found: list[Port]) -> Iterator[Finding]:
    active = [port for port in found if port.active]
    for port in found:
        what = f"{port.driver or 'unknown driver'}, {port.link_layer or 'unknown link'}, {port.rate_gbits:g} Gbit/s"
        if port.active:
            yield Finding(f"port {port.name}", "ok", f"active: {what}")
        else:
            yield Finding(
                f"port {port.name}",
                "warning" if active else "problem",
                f"{port.state or 'in no known state'}: {what}. UCX leaves it out"
                + ("" if active else ", and there is no other: the bytes go by TCP"),
                "look at the cable and the switch; InfiniBand needs a subnet manager, RoCE its interface up (ip link)",
            )


def _device_files(host: Host, _: list[Port]) -> Iterator[Finding]:
    files = sorted((host.dev / "infiniband").glob("uverbs*"))
    closed = [file for file in files if not os.access(file, os.R_OK | os.W_OK)]
    if files and not closed:
        return
    said = f"{', '.join(map(str, closed))} may not be opened" if closed else f"{host.dev / 'infiniband'} has no uverbs file"
    yield Finding(
        "device files",
        "problem",
        f"{said}: the device is seen and cannot be used, and UCX takes TCP",
        "start the container with --device=/dev/infiniband; outside of one, load ib_uverbs, or look at the file's group",
    )


def _memory_lock(host: Host, _: list[Port]) -> Iterator[Finding]:
    if host.memlock is None:
        yield Finding("memory lock", "ok", "without a limit")
        return
    amount = f"{host.memlock / _GIB:.3g} GiB" if host.memlock >= _GIB // 1024 else f"{host.memlock // 1024} KiB"
    yield Finding(
        "memory lock",
        "problem" if host.memlock < _GIB else "warning",
        f"RLIMIT_MEMLOCK is {amount}: a larger arena cannot be registered, and the epoch fails at the phase register",
        "ulimit -l unlimited before ray start; docker --ulimit memlock=-1; LimitMEMLOCK=infinity in the service",
    )


def _addresses(host: Host, found: list[Port]) -> Iterator[Finding]:
    for port in found:
        if not port.active or port.link_layer != "Ethernet":
            continue
        v2 = [gid for gid in port.gids if gid.kind.endswith("v2")]
        asked = host.environment.get("UCX_IB_GID_INDEX", "")
        if asked.isdigit() and int(asked) not in {gid.index for gid in port.gids}:
            yield Finding(
                f"addresses of {port.name}",
                "problem",
                f"UCX_IB_GID_INDEX is {asked}, and the port has no address there: connections fail",
                f"addresses: {', '.join(str(gid.index) for gid in port.gids) or 'none'}; or unset it: UCX finds one",
            )
        elif not v2:
            yield Finding(
                f"addresses of {port.name}",
                "problem",
                "no RoCE v2 address: the interface has no IP address, and packets cannot be routed",
                f"give {', '.join(port.interfaces) or 'its interface'} an address (ip addr add)",
            )
        for name in port.interfaces:
            mtu = read(host.sysfs / "class/net" / name / "mtu")
            if mtu.isdigit() and int(mtu) < _JUMBO:
                yield Finding(
                    f"packets of {port.name}",
                    "warning",
                    f"the MTU of {name} is {mtu}: packets carry less than 4096 bytes, and more of them are needed",
                    f"ip link set {name} mtu 9000, at both ends and on the switch",
                )


def _partitions(host: Host, found: list[Port]) -> Iterator[Finding]:
    """UCX takes a key without its highest bit, and by itself the first with full membership (UCX_IB_PKEY, UCX 1.23)."""
    asked = host.environment.get("UCX_IB_PKEY", "")
    for port in found:
        if not port.active or port.link_layer != "InfiniBand":
            continue
        about = f"partitions of {port.name}"
        keys = {key & ~_FULL_MEMBER for key in port.pkeys}
        shown = ", ".join(hex(key) for key in port.pkeys) or "none"
        if re.fullmatch(r"0x[0-9a-fA-F]+", asked):
            if int(asked, 16) not in keys:
                yield Finding(
                    about,
                    "problem",
                    f"UCX_IB_PKEY is {asked}, and the port has {shown}: UCX cannot use the port",
                    f"unset it, or take one of {', '.join(hex(key) for key in sorted(keys)) or 'none'}",
                )
        elif not any(key & _FULL_MEMBER for key in port.pkeys):
            yield Finding(
                about,
                "problem",
                f"only limited memberships ({shown}): UCX finds no partition to use, and leaves the port out",
                "ask for full membership of a partition, or set UCX_IB_PKEY to one whose other hosts are full members",
            )
        elif len(keys) > 1:
            yield Finding(
                about,
                "warning",
                f"several partitions ({shown}), of which UCX takes the first: two hosts with different ones do not connect",
                "set UCX_IB_PKEY to the same on all hosts, without the highest bit",
            )


def _variables(host: Host, found: list[Port]) -> Iterator[Finding]:
    tls = [name.strip() for name in host.environment.get("UCX_TLS", "").split(",") if name.strip()]
    if tls:
        banned = tls[0].startswith("^")
        names = {tls[0].lstrip("^"), *tls[1:]}
        named = {name for name in names if name.startswith(RDMA) or name in _UCX_GROUPS}
        if (banned and named & {"ib", "rc"}) or (not banned and not named):
            yield Finding(
                "UCX_TLS",
                "problem",
                f"UCX_TLS is {','.join(tls)}, which leaves RDMA out: the bytes go by what it names",
                "unset it; transport.wire=rdma gives UCX what RDMA needs, and nothing else",
            )
    modules = host.environment.get("UCX_MODULES", "")
    if modules.startswith("^") and "ib" in modules.lstrip("^").split(","):
        yield Finding("UCX_MODULES", "problem", f"UCX_MODULES is {modules}: UCX does not load its RDMA", "unset it")
    devices = [name.strip() for name in host.environment.get("UCX_NET_DEVICES", "").split(",") if name.strip()]
    known = {port.name: port for port in found}
    usable = [name for name in devices if name == "all" or (name in known and known[name].active)]
    if devices and not usable:
        yield Finding(
            "UCX_NET_DEVICES",
            "problem",
            f"UCX_NET_DEVICES is {','.join(devices)}, and no active RDMA port is among them: UCX takes TCP, or finds no wire",
            f"transport.net_devices, or UCX_NET_DEVICES={','.join(sorted(p.name for p in found if p.active)) or 'unset'}",
        )


def _rails(host: Host, found: list[Port]) -> Iterator[Finding]:
    active = [port for port in found if port.active]
    if len(active) < 2 or host.environment.get("UCX_NET_DEVICES"):
        return
    yield Finding(
        "rails",
        "warning",
        f"{len(active)} active ports, and nothing says which: UCX takes for each rank those that it holds to be nearest to its"
        " memory, and NIXL lets a transfer use two. A storage or management port among them slows or breaks transfers",
        "transport.net_devices names those of the data plane",
    )


def _efa(_: Host, found: list[Port]) -> Iterator[Finding]:
    if any(port.driver == "efa" for port in found):
        yield Finding(
            "EFA",
            "warning",
            "EFA has no reliable connections (rc): a UCX without its srd transport takes TCP, at a hundredth of the rate",
            "transport.wire=rdma fails where UCX cannot; rdt with tensor_transport=nixl takes libfabric on EFA",
        )


def _gpus(host: Host, _: list[Port]) -> Iterator[Finding]:
    version = read(host.proc / "driver/nvidia/version")
    if not version:
        return
    if "Open Kernel Module" in version:
        yield Finding("GPUDirect", "ok", "the open GPU driver gives memory to RDMA devices (dmabuf)")
    elif (host.sysfs / "module/nvidia_peermem").is_dir():
        yield Finding("GPUDirect", "ok", "nvidia_peermem is loaded")
    else:
        yield Finding(
            "GPUDirect",
            "warning",
            "neither the open GPU driver nor nvidia_peermem: the bytes of a GPU take the way over the host's memory",
            "modprobe nvidia_peermem, or the open kernel modules of the driver",
        )
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        if re.search(r"expandable_segments:\s*true", host.environment.get(name, ""), re.IGNORECASE):
            yield Finding(
                name,
                "problem",
                f"{name} has expandable_segments:True: torch's memory cannot be registered then",
                "leave it out for the roles that publish or receive weights",
            )


_LOOKS: tuple[Callable[[Host, list[Port]], Iterator[Finding]], ...] = (
    _states,
    _device_files,
    _memory_lock,
    _addresses,
    _partitions,
    _variables,
    _rails,
    _efa,
    _gpus,
)


def memory_lock() -> int | None:
    """Bytes that this process may lock; None: without a limit, as for a holder of CAP_IPC_LOCK."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    held = re.search(r"CapEff:\s*([0-9a-f]+)", read(Path("/proc/self/status")))
    if soft == resource.RLIM_INFINITY or (held and int(held[1], 16) >> _LOCK_CAPABILITY & 1):
        return None
    return soft
