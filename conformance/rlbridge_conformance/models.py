"""Tiny models in the Hugging Face format, made on the spot: what every backend of a triple loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file

Kind = Literal["tied", "untied", "wide", "awkward"]

VOCABULARY, HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD = 64, 32, 2, 4, 2, 32
INNER = {"tied": HIDDEN, "untied": HIDDEN, "wide": 4096, "awkward": HIDDEN}
"""Where it is `HIDDEN`, the matrices are square: only their values tell that one is transposed."""

BULK_COLUMNS = 1024


def make_model(path: Path, kind: Kind = "tied", *, seed: int = 0, bulk_mib: int = 0) -> Path:
    """A Qwen3 of about 33,000 parameters, in float32.

    Args:
        path: The directory to make.
        kind: Whether the head is tied to the embeddings. "wide" is tied, and so large (3 MiB) that no transport takes it for a
            message. "awkward" is tied, and has tensors that are in the way: a scalar, an
            empty one, int8, bfloat16 and float16 ones, and one of an odd size; only the suite's own backends carry those.
        bulk_mib: An awkward model also gets a float32 tensor of so many MiB, which makes a transfer long.
    """
    made = torch.Generator().manual_seed(seed)
    tied = kind != "untied"
    tensors = {
        name: _norm(made, shape) if len(shape) == 1 else torch.randn(shape, generator=made) * 0.15
        for name, shape in _shapes(INNER[kind], tied=tied).items()
    }
    if kind == "awkward":
        tensors |= _awkward(made, bulk_mib)
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(_config(INNER[kind], tied=tied), indent=1) + "\n")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "pad_token_id": 0}) + "\n")
    return path


def _norm(made: torch.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    return 1 + 0.1 * torch.randn(shape, generator=made)


def _shapes(inner: int, *, tied: bool) -> dict[str, tuple[int, ...]]:
    layer = {
        "input_layernorm.weight": (HIDDEN,),
        "self_attn.q_proj.weight": (HEADS * HEAD, HIDDEN),
        "self_attn.k_proj.weight": (KV_HEADS * HEAD, HIDDEN),
        "self_attn.v_proj.weight": (KV_HEADS * HEAD, HIDDEN),
        "self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD),
        "self_attn.q_norm.weight": (HEAD,),
        "self_attn.k_norm.weight": (HEAD,),
        "post_attention_layernorm.weight": (HIDDEN,),
        "mlp.gate_proj.weight": (inner, HIDDEN),
        "mlp.up_proj.weight": (inner, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for index in range(LAYERS):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (HIDDEN,)
    return shapes if tied else shapes | {"lm_head.weight": (VOCABULARY, HIDDEN)}


def _awkward(made: torch.Generator, bulk_mib: int) -> dict[str, torch.Tensor]:
    found = {
        "extra.scalar": torch.randn((), generator=made),
        "extra.empty": torch.empty(0, HIDDEN),
        "extra.int8": torch.randint(-128, 127, (5, 7), generator=made, dtype=torch.int8),
        "extra.bfloat16": torch.randn(9, 11, generator=made).to(torch.bfloat16),
        "extra.float16": torch.randn(3, 5, 7, generator=made).to(torch.float16),
        "extra.odd": torch.randn(1021, 17, generator=made),
    }
    return found | ({"extra.bulk": torch.randn(bulk_mib * 256, BULK_COLUMNS, generator=made)} if bulk_mib else {})


def _config(inner: int, *, tied: bool) -> dict[str, object]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "intermediate_size": inner,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "tie_word_embeddings": tied,
        "dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
