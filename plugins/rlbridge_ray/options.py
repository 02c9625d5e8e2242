"""Options of the transports that Ray carries."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlbridge.roles.transport import TransportOptions


class RdtOptions(TransportOptions):
    """Options of `rdt`."""

    tensor_transport: Literal["nixl", "gloo", "nccl", "cuda_ipc"] = Field(
        "nixl", description="What Ray moves the tensors with, as in @ray.method(tensor_transport=...)."
    )


class ObjectStoreOptions(TransportOptions):
    """Options of `object_store`: none."""
