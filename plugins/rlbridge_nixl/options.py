"""Options of the `nixl` transport."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

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

    @model_validator(mode="after")
    def _one_wire(self) -> NixlOptions:
        """What is required is what UCX may use."""
        if self.require == "rdma" and self.wire == "any":
            self.wire = "rdma"
        if self.require != "any" and self.wire != self.require:
            raise ValueError(f"require is {self.require}, and wire is {self.wire}")
        return self
