"""Tiny models of several families, made on the spot in float32, with transformers as the oracle of what they say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from rlbridge.huggingface.checkpoint import module_tensors
from rlbridge.roles.batch import Sequences

VOCABULARY = 100
"""No multiple of 64, to which vLLM pads it."""

EOS = 1

LENGTH = 512
"""Most tokens of a sequence."""

_SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 96,
    "max_position_embeddings": LENGTH,
    "initializer_range": 0.12,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": 0,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": False}),
    "qwen3-one-kv-head": ("Qwen3", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen3-moe": ("Qwen3Moe", {"tie_word_embeddings": False, **_EXPERTS}),
}


def make(path: Path, kind: str) -> Any:
    """A model directory with a tokenizer of one letter a token; the model that is in it."""
    family, own = KINDS[kind]
    torch.manual_seed(len(kind))
    config = getattr(transformers, f"{family}Config")(**{**_SHARED, **own})
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval().requires_grad_(False)
    model.save_pretrained(path)
    _tokenizer().save_pretrained(path)
    return model


def move(model: Any, seed: int, *, back: bool = False) -> None:
    """Change every weight, so that what the model says changes; or take that back, to rounding."""
    noise = torch.Generator().manual_seed(seed)
    for tensor in module_tensors(model).values():
        tensor.add_(torch.randn(tensor.shape, generator=noise) * (-0.04 if back else 0.04))


def greedy(model: Any, prompt: Sequence[int], tokens: int) -> tuple[list[int], list[float]]:
    """What the model says without sampling, with no cache of any kind, and its log-probs."""
    said, logprobs = list(prompt), []
    for _ in range(tokens):
        logprobs_V = model(torch.tensor([said]), use_cache=False).logits[0, -1].log_softmax(-1)
        said.append(int(logprobs_V.argmax()))
        logprobs.append(float(logprobs_V[said[-1]]))
        if said[-1] == EOS:
            break
    return said[len(prompt) :], logprobs


def scores(model: Any, sequences: Sequences) -> np.ndarray[Any, Any]:
    """Log-probs [B, T] of completion tokens, as `Generator.score` gives them."""
    tokens_BT = torch.tensor(sequences.tokens_BT).long()
    logprobs_BTV = (model(tokens_BT, use_cache=False).logits / sequences.temperature).log_softmax(-1)
    found_BT = np.zeros(sequences.tokens_BT.shape, dtype=np.float32)
    found_BT[:, 1:] = logprobs_BTV[:, :-1].gather(2, tokens_BT[:, 1:, None])[..., 0].numpy()
    return np.where(sequences.completion_mask_BT(), found_BT, 0)


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = {chr(ord("!") + i - 2): i for i in range(2, VOCABULARY - 6)}
    vocabulary = {"<pad>": 0, "<eos>": 1, **letters, **{f"<{i}>": i for i in range(VOCABULARY - 6, VOCABULARY)}}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<pad>")
