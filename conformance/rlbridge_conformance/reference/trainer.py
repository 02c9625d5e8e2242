"""The reference trainer: every rank holds the whole model, takes the same step, and publishes its own shard of it."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from rlbridge.errors import CheckpointError, ModelError
from rlbridge.roles.batch import Batch, Sequences
from rlbridge.roles.source import GatheredSource, ShardedSource, WeightSource
from rlbridge.roles.trainer import Trainer, TrainerContext
from rlbridge.weights.layout import Piece, Region, TensorMeta, flat_boxes
from rlbridge_conformance.reference.checkpoint import can_walk, copy_beside, held_dtype, read_tensors, write_tensors
from rlbridge_conformance.reference.config import EMBED, HEAD, NORM, layer_name, read_config
from rlbridge_conformance.reference.gathering import RowGroup
from rlbridge_conformance.reference.model import LayerWeights, RankWeights, completion_logprobs
from rlbridge_conformance.reference.options import ReferenceTrainerOptions


class ReferenceTrainer(Trainer[ReferenceTrainerOptions]):
    """One rank. The ranks do not talk to one another, unless they gather what they publish (`shards: gathered`).

    A step is one of a random walk. Whether a sync carries the weights does not depend on what moved them; that every rank takes
    the same step follows from its seed alone, and needs no collective; and unlike an optimizer's, no step is ever zero.

    Attributes:
        tensors: The replica: every tensor of the model's files by its checkpoint name. Changed in place, never replaced.
        step: Steps taken.
    """

    def setup(self, context: TrainerContext, options: ReferenceTrainerOptions) -> None:
        """Read every tensor of the files."""
        if context.device != "cpu":
            raise ModelError("the reference trainer works on the CPU", todo="set trainer.resources.gpus=0")
        self.context, self.options = context, options
        path = Path(context.model_path)
        self.config = read_config(path)
        self.tensors = {name: self.held(tensor) for name, tensor in sorted(read_tensors(path, self.config).items())}
        self.step = 0
        self.group = None
        if options.shards == "gathered":
            self.group = RowGroup(context.rendezvous, context.rank, context.world_size, context.timeout_seconds)

    def train_step(self, batch: Batch) -> dict[str, float]:
        """One step of the walk. `loss` is minus the mean log-prob of this rank's rows, before the step."""
        loss = self.loss(batch)
        self.step += 1
        squares = 0.0
        for name, tensor in self.tensors.items():
            if can_walk(tensor):
                squares += self.move(name, tensor)
        return {"loss": loss, "grad_norm": math.sqrt(squares)}

    def score(self, sequences: Sequences) -> np.ndarray[Any, Any]:
        """With the whole replica, on each rank; `micro_batch` sequences at a time."""
        return completion_logprobs(self.config, [self.rank_weights()], sequences, self.options.micro_batch)

    def weights(self) -> WeightSource:
        """This rank's shard, read in place; or tensors that the ranks gather."""
        if self.options.shards == "gathered":
            return GatheredSource(self.metas(), self.export, self.context.rank, self.context.world_size)
        return ShardedSource(self.metas(), self.pieces(), self.storages)

    def save(self, path: Path) -> None:
        """Rank 0 writes: each has all of the weights."""
        if self.context.rank == 0:
            write_tensors(path / "model.safetensors", self.tensors)
            copy_beside(Path(self.context.model_path), path)

    def save_state(self, path: Path) -> None:
        """The replica and the number of steps, by rank: noise depends on nothing else."""
        write_tensors(self.state_file(path), self.tensors)
        try:
            self.state_file(path).with_suffix(".json").write_text(json.dumps({"step": self.step}))
        except OSError as error:
            raise CheckpointError(f"{path} could not be written: {error}", todo="make room, or save elsewhere") from error

    def load_state(self, path: Path) -> None:
        """What this rank wrote, in place."""
        file = self.state_file(path)
        try:
            found = load_file(file)
            step = json.loads(file.with_suffix(".json").read_text())["step"]
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"the state of rank {self.context.rank} of {self.context.world_size} in {path} cannot be read: {error}",
                todo="resume with as many trainer.workers as saved it, or from an earlier checkpoint",
            ) from error
        self.check_state(found, path)
        for name, tensor in self.tensors.items():
            tensor.copy_(found[name])
        self.step = step

    def close(self) -> None:
        """Leave the gloo group."""
        self.group = None

    def held(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the files as the replica holds it: its dtype, and whether it lies row-major."""
        own = tensor.to(held_dtype(tensor.dtype, self.options.dtype, keep=self.options.keep_dtypes), copy=True)
        return own.mT.contiguous().mT if own.dim() == 2 and not self.options.contiguous else own

    def loss(self, batch: Batch) -> float:
        """Minus the mean log-prob of the completion tokens in this rank's rows."""
        mask_BT = batch.sequences.completion_mask_BT()
        return -float(self.score(batch.sequences)[mask_BT].mean()) if mask_BT.any() else 0.0

    def move(self, name: str, tensor: torch.Tensor) -> float:
        """Take the step of one tensor in place. Returns the squared norm of the step."""
        change = self.noise(name, tensor.shape) * self.context.optimizer.lr
        tensor.add_(change.to(tensor.dtype))
        return float(change.square().sum(dtype=torch.float64))

    def noise(self, name: str, shape: torch.Size) -> torch.Tensor:
        """Normal noise that depends on the seed, the step and the tensor's name: the same on every rank."""
        seed = zlib.crc32(f"{self.context.seed} {self.step} {name}".encode())
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    def metas(self) -> list[TensorMeta]:
        """What is published: every tensor, and the head as an alias where it is tied."""
        found = [
            TensorMeta(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            for name, tensor in self.tensors.items()
        ]
        if self.config.tied:
            embedding = next(meta for meta in found if meta.name == EMBED)
            found.append(TensorMeta(HEAD, embedding.shape, embedding.dtype, alias_of=EMBED))
        return found

    def pieces(self) -> list[Piece]:
        """Where the boxes of this rank's shard lie in the replica."""
        return [self.piece(name, *box) for name, tensor in self.tensors.items() for box in self.boxes(tensor.shape)]

    def piece(self, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Piece:
        """Where one box lies."""
        tensor = self.tensors[name]
        first = tensor.storage_offset() + sum(o * s for o, s in zip(offset, tensor.stride(), strict=True))
        return Piece(Region(name, offset, shape), name, int(first), tuple(tensor.stride()))

    def boxes(self, shape: torch.Size) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        """This rank's shard of a tensor, as boxes (offset, shape). A scalar is rank 0's, and nobody's is an empty tensor."""
        if not shape or not shape.numel():
            start, stop = 0, shape.numel() if self.context.rank == 0 else 0
        elif self.options.shards == "flat":
            start, stop = self.share(shape.numel())
        else:
            start, stop = (row * (shape.numel() // shape[0]) for row in self.share(shape[0]))
        yield from ((offset, box) for offset, box, _ in flat_boxes(shape, start, stop))

    def share(self, count: int) -> tuple[int, int]:
        """This rank's part of `count` rows or elements: equal ones, the last ranks' smaller or empty, as FSDP cuts."""
        size = -(-count // self.context.world_size)
        return min(self.context.rank * size, count), min((self.context.rank + 1) * size, count)

    def storages(self) -> dict[str, torch.Tensor]:
        """The current tensors, by the names that `piece` gives storages."""
        return self.tensors

    def export(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each full tensor, put together of the ranks' rows. Collective."""
        for name, tensor in self.tensors.items():
            yield name, self.gathered(name, tensor)

    def gathered(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """One full tensor. Collective, but for an empty one."""
        assert self.group is not None
        if not tensor.numel():
            return tensor
        table = tensor.reshape(1) if tensor.dim() == 0 else tensor
        start, stop = self.share(len(table))
        return self.group.gather(name, table[start:stop], table.shape).reshape(tensor.shape)

    def rank_weights(self) -> RankWeights:
        """The replica as the forward pass takes it."""
        head = self.tensors[EMBED if self.config.tied else HEAD]
        layers = [self.layer_weights(layer) for layer in range(self.config.layers)]
        return RankWeights(self.tensors[EMBED], layers, self.tensors[NORM], head)

    def layer_weights(self, layer: int) -> LayerWeights:
        """One decoder layer of it."""

        def of(part: str) -> torch.Tensor:
            return self.tensors[layer_name(layer, part)]

        return LayerWeights(
            input_norm_D=of("input_layernorm"),
            q_proj=of("self_attn.q_proj"),
            k_proj=of("self_attn.k_proj"),
            v_proj=of("self_attn.v_proj"),
            o_proj=of("self_attn.o_proj"),
            scaled_q_norm_H=of("self_attn.q_norm").float() * self.config.head_dim**-0.5,
            k_norm_H=of("self_attn.k_norm"),
            post_norm_D=of("post_attention_layernorm"),
            gate_proj=of("mlp.gate_proj"),
            up_proj=of("mlp.up_proj"),
            down_proj=of("mlp.down_proj"),
        )

    def state_file(self, path: Path) -> Path:
        """Where this rank's state lies in a checkpoint."""
        return path / f"rank-{self.context.rank}-of-{self.context.world_size}.safetensors"

    def check_state(self, found: dict[str, torch.Tensor], path: Path) -> None:
        """Refuse the state of another model.

        Raises:
            CheckpointError: names the first tensor that differs.
        """
        for name in sorted({*found, *self.tensors}):
            here, there = (_described(tensors.get(name)) for tensors in (self.tensors, found))
            if here != there:
                raise CheckpointError(
                    f"{path} is the state of another model: {name!r} is {there} there, {here} here",
                    todo="resume with the model directory and the trainer.dtype that the run began with",
                    tensor=name,
                )


def _described(tensor: torch.Tensor | None) -> str:
    return "absent" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
