"""Options of the `nixl` transport."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlbridge.roles.transport import TransportOptions


class NixlOptions(TransportOptions):
    """Which end acts, and which wires NIXL's UCX backend may use."""

    operation: Literal["read", "write"] = Field(
        "read", description="read: engine ranks fetch; write: trainer ranks deliver, three times as fast over TCP."
    )
    wire: Literal["any", "shm", "tcp", "rdma"] = Field(
        "any", description="The wire that has to carry the bytes; the run fails if another does. any: what UCX picks."
    )
    net_devices: str = Field(
        "", description="UCX_NET_DEVICES: the interfaces of the data plane, for example mlx5_0:1,mlx5_1:1."
    )
