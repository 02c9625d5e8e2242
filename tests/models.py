"""Tiny models of real architectures, made from a config and a seed, each saved as a Hugging Face directory with a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

CHARACTERS = "0123456789+-*/=()., abcdefghijklmnopqrstuvwxyz\n"
VOCABULARY = ["<pad>", "<eos>", "<unk>", *CHARACTERS]
VOCABULARY_SIZE = 67
"""Odd, and more than the tokenizer has: shards are uneven and some rows belong to no token."""

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}


def tiny_qwen3(path: Path, *, tied: bool = False, seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: Any) -> Path:
    """A Qwen3 of about 20,000 parameters; `sizes` are keys of its config."""
    config = Qwen3Config(**{**_SIZES, "head_dim": 8, "tie_word_embeddings": tied, **sizes})
    return _saved(Qwen3ForCausalLM, config, path, seed, dtype)


def tiny_qwen3_moe(path: Path, *, tied: bool = False, seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: Any) -> Path:
    """A Qwen3-MoE with three experts, so that two ranks hold unequal numbers of them."""
    own = {"head_dim": 8, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "tie_word_embeddings": tied}
    return _saved(Qwen3MoeForCausalLM, Qwen3MoeConfig(**{**_SIZES, **own, **sizes}), path, seed, dtype)


def tiny_mixtral(path: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: Any) -> Path:
    """A Mixtral with four experts."""
    own = {"num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False}
    return _saved(MixtralForCausalLM, MixtralConfig(**{**_SIZES, **own, **sizes}), path, seed, dtype)


def tiny_llama(path: Path, *, tied: bool = False, seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: Any) -> Path:
    """A Llama of about 20,000 parameters."""
    return _saved(LlamaForCausalLM, LlamaConfig(**{**_SIZES, "tie_word_embeddings": tied, **sizes}), path, seed, dtype)


def of_no_known_type(path: Path) -> Path:
    """A model whose type no transformers knows."""
    path = tiny_qwen3(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"model_type": "qwen3000"}))
    return path


def without_a_tensor(path: Path) -> Path:
    """A model whose file lacks `model.norm.weight`."""
    path = tiny_qwen3(path)
    tensors = load_file(path / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, with `<pad>` 0 and `<eos>` 1."""
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def _saved(kind: Any, config: Any, path: Path, seed: int, dtype: torch.dtype) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config)
        with torch.no_grad():
            for parameter in model.parameters():
                # Norm weights of exactly 1 and tiny logits would hide a tensor that went to the wrong place.
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.to(dtype).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path
