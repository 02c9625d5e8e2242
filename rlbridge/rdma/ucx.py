"""UCX: which of its wires are RDMA, and what it must not load."""

from __future__ import annotations

import os
from collections.abc import Sequence

from rlbridge.rdma.devices import has_rdma_device

RDMA = ("rc_", "dc_", "ud_", "srd")
"""How UCX's names of RDMA transports begin: reliable, dynamic and unreliable connections, and EFA's own."""

_STAGING = ("cuda_copy", "gdr_copy")
"""How UCX takes bytes out of a GPU before they go by a wire, and into one after."""


def quiet_ucx() -> None:
    """Keep UCX from loading its InfiniBand module where there is no device. Call it before the first agent.

    Where Debian's rdma-core is installed, the module brings a second copy of libnl, and the process crashes at exit
    (NIXL 1.5.1).
    """
    if not has_rdma_device():
        os.environ.setdefault("UCX_MODULES", "^ib")


def wires(used: Sequence[str]) -> list[str]:
    """Those of UCX's names that are wires, and not a step between a GPU and one."""
    return [name for name in used if not name.startswith(_STAGING)]


def is_rdma(used: Sequence[str]) -> bool:
    """Whether all of UCX's names, of which there is one at least, are RDMA."""
    return bool(wires(used)) and all(name.startswith(RDMA) for name in wires(used))
