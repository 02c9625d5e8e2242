"""What a rank of verl publishes: its FSDP2 shards where they lie, or full tensors from verl's own export."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from rlbridge.errors import LayoutError
from rlbridge.huggingface.checkpoint import checkpoint_pieces, export_full
from rlbridge.huggingface.shards import local_storages, shard_pieces
from rlbridge.roles.source import GatheredSource, ShardedSource, WeightSource
from rlbridge.roles.trainer import TrainerContext
from rlbridge.weights.layout import TensorMeta
from rlbridge_verl.options import VerlTrainerOptions


def weight_source(
    engine: Any, tensors: Sequence[TensorMeta], context: TrainerContext, options: VerlTrainerOptions
) -> WeightSource:
    """The source of this rank; `tensors` are those of the checkpoint, as `export` yields them.

    Raises:
        LayoutError: `weights=sharded`, and a checkpoint tensor is computed from parameters; it is named.
    """
    if options.weights != "gathered" and shards_are_weights(options):
        try:
            found, pieces = checkpoint_pieces(engine.module)
        except LayoutError:
            if options.weights == "sharded":
                raise
        else:
            own = shard_pieces(engine.module, pieces, context.rank)
            return ShardedSource(found, own, lambda: local_storages(engine.module))
    return GatheredSource(tensors, lambda: export(engine, tensors), context.rank, context.world_size)


def shards_are_weights(options: VerlTrainerOptions) -> bool:
    """Whether the engine's parameters are DTensors that make up the checkpoint as they are."""
    return options.strategy == "fsdp2" and not options.lora_rank


def export(engine: Any, tensors: Sequence[TensorMeta]) -> Iterator[tuple[str, torch.Tensor]]:
    """Full checkpoint tensors from verl's `get_per_tensor_param`, without the aliases that it yields too. Collective.

    Raises:
        LayoutError: verl yields a tensor that the checkpoint does not have, or one of another shape.
    """
    metas = {meta.name: meta for meta in tensors}
    exported, _ = engine.get_per_tensor_param()
    for name, tensor in exported:
        meta = metas.get(name)
        if meta is None or tuple(tensor.shape) != meta.shape:
            raise LayoutError(
                f"verl exports {name!r} {list(tensor.shape)}, which the checkpoint of this model does not have",
                tensor=name,
                role="trainer",
            )
        if meta.alias_of is None:
            yield name, tensor


def export_for_saving(
    engine: Any, tensors: Sequence[TensorMeta], options: VerlTrainerOptions
) -> Iterator[tuple[str, torch.Tensor]]:
    """What is published, as full tensors. Collective."""
    return export_full(engine.module) if shards_are_weights(options) else export(engine, tensors)
