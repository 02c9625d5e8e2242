"""The `nixl` transport: one-sided reads and writes by NIXL, without Ray in the data path."""

from __future__ import annotations

from collections.abc import Sequence

from rlbridge import Backend, Capability, hookimpl


@hookimpl
def rlbridge_transports() -> Sequence[Backend]:
    """The backend `nixl`."""
    return [
        Backend(
            name="nixl",
            load="rlbridge_nixl.transport:NixlTransport",
            options="rlbridge_nixl.options:NixlOptions",
            summary="NIXL between the arenas, one-sided: RDMA, shared memory (CMA) or TCP",
            extra="nixl",
            requirements="rlbridge_conformance.ours:NixlRequirements",
            requires=("torch", "nixl"),
            capabilities=frozenset(
                {
                    Capability.ONE_SIDED,
                    Capability.CROSS_HOST,
                    Capability.CUDA,
                    Capability.RDMA,
                    Capability.LIVE_STORAGE,
                }
            ),
        )
    ]
