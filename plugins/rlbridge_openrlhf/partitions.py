"""What a rank publishes: its part of ZeRO's parameters where it lies, or full tensors that are gathered one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from rlbridge.errors import LayoutError
from rlbridge.huggingface.checkpoint import checkpoint_pieces, checkpoint_tensors, export_full, module_tensors
from rlbridge.roles.source import GatheredSource, ShardedSource, WeightSource
from rlbridge.weights.layout import Piece, Region, TensorMeta, compose, contiguous_strides, flat_boxes
from rlbridge_openrlhf.upstream import deepspeed


def weight_source(model: Any, weights: str) -> WeightSource:
    """The source of this rank; `weights` is auto, sharded or gathered.

    Raises:
        LayoutError: `weights=sharded`, and a checkpoint tensor is computed from parameters; it is named.
    """
    if weights != "gathered":
        try:
            tensors, pieces = checkpoint_pieces(model, full_shapes(model))
        except LayoutError:
            if weights == "sharded":
                raise
        else:
            own = own_pieces(model, pieces, dist.get_rank(), dist.get_world_size())
            return ShardedSource(tensors, own, lambda: storages(model))
    return GatheredSource(tensors_of(model), lambda: export(model), dist.get_rank(), dist.get_world_size())


def tensors_of(model: Any) -> list[TensorMeta]:
    """Every tensor of the model's checkpoint, with its full shape."""
    return checkpoint_tensors(model, full_shapes(model))


def export(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Each checkpoint tensor, full, on every rank; of ZeRO-3's only those that are converted together at a time. Collective."""
    return export_full(model, full_shapes(model), lambda names: _gathered(model, names))


def full_shapes(model: Any) -> dict[str, torch.Tensor]:
    """A placeholder of each parameter and persistent buffer in its full shape, which ZeRO-3 has taken from the module."""
    made: dict[int, torch.Tensor] = {}
    live = module_tensors(model)
    for tensor in live.values():
        shape = getattr(tensor, "ds_shape", tensor.shape)
        made.setdefault(id(tensor), torch.empty(tuple(shape), dtype=tensor.dtype, device="meta"))
    return {name: made[id(tensor)] for name, tensor in live.items()}


def own_pieces(model: Any, pieces: Sequence[Piece], rank: int, ranks: int) -> list[Piece]:
    """The part of `pieces` that this rank publishes, with offsets and strides of `storages`.

    It is one equal range of each flattened parameter: with ZeRO-3 the one that the rank holds, without the padding that makes
    the last one as long as the others; with ZeRO-2, where every rank holds all, the same, so that all ranks send. What is
    no parameter is rank 0's.
    """
    parts = {name: _part(name, tensor, rank, ranks) for name, tensor in module_tensors(model).items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in full_shapes(model).items()}
    return [own for piece in pieces for own in compose(piece, shapes[piece.storage], parts[piece.storage])]


def storages(model: Any) -> Mapping[str, torch.Tensor]:
    """This rank's current memory by parameter name: with ZeRO-3 its partition, in the dtype of the forward pass.

    That dtype is also what `save` writes. ZeRO's optimizer keeps weights in float32 beside it, and copies them here after each
    step, rounded where this is bfloat16.
    """
    return {name: _held(tensor).detach() for name, tensor in module_tensors(model).items()}


def _part(name: str, tensor: torch.Tensor, rank: int, ranks: int) -> list[Piece]:
    """The boxes of a parameter that the rank's flat range consists of."""
    shape = tuple(getattr(tensor, "ds_shape", tensor.shape))
    held = _held(tensor)
    if not isinstance(tensor, torch.nn.Parameter):
        start, stop = (0, tensor.numel()) if rank == 0 else (0, 0)
    else:
        numel = getattr(tensor, "ds_numel", tensor.numel())
        share = held.numel() if held is not tensor else -(-numel // ranks)
        start, stop = min(rank * share, numel), min((rank + 1) * share, numel)
    if held is tensor and not tensor.is_contiguous():
        raise LayoutError(f"{name!r} does not lie in one piece in the module", tensor=name, todo="use trainer.weights=gathered")
    first = int(held.storage_offset()) - (start if held is not tensor else 0)
    strides = contiguous_strides(shape)
    return [Piece(Region("", offset, box), name, first + flat, strides) for offset, box, flat in flat_boxes(shape, start, stop)]


def _held(tensor: torch.Tensor) -> torch.Tensor:
    """ZeRO-3's partition of a parameter, or the tensor itself."""
    partition: torch.Tensor | None = getattr(tensor, "ds_tensor", None)
    return tensor if partition is None else partition


@contextmanager
def _gathered(model: Any, names: Sequence[str]) -> Iterator[Mapping[str, torch.Tensor]]:
    live = module_tensors(model)
    wanted = {name: live[name] for name in names}
    sharded = list({id(tensor): tensor for tensor in wanted.values() if hasattr(tensor, "ds_tensor")}.values())
    with deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded)):
        yield {name: tensor.data for name, tensor in wanted.items()}
