"""Log-probs of sampled tokens, and the GRPO loss over them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rlbridge.errors import ConfigError
from rlbridge.roles.batch import Sequences
from rlbridge.roles.trainer import AlgorithmOptions

COUNTERS = ("loss", "kl", "clipped", "ratio", "entropy", "tokens")
"""What `grpo_loss` sums over tokens, in the order of `GrpoLoss.sums`."""


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probs of the tokens at positions `start` to `start + K` of B sequences.

    Attributes:
        logprobs: [B, K] float32, the log-softmax of logits / temperature at the token.
        entropy: [B, K] float32, of the distribution that the token was drawn from, detached.
        mask: [B, K], True where the token belongs to the completion.
        start: Position of the first of the K tokens.
    """

    logprobs: torch.Tensor
    entropy: torch.Tensor
    mask: torch.Tensor
    start: int


@dataclass(frozen=True)
class GrpoLoss:
    """One micro-batch's part of the loss, and what the metrics need, in the order of `COUNTERS`."""

    loss: torch.Tensor
    sums: torch.Tensor


def micro_batches(rows: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` rows; 0 is all of them at once."""
    size = size or max(rows, 1)
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def token_logprobs(model: Any, sequences: Sequences, device: torch.device) -> TokenLogprobs:
    """Log-probs of the completion tokens, one forward pass; logits are made from the first completion's start on.

    Sequences are padded on the right and attention is causal, so padding changes no completion and needs no mask.
    """
    if sequences.temperature <= 0:
        raise ConfigError("log-probs are not defined at temperature 0", todo="sample with a temperature above 0 to train")
    width = max(int(sequences.lengths_B.max()), 1)
    start = min(max(int(sequences.prompt_lengths_B.min()), 1), width)
    tokens_BT = torch.from_numpy(sequences.tokens_BT[:, :width].astype(np.int64)).to(device)
    mask_BK = torch.from_numpy(sequences.completion_mask_BT()[:, start:width]).to(device)
    logits_BKV = _logits(model, tokens_BT, torch.arange(start - 1, width - 1, device=device))
    logprobs, entropies = [], []
    # One sequence at a time: the fp32 copy and the softmax of bf16 logits never exist for all of them.
    for logits_KV, targets_K in zip(logits_BKV, tokens_BT[:, start:], strict=True):
        logits_KV = logits_KV.float()
        if sequences.temperature != 1.0:
            logits_KV = logits_KV / sequences.temperature
        normaliser_K = logits_KV.logsumexp(-1)
        logprobs.append(logits_KV.gather(-1, targets_K[:, None])[:, 0] - normaliser_K)
        with torch.no_grad():
            entropies.append(normaliser_K - ((logits_KV - normaliser_K[:, None]).exp() * logits_KV).sum(-1))
    return TokenLogprobs(torch.stack(logprobs), torch.stack(entropies), mask_BK, start)


def grpo_loss(
    current: TokenLogprobs,
    behaviour_BK: torch.Tensor,
    advantages_B: torch.Tensor,
    reference_BK: torch.Tensor | None,
    algorithm: AlgorithmOptions,
    total_tokens: int,
) -> GrpoLoss:
    """The clipped GRPO objective (arXiv 2402.03300, eq. 3), summed over tokens and divided by those of the global batch.

    The KL to the reference is the k3 estimate of the same paper (eq. 4): exp(r) - r - 1 with r = reference - current.
    """
    mask_BK, advantages_B1 = current.mask, advantages_B[:, None]
    ratio_BK = (current.logprobs - behaviour_BK).where(mask_BK, torch.zeros(())).exp()
    low, high = 1.0 - algorithm.clip_low, 1.0 + algorithm.clip_high
    free_BK, clipped_BK = ratio_BK * advantages_B1, ratio_BK.clamp(low, high) * advantages_B1
    loss_BK = -torch.minimum(free_BK, clipped_BK)
    kl_BK = torch.zeros_like(loss_BK)
    if reference_BK is not None:
        gap_BK = (reference_BK - current.logprobs).where(mask_BK, torch.zeros(()))
        kl_BK = gap_BK.exp() - gap_BK - 1.0
        loss_BK = loss_BK + algorithm.kl_coef * kl_BK
    loss = loss_BK.where(mask_BK, torch.zeros(())).sum() / max(total_tokens, 1)
    with torch.no_grad():
        counted = (kl_BK, (clipped_BK < free_BK).float(), ratio_BK, current.entropy, mask_BK.float())
        sums = [loss.double(), *(value.where(mask_BK, torch.zeros(())).sum(dtype=torch.float64) for value in counted)]
    return GrpoLoss(loss, torch.stack(sums))


def _logits(model: Any, tokens_BT: torch.Tensor, positions_K: torch.Tensor) -> torch.Tensor:
    """Logits [B, K, V] at the positions; transformers' own models make no others."""
    logits: torch.Tensor
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        logits = model(input_ids=tokens_BT, use_cache=False, logits_to_keep=positions_K).logits
    else:
        logits = model(input_ids=tokens_BT, use_cache=False).logits[:, positions_K]
    return logits
