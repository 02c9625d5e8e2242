"""The forward pass of Qwen3 as plain functions over tensors, computed in float32 whatever the weights are held in.

The weights are given by rank: all of them on one, or the slices of tensor-parallel ranks, whose parts are added up or put side
by side here as collectives would. It is what transformers' Qwen3ForCausalLM computes, and is tested against it.

Shape suffixes: B sequences, T tokens, D width, Q query heads, K key-value heads, H numbers a head, V vocabulary, L layers; S is
keys or values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import linear, silu

from rlbridge.errors import ConfigError, DataError
from rlbridge.roles.batch import Sequences
from rlbridge_conformance.reference.config import ModelConfig


@dataclass(frozen=True)
class LayerWeights:
    """One rank's part of a decoder layer, matrices as [out, in]: its heads, its columns of the MLP, and all of the norms.

    `scaled_q_norm_H` is the weight of q_norm times head_dim ** -0.5, the scale of the softmax.
    """

    input_norm_D: torch.Tensor
    q_proj: torch.Tensor
    k_proj: torch.Tensor
    v_proj: torch.Tensor
    o_proj: torch.Tensor
    scaled_q_norm_H: torch.Tensor
    k_norm_H: torch.Tensor
    post_norm_D: torch.Tensor
    gate_proj: torch.Tensor
    up_proj: torch.Tensor
    down_proj: torch.Tensor


@dataclass(frozen=True)
class RankWeights:
    """One rank's part of the model: its rows of the embedding and of the head, and all of the last norm."""

    embed_VD: torch.Tensor
    layers: Sequence[LayerWeights]
    norm_D: torch.Tensor
    head_VD: torch.Tensor


def forward(
    config: ModelConfig, ranks: Sequence[RankWeights], tokens_BT: torch.Tensor, past_LSBKTH: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The last layer's output [B, T, D] before its norm, and the keys and values of the past and of `tokens_BT`.

    Args:
        ranks: Together the whole model, in rank order.
        tokens_BT: Follow on the tokens that `past_LSBKTH` was made of, all sequences at the same position.
    """
    start = 0 if past_LSBKTH is None else past_LSBKTH.shape[-2]
    rotation = _rotation(config, start, start + tokens_BT.shape[1])
    x_BTD = _embed(ranks, tokens_BT)
    made = []
    for index in range(config.layers):
        layers = [rank.layers[index] for rank in ranks]
        past_SBKTH = None if past_LSBKTH is None else past_LSBKTH[index]
        attended_BTD, kv_SBKTH = _attention(config, layers, x_BTD, rotation, past_SBKTH)
        x_BTD = x_BTD + attended_BTD
        x_BTD = x_BTD + _mlp(config, layers, x_BTD)
        made.append(kv_SBKTH)
    return x_BTD, torch.stack(made)


def logits(config: ModelConfig, ranks: Sequence[RankWeights], x_BTD: torch.Tensor) -> torch.Tensor:
    """The logits [B, T, V] of what `forward` returns."""
    parts = [linear(_rms_norm(config, x_BTD, rank.norm_D), rank.head_VD.float()) for rank in ranks]
    return torch.cat(parts, dim=-1)


def completion_logprobs(
    config: ModelConfig, ranks: Sequence[RankWeights], sequences: Sequences, batch: int = 0
) -> np.ndarray[Any, Any]:
    """Log-softmax of logits / temperature at each completion token, [B, T] float32, 0 elsewhere.

    `batch` sequences are computed at once; 0 takes all.

    Sequences are padded on the right and attention is causal, so padding changes no completion and needs no mask.

    Raises:
        ConfigError: the temperature is 0.
        DataError: a token is not in the vocabulary.
    """
    if sequences.temperature <= 0:
        raise ConfigError("log-probs are not defined at temperature 0", todo="score with a temperature above 0")
    found_BT = np.zeros(sequences.tokens_BT.shape, dtype=np.float32)
    if sequences.tokens_BT.size == 0:
        return found_BT
    check_tokens(config, sequences.tokens_BT)
    rows, size = len(found_BT), batch or len(found_BT)
    for part in (slice(first, first + size) for first in range(0, rows, size)):
        tokens_BT = torch.from_numpy(sequences.tokens_BT[part].astype(np.int64))
        x_BTD, _ = forward(config, ranks, tokens_BT)
        logprobs_BTV = (logits(config, ranks, x_BTD[:, :-1]) / sequences.temperature).log_softmax(-1)
        found_BT[part, 1:] = logprobs_BTV.gather(-1, tokens_BT[:, 1:, None])[..., 0].numpy()
    return np.where(sequences.completion_mask_BT(), found_BT, np.float32(0))


def check_tokens(config: ModelConfig, tokens: np.ndarray[Any, Any]) -> None:
    """Refuse tokens that the embedding has no row for.

    Raises:
        DataError: a token is not in the vocabulary.
    """
    strange = tokens[(tokens < 0) | (tokens >= config.vocabulary)]
    if strange.size:
        raise DataError(
            f"token {int(strange[0])} is not in the vocabulary, which ends at {config.vocabulary - 1}",
            todo="do tokenizer and model belong together?",
        )


def _embed(ranks: Sequence[RankWeights], tokens_BT: torch.Tensor) -> torch.Tensor:
    """Each rank looks up the tokens of its rows, and gives zeros for the others; the sum is the embedding."""
    parts, first = [], 0
    for rank in ranks:
        rows = len(rank.embed_VD)
        own_BT = (tokens_BT >= first) & (tokens_BT < first + rows)
        local_BT = torch.where(own_BT, tokens_BT - first, 0)
        parts.append(rank.embed_VD[local_BT].float() * own_BT[..., None])
        first += rows
    return _added(parts)


def _attention(
    config: ModelConfig,
    layers: Sequence[LayerWeights],
    x_BTD: torch.Tensor,
    rotation: tuple[torch.Tensor, torch.Tensor],
    past_SBKTH: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention with grouped key-value heads; and the keys and values, those of the past first."""
    queries, keys, values = [], [], []
    for layer in layers:
        y_BTD = _rms_norm(config, x_BTD, layer.input_norm_D)
        queries.append(_rotated(_rms_norm(config, _heads(config, y_BTD, layer.q_proj), layer.scaled_q_norm_H), rotation))
        keys.append(_rotated(_rms_norm(config, _heads(config, y_BTD, layer.k_proj), layer.k_norm_H), rotation))
        values.append(_heads(config, y_BTD, layer.v_proj))
    query_BQTH = torch.cat(queries, dim=1)
    kv_SBKTH = torch.stack([torch.cat(keys, dim=1), torch.cat(values, dim=1)])
    if past_SBKTH is not None:
        kv_SBKTH = torch.cat([past_SBKTH, kv_SBKTH], dim=-2)
    key_BQTH, value_BQTH = kv_SBKTH.repeat_interleave(query_BQTH.shape[1] // kv_SBKTH.shape[2], dim=2)
    seen, asked = key_BQTH.shape[-2], query_BQTH.shape[-2]
    future_TT = torch.ones(asked, seen, dtype=torch.bool).triu(seen - asked + 1)
    scores_BQTT = (query_BQTH @ key_BQTH.mT).masked_fill(future_TT, -torch.inf)
    mixed_BTE = (scores_BQTT.softmax(-1) @ value_BQTH).transpose(1, 2).flatten(2)
    shares = mixed_BTE.split([layer.o_proj.shape[1] for layer in layers], dim=-1)
    return _added([linear(share, layer.o_proj.float()) for share, layer in zip(shares, layers, strict=True)]), kv_SBKTH


def _mlp(config: ModelConfig, layers: Sequence[LayerWeights], x_BTD: torch.Tensor) -> torch.Tensor:
    """SwiGLU: each rank has some of the columns in between."""
    parts = []
    for layer in layers:
        y_BTD = _rms_norm(config, x_BTD, layer.post_norm_D)
        gated = silu(linear(y_BTD, layer.gate_proj.float())) * linear(y_BTD, layer.up_proj.float())
        parts.append(linear(gated, layer.down_proj.float()))
    return _added(parts)


def _heads(config: ModelConfig, x_BTD: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A projection, by heads: [B, heads, T, H]."""
    return linear(x_BTD, weight.float()).view(*x_BTD.shape[:2], -1, config.head_dim).transpose(1, 2)


def _rms_norm(config: ModelConfig, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.norm_eps) * weight.float()


def _rotation(config: ModelConfig, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine [T, H / 2] of the angles of RoPE (arXiv 2104.09864, eq. 15) at positions `start` to `stop`."""
    frequencies = config.rope_theta ** -(torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)
    angles = torch.arange(start, stop, dtype=torch.float32)[:, None] * frequencies
    return angles.cos(), angles.sin()


def _rotated(x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The pairs are number i of the first half with number i of the second, as in transformers."""
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _added(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """What an all-reduce over the ranks gives."""
    return torch.stack(list(parts)).sum(0) if len(parts) > 1 else parts[0]
