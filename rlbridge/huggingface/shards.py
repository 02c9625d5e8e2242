"""Which boxes of which checkpoint tensors one FSDP2 rank holds, and where in its local shards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from rlbridge.huggingface.checkpoint import module_tensors
from rlbridge.weights.layout import Piece, Region, compose


def shard_pieces(model: Any, pieces: Sequence[Piece], rank: int) -> list[Piece]:
    """The part of `pieces` that lies on this rank, with offsets and strides of `local_storages`.

    What is not sharded (buffers) is the same on every rank, and rank 0's.
    """
    live = module_tensors(model)
    return [own for piece in pieces for own in _on_this_rank(piece, live[piece.storage], rank)]


def local_storages(model: Any) -> dict[str, torch.Tensor]:
    """This rank's current memory by parameter name."""
    return {name: _local(tensor) for name, tensor in module_tensors(model).items()}


def _on_this_rank(piece: Piece, tensor: torch.Tensor, rank: int) -> Iterator[Piece]:
    if not isinstance(tensor, DTensor):
        if rank == 0:
            yield piece
        return
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    local = _local(tensor)
    part = Piece(Region("", tuple(offset), tuple(shape)), piece.storage, int(local.storage_offset()), tuple(local.stride()))
    yield from compose(piece, tensor.shape, [part])


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
