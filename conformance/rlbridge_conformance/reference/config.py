"""What config.json says of a Qwen3, and the checkpoint tensors that follow from it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlbridge.errors import ModelError

EXTRA = "extra."
"""Tensors of this prefix belong to no Qwen3. They are carried along, so that a sync meets dtypes and shapes of every kind."""

EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ModelConfig:
    """The sizes of a Qwen3. `stop_ids` are the tokens that end a completion; `tied`: the head is the embedding."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    tied: bool
    stop_ids: frozenset[int]

    def shapes(self) -> dict[str, Shape]:
        """Every checkpoint tensor of the model, as Qwen3ForCausalLM saves it; the head only where it is its own."""
        found: dict[str, Shape] = {EMBED: (self.vocabulary, self.hidden), NORM: (self.hidden,)}
        for layer in range(self.layers):
            found |= {layer_name(layer, part): shape for part, shape in self._layer_shapes().items()}
        return found if self.tied else found | {HEAD: found[EMBED]}

    def _layer_shapes(self) -> dict[str, Shape]:
        queries, keys, width = self.heads * self.head_dim, self.kv_heads * self.head_dim, self.hidden
        return {
            "input_layernorm": (width,),
            "self_attn.q_proj": (queries, width),
            "self_attn.k_proj": (keys, width),
            "self_attn.v_proj": (keys, width),
            "self_attn.o_proj": (width, queries),
            "self_attn.q_norm": (self.head_dim,),
            "self_attn.k_norm": (self.head_dim,),
            "post_attention_layernorm": (width,),
            "mlp.gate_proj": (self.intermediate, width),
            "mlp.up_proj": (self.intermediate, width),
            "mlp.down_proj": (width, self.intermediate),
        }


def layer_name(layer: int, part: str) -> str:
    """The checkpoint's name of the weight of `part` ("mlp.up_proj") in a decoder layer."""
    return f"model.layers.{layer}.{part}.weight"


def read_config(path: Path) -> ModelConfig:
    """The config of a model directory, and the tokens at which its generation_config.json, or else its config, stops.

    Raises:
        ModelError: there is no config.json, or it is that of a model that these functions do not compute.
    """
    told = _read_json(path / "config.json")
    rope = told.get("rope_parameters") or told.get("rope_scaling") or {}
    wanted = {
        "model_type": (told.get("model_type"), "qwen3"),
        "attention_bias": (told.get("attention_bias", False), False),
        "hidden_act": (told.get("hidden_act", "silu"), "silu"),
        "use_sliding_window": (told.get("use_sliding_window", False), False),
        "rope_type": (rope.get("rope_type", "default"), "default"),
    }
    for key, (found, known) in wanted.items():
        if found != known:
            raise ModelError(
                f"{path / 'config.json'} says {key}={found!r}, and the reference backends compute {key}={known!r} only",
                todo="use a plain Qwen3, or other backends",
            )
    generation = path / "generation_config.json"
    eos = _read_json(generation).get("eos_token_id") if generation.is_file() else None
    eos = told.get("eos_token_id") if eos is None else eos
    try:
        return ModelConfig(
            vocabulary=told["vocab_size"],
            hidden=told["hidden_size"],
            intermediate=told["intermediate_size"],
            layers=told["num_hidden_layers"],
            heads=told["num_attention_heads"],
            kv_heads=told["num_key_value_heads"],
            head_dim=told.get("head_dim") or told["hidden_size"] // told["num_attention_heads"],
            norm_eps=told["rms_norm_eps"],
            rope_theta=rope.get("rope_theta") or told["rope_theta"],
            tied=told.get("tie_word_embeddings", False),
            stop_ids=frozenset([] if eos is None else eos if isinstance(eos, list) else [eos]),
        )
    except KeyError as error:
        raise ModelError(f"{path / 'config.json'} lacks {error}", todo="save the model with transformers 5") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}", todo="give a Hugging Face model directory") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds no JSON object")
    return found
