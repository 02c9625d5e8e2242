"""From rewards to what a trainer is given: group-relative advantages, and the global batch of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from rlbridge.errors import RlbridgeError
from rlbridge.roles.batch import Batch, Completion, pad_sequences

Normalise = Literal["group_std", "group_mean"]

_EPSILON = 1e-6


def group_advantages(rewards_PG: np.ndarray[Any, Any], normalise: Normalise) -> np.ndarray[Any, Any]:
    """Advantages [P, G] float32 of G completions for each of P prompts.

    `group_std` is (r - mean) / (std + 1e-6) with the population's std (GRPO, arXiv 2402.03300, section 4.1.2); `group_mean` is
    r - mean, which does not weight prompts by how hard they are (Dr. GRPO, arXiv 2503.20783, section 3.2). A group whose
    rewards are all equal gives exact zeros.
    """
    rewards_PG = np.asarray(rewards_PG, dtype=np.float64)
    advantages_PG: np.ndarray[Any, Any] = rewards_PG - rewards_PG.mean(axis=1, keepdims=True)
    if normalise == "group_std":
        advantages_PG /= rewards_PG.std(axis=1, keepdims=True) + _EPSILON
    # The mean of equal numbers is not always that number: without this a group with nothing to learn from moves the weights.
    advantages_PG[np.ptp(rewards_PG, axis=1) == 0] = 0
    return advantages_PG.astype(np.float32)


def build_batch(
    prompts_tokens: Sequence[Sequence[int]],
    completions: Sequence[Completion],
    advantages: np.ndarray[Any, Any],
    *,
    temperature: float,
    pad: int,
    step: int,
) -> Batch:
    """The global batch of `step`: one row a completion; `prompts_tokens` holds each one's prompt, `advantages` has B elements.

    Raises:
        RlbridgeError: a generator gave a completion without one log-prob and one version a token.
    """
    for row, completion in enumerate(completions):
        _check(completion, row)
    sequences = pad_sequences(
        [list(prompt) for prompt in prompts_tokens], [c.token_ids for c in completions], pad=pad, temperature=temperature
    )
    mask_BT = sequences.completion_mask_BT()
    # Boolean assignment goes row by row, left to right, which is the order in which the completions' tokens are joined.
    logprobs_BT = np.zeros(mask_BT.shape, dtype=np.float32)
    logprobs_BT[mask_BT] = [logprob for c in completions for logprob in c.logprobs]
    versions_BT = np.full(mask_BT.shape, -1, dtype=np.int32)
    versions_BT[mask_BT] = [version for c in completions for version in c.versions]
    advantages_B = np.asarray(advantages, dtype=np.float32).reshape(len(completions))
    return Batch(sequences, logprobs_BT, advantages_B, versions_BT, int(mask_BT.sum()), step)


def _check(completion: Completion, row: int) -> None:
    tokens, logprobs, versions = len(completion.token_ids), len(completion.logprobs), len(completion.versions)
    if not tokens == logprobs == versions:
        raise RlbridgeError(
            f"a completion has {tokens} tokens, {logprobs} log-probs and {versions} versions; it must have one of each a token",
            todo="this is a fault of the generator backend",
            role="generator",
            row=row,
        )
