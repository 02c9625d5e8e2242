"""Facts about the machine that a process runs on."""

from __future__ import annotations

import os
from pathlib import Path


def has_rdma_device() -> bool:
    """Whether the kernel knows an RDMA device."""
    devices = Path("/sys/class/infiniband")
    return devices.is_dir() and any(devices.iterdir())


def quiet_ucx() -> None:
    """Keep UCX from loading its InfiniBand module where there is no device. Call it before the first agent.

    Where Debian's rdma-core is installed, the module brings a second copy of libnl, and the process crashes at exit
    (NIXL 1.5.1).
    """
    if not has_rdma_device():
        os.environ.setdefault("UCX_MODULES", "^ib")
