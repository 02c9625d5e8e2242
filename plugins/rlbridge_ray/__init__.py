"""Transports that Ray carries: `rdt` (Ray Direct Transport) and `object_store` (the baseline)."""

from __future__ import annotations

from collections.abc import Sequence

from rlbridge import Backend, Capability, hookimpl


@hookimpl
def rlbridge_transports() -> Sequence[Backend]:
    """The backends `rdt` and `object_store`."""
    return [
        Backend(
            name="rdt",
            load="rlbridge_ray.transport:RdtTransport",
            options="rlbridge_ray.options:RdtOptions",
            summary="Ray Direct Transport: NIXL, gloo, NCCL or CUDA IPC between Ray actors",
            extra="rdt",
            requirements="rlbridge_conformance.ours:RdtRequirements",
            requires=("torch", "ray"),
            capabilities=frozenset(
                {Capability.CROSS_HOST, Capability.CUDA, Capability.RDMA, Capability.NEEDS_RAY_ACTORS, Capability.ABORTABLE}
            ),
        ),
        Backend(
            name="object_store",
            load="rlbridge_ray.transport:ObjectStoreTransport",
            options="rlbridge_ray.options:ObjectStoreOptions",
            summary="Ray's object store: works wherever Ray does; the baseline",
            requires=("torch", "ray"),
            capabilities=frozenset({Capability.CROSS_HOST, Capability.NEEDS_RAY_ACTORS, Capability.ABORTABLE}),
        ),
    ]
