"""An engine's parameters as engines hold them: fused, cut over tensor-parallel ranks, and filled by a loader."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from rlbridge.errors import LayoutError, ModelError
from rlbridge.roles.generator import GeneratorContext
from rlbridge.roles.sink import RecordedSink, WeightSink
from rlbridge.sync.subscriber import Subscriber
from rlbridge_conformance.reference.checkpoint import held_dtype, read_tensors
from rlbridge_conformance.reference.config import EMBED, EXTRA, HEAD, NORM, Shape, layer_name, read_config
from rlbridge_conformance.reference.model import LayerWeights, RankWeights
from rlbridge_conformance.reference.options import ReferenceGeneratorOptions

Projection = Literal["q_proj", "k_proj", "v_proj"]

QKV, GATE_UP = "self_attn.qkv_proj", "mlp.gate_up_proj"


@dataclass
class EngineRank:
    """One rank of an engine.

    Attributes:
        parameters: Everything that a sync has to write, by the engine's own names.
        scaled_q_norms: Derived, one a layer, in float32: the weight of q_norm times the scale of the softmax.
    """

    index: int
    parameters: dict[str, torch.Tensor]
    scaled_q_norms: list[torch.Tensor]


class TensorParallelWeights:
    """The weights of `options.tp` ranks: making, loading and refreshing them.

    The base of the reference generator rather than a part of it, so that an engine that breaks one rule overrides one method.
    """

    def load_model(self, context: GeneratorContext, options: ReferenceGeneratorOptions) -> None:
        """Fill the parameters of every rank from the model's files, and put a subscriber over them.

        Raises:
            ModelError: the directory holds no such model, or it cannot be cut into so many ranks.
            LayoutError: the files hold a tensor that the loader does not know.
        """
        if context.device != "cpu":
            raise ModelError("the reference generator works on the CPU", todo="set generator.resources.gpus=0")
        self.context, self.options = context, options
        path = Path(context.model_path)
        self.config = read_config(path)
        self.check_divisible()
        tensors = read_tensors(path, self.config)
        self.shapes: dict[str, Shape] = {name: tuple(t.shape) for name, t in tensors.items() if name.startswith(EXTRA)}
        self.shapes |= self.config.shapes() | {HEAD: (self.config.vocabulary, self.config.hidden)}
        self.ranks = [self.make_rank(rank, tensors) for rank in range(options.tp)]
        for rank in self.ranks:
            self.load(rank, tensors.items())
            self.refresh(rank)
        self.subscribers = [self.make_subscriber(rank) for rank in self.ranks]

    def make_rank(self, index: int, tensors: Mapping[str, torch.Tensor]) -> EngineRank:
        """A rank with empty parameters."""
        scaled = [torch.empty(self.config.head_dim) for _ in range(self.config.layers)]
        return EngineRank(index, self.make_parameters(tensors), scaled)

    def make_subscriber(self, rank: EngineRank) -> Subscriber:
        """What receives a rank's weights."""
        name = f"generator[{self.context.engine}].rank[{rank.index}]"
        return Subscriber(name, self.make_sink(rank), self.context.device, rank=rank.index)

    def make_sink(self, rank: EngineRank) -> WeightSink:
        """What the subscriber installs through: the loader recorded, and the refresh after each install."""
        return RecordedSink(lambda weights: self.load(rank, weights), rank.parameters, lambda: self.refresh(rank))

    def make_parameters(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A rank's empty parameters; each has the dtype in which the first tensor that goes into it is held."""
        tp, config = self.options.tp, self.config
        made: dict[str, torch.Tensor] = {}

        def make(name: str, shape: Shape, like: str) -> None:
            dtype = held_dtype(tensors[like].dtype, self.options.dtype, keep=self.options.keep_dtypes)
            made[name] = torch.empty(shape, dtype=dtype)

        make(EMBED, (config.vocabulary // tp, config.hidden), EMBED)
        for layer in range(config.layers):
            rows = sum(count for _, count in map(self.heads, ("q_proj", "k_proj", "v_proj"))) * config.head_dim
            make(layer_name(layer, QKV), (rows, config.hidden), layer_name(layer, "self_attn.q_proj"))
            make(layer_name(layer, GATE_UP), (2 * config.intermediate // tp, config.hidden), layer_name(layer, "mlp.gate_proj"))
            for part in ("self_attn.o_proj", "mlp.down_proj"):
                name = layer_name(layer, part)
                make(name, (config.hidden, self.shapes[name][1] // tp), name)
            for part in ("input_layernorm", "self_attn.q_norm", "self_attn.k_norm", "post_attention_layernorm"):
                name = layer_name(layer, part)
                make(name, self.shapes[name], name)
        for name in (NORM, *(name for name in self.shapes if name.startswith(EXTRA))):
            make(name, self.shapes[name], name)
        if config.tied:
            made[HEAD] = made[EMBED]
        else:
            make(HEAD, (config.vocabulary // tp, config.hidden), HEAD)
        return made

    def load(self, rank: EngineRank, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """The engine's loader: each checkpoint tensor, full, goes where this rank has its part of it.

        Raises:
            LayoutError: a tensor is unknown, or of another shape.
        """
        for name, tensor in weights:
            self.check_tensor(name, tensor)
            self.load_tensor(rank, name, tensor)

    def check_tensor(self, name: str, tensor: torch.Tensor) -> None:
        """Refuse what is no tensor of this model.

        Raises:
            LayoutError: names it.
        """
        if name not in self.shapes:
            raise LayoutError(
                "the generator's model has no such tensor",
                role="generator",
                tensor=name,
                todo="make trainer and generator from one model directory",
            )
        if tuple(tensor.shape) != self.shapes[name]:
            raise LayoutError(
                f"a tensor of another shape: {list(tensor.shape)} arrives, {list(self.shapes[name])} is held",
                role="generator",
                tensor=name,
                todo="make trainer and generator from one model directory",
            )

    def load_tensor(self, rank: EngineRank, name: str, tensor: torch.Tensor) -> None:
        """Hand one tensor to the method for its kind."""
        kind = "" if name.startswith(EXTRA) else name.rsplit(".", 2)[-2]
        match kind:
            case "q_proj" | "k_proj" | "v_proj":
                self.load_qkv(rank, name, kind, tensor)
            case "gate_proj" | "up_proj":
                self.load_gate_up(rank, name, kind, tensor)
            case "o_proj" | "down_proj":
                self.load_columns(rank, name, tensor)
            case "embed_tokens" | "lm_head":
                self.load_vocabulary(rank, name, tensor)
            case _:
                self.load_whole(rank, name, tensor)

    def load_qkv(self, rank: EngineRank, name: str, kind: Projection, tensor: torch.Tensor) -> None:
        """The rows of this rank's heads, into their place in the fused projection: queries, then keys, then values."""
        first, count = self.heads_of(rank.index, kind)
        fused = rank.parameters[name.replace(kind, "qkv_proj")]
        heads = tensor.view(-1, self.config.head_dim, self.config.hidden).narrow(0, first, count)
        start = self.qkv_start(kind)
        fused.narrow(0, start, count * self.config.head_dim).copy_(heads.reshape(-1, self.config.hidden))

    def load_gate_up(self, rank: EngineRank, name: str, kind: str, tensor: torch.Tensor) -> None:
        """This rank's rows: gate into the first half of the fused projection, up into the second."""
        halves = rank.parameters[name.replace(kind, "gate_up_proj")].chunk(2)
        halves[("gate_proj", "up_proj").index(kind)].copy_(tensor.chunk(self.options.tp)[rank.index])

    def load_columns(self, rank: EngineRank, name: str, tensor: torch.Tensor) -> None:
        """The columns that take what this rank has computed."""
        held = rank.parameters[name]
        held.copy_(tensor.narrow(1, rank.index * held.shape[1], held.shape[1]))

    def load_vocabulary(self, rank: EngineRank, name: str, tensor: torch.Tensor) -> None:
        """The rows of this rank's tokens."""
        rank.parameters[name].copy_(tensor.chunk(self.options.tp)[rank.index])

    def load_whole(self, rank: EngineRank, name: str, tensor: torch.Tensor) -> None:
        """Every rank has all of it."""
        rank.parameters[name].copy_(tensor)

    def refresh(self, rank: EngineRank) -> None:
        """Make anew, in place, what is derived from the parameters."""
        for layer, scaled_H in enumerate(rank.scaled_q_norms):
            q_norm_H = rank.parameters[layer_name(layer, "self_attn.q_norm")]
            torch.mul(q_norm_H.float(), self.config.head_dim**-0.5, out=scaled_H)

    def heads(self, kind: str) -> tuple[int, int]:
        """How many heads a projection has in all, and on each rank: with more ranks than key-value heads, ranks share one."""
        total = self.config.heads if kind == "q_proj" else self.config.kv_heads
        return total, max(total // self.options.tp, 1)

    def heads_of(self, rank: int, kind: str) -> tuple[int, int]:
        """The first head of a projection on `rank`, and how many."""
        total, count = self.heads(kind)
        return rank * total // self.options.tp, count

    def qkv_start(self, kind: Projection) -> int:
        """The row of the fused projection at which a projection starts."""
        order: list[Projection] = ["q_proj", "k_proj", "v_proj"]
        return sum(self.heads(before)[1] for before in order[: order.index(kind)]) * self.config.head_dim

    def rank_weights(self, rank: EngineRank) -> RankWeights:
        """The live parameters as the forward pass takes them."""
        layers = [self.layer_weights(rank, layer) for layer in range(self.config.layers)]
        return RankWeights(rank.parameters[EMBED], layers, rank.parameters[NORM], rank.parameters[HEAD])

    def layer_weights(self, rank: EngineRank, layer: int) -> LayerWeights:
        """One decoder layer of it."""

        def of(part: str) -> torch.Tensor:
            return rank.parameters[layer_name(layer, part)]

        counts = [self.heads(kind)[1] * self.config.head_dim for kind in ("q_proj", "k_proj", "v_proj")]
        q_proj, k_proj, v_proj = torch.split(of(QKV), counts)
        gate_proj, up_proj = of(GATE_UP).chunk(2)
        return LayerWeights(
            input_norm_D=of("input_layernorm"),
            q_proj=q_proj,
            k_proj=k_proj,
            v_proj=v_proj,
            o_proj=of("self_attn.o_proj"),
            scaled_q_norm_H=rank.scaled_q_norms[layer],
            k_norm_H=of("self_attn.k_norm"),
            post_norm_D=of("post_attention_layernorm"),
            gate_proj=gate_proj,
            up_proj=up_proj,
            down_proj=of("mlp.down_proj"),
        )

    def check_divisible(self) -> None:
        """Refuse a number of ranks that the model cannot be cut into.

        Raises:
            ModelError: says what does not divide.
        """
        tp, config = self.options.tp, self.config
        sizes = {"vocab_size": config.vocabulary, "num_attention_heads": config.heads, "intermediate_size": config.intermediate}
        wrong = [f"{name} {size}" for name, size in sizes.items() if size % tp]
        if config.kv_heads % tp and tp % config.kv_heads:
            wrong.append(f"num_key_value_heads {config.kv_heads}")
        if wrong:
            raise ModelError(
                f"the model in {self.context.model_path} cannot be cut into {tp} ranks: {', '.join(wrong)}",
                todo="give generator.tp a divisor of all of them",
            )
