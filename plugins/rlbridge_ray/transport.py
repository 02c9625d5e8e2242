"""Tensors as arguments of Ray tasks: the source returns views of its arena, Ray brings them to the sink.

Ray allocates fresh memory for what it receives, so a transfer that comes too late writes nowhere that matters, and the copy
into the sink's arena is ours. (Receiving into the arena itself needs a borrowed reference, which leaks one record a sync: Ray
issue 57962.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch

from rlbridge.errors import TransportError
from rlbridge.importing import missing_module
from rlbridge.rdma.devices import has_rdma_device
from rlbridge.rdma.ucx import quiet_ucx
from rlbridge.roles.transport import Copy, Transport, TransportContext, TransportOptions, WireEvidence
from rlbridge_ray.options import ObjectStoreOptions, RdtOptions

O = TypeVar("O", bound=TransportOptions)  # noqa: E741


_NO_RDMA = ("gloo", "cuda_ipc")


class _RayTransport(Transport[O]):
    """What `rdt` and `object_store` share: one tensor a copy, in the order of the copies."""

    moves_ray_objects: ClassVar[bool] = True

    def __init__(self, context: TransportContext, options: O) -> None:
        self._context = context
        self._options = options
        self._blocks: list[torch.Tensor] = []
        self._copies: list[Copy] = []
        self._moved = 0

    def open(self, blocks: Sequence[torch.Tensor]) -> bytes:
        self._blocks = list(blocks)
        return b""

    def connect(self, peers: Mapping[str, bytes], copies: Sequence[Copy]) -> None:
        self._copies = list(copies)

    def tensors(self, version: int, slot: int, sink: str) -> list[torch.Tensor]:
        return [
            self._blocks[c.source_block][c.source_offset : c.source_offset + c.nbytes]
            for c in self._copies
            if c.sink == sink and c.slot == slot
        ]

    def receive(self, version: int, slot: int, tensors: Mapping[str, list[torch.Tensor]], deadline: float) -> int:
        moved = 0
        taken = {source: iter(parts) for source, parts in tensors.items()}
        for copy in self._copies:
            if copy.slot != slot:
                continue
            part = next(taken[copy.source], None)
            if part is None or part.numel() != copy.nbytes:
                raise TransportError(
                    f"{copy.source} sent {'nothing' if part is None else part.numel()} where {copy.nbytes} bytes were due",
                    peer=copy.source,
                    version=version,
                    phase="wire",
                )
            self._blocks[copy.sink_block][copy.sink_offset : copy.sink_offset + copy.nbytes].copy_(part)
            moved += copy.nbytes
        self._moved += moved
        return moved

    def close(self) -> None:
        self._blocks, self._copies = [], []


class ObjectStoreTransport(_RayTransport[ObjectStoreOptions]):
    """Ray's object store."""

    def evidence(self) -> WireEvidence:
        return WireEvidence(
            "object_store", "plasma", "Ray serialises the tensors of a task without tensor_transport", self._moved, rdma=False
        )


class RdtTransport(_RayTransport[RdtOptions]):
    """Ray Direct Transport."""

    def __init__(self, context: TransportContext, options: RdtOptions) -> None:
        super().__init__(context, options)
        self._pinned: list[torch.Tensor] = []
        quiet_ucx()  # Ray makes its NIXL agent at the first transfer

    @classmethod
    def unavailable(cls, options: RdtOptions, device: str) -> str | None:
        """nixl needs its package, nccl and cuda_ipc need GPUs on both sides."""
        wire = options.tensor_transport
        if options.require == "rdma" and not has_rdma_device():
            return "transport.require=rdma, and this machine has no RDMA device (/sys/class/infiniband is empty)"
        if options.require == "rdma" and wire in _NO_RDMA:
            return f"transport.require=rdma, and transport.tensor_transport={wire} does not use RDMA"
        if wire == "nixl" and missing_module("nixl"):
            return "transport.tensor_transport=nixl needs the package nixl: pip install 'rlbridge[rdt]'"
        if wire in ("nccl", "cuda_ipc") and device != "cuda":
            return f"transport.tensor_transport={wire} needs a GPU for trainer and generator (resources.gpus)"
        return None

    @classmethod
    def ray_tensor_transport(cls, options: RdtOptions) -> str | None:
        return options.tensor_transport

    @classmethod
    def rendezvous(cls, options: RdtOptions, actors: Sequence[Any], deadline_seconds: float) -> Callable[[], None] | None:
        """gloo and nccl need one group of all actors, made in the driver."""
        if options.tensor_transport == "gloo":
            from rlbridge_ray.gloo import create_group

            return create_group(actors, deadline_seconds)
        if options.tensor_transport == "nccl":
            from ray.experimental.collective import create_collective_group, destroy_collective_group

            group = create_collective_group(list(actors), backend="nccl")
            return lambda: destroy_collective_group(group)
        return None

    def open(self, blocks: Sequence[torch.Tensor]) -> bytes:
        address = super().open(blocks)
        if self._options.tensor_transport == "nixl" and self._context.side == "source":
            from ray.experimental import register_nixl_memory

            for block in blocks:
                register_nixl_memory(block)
                self._pinned.append(block)
        return address

    def close(self) -> None:
        if self._pinned:
            from ray.experimental import deregister_nixl_memory

            for block in self._pinned:
                deregister_nixl_memory(block)
            self._pinned = []
        super().close()

    def evidence(self) -> WireEvidence:
        return WireEvidence(
            "rdt",
            self._options.tensor_transport,
            "the tensor_transport that Ray was asked for, which has no fallback",
            self._moved,
            rdma=False if self._options.tensor_transport in _NO_RDMA else None,  # of the others Ray tells no more
        )
