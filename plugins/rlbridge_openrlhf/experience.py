"""rlbridge's batches as OpenRLHF's experience, and log-probs back."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from rlbridge.errors import ConfigError
from rlbridge.roles.batch import Batch, Sequences
from rlbridge_openrlhf.upstream import Experience


def as_experience(batch: Batch, rows: slice, device: str) -> Any:
    """The rows as OpenRLHF has them: T tokens, padded on the right, and A = T - 1 actions, each a token after the first.

    The behaviour's log-probs take the place of old ones: the ratio is against what sampled the tokens.
    """
    experience = tokens_of(batch.sequences.rows(rows), device)
    width = experience.action_mask.shape[1] + 1
    experience.action_log_probs = torch.from_numpy(batch.logprobs_BT[rows, 1:width]).to(device)
    advantages_B1 = torch.from_numpy(batch.advantages_B[rows])[:, None].to(device)
    experience.advantages = advantages_B1 * experience.action_mask
    return experience


def tokens_of(sequences: Sequences, device: str) -> Any:
    """An experience of tokens and masks alone.

    Raises:
        ConfigError: the sequences were sampled at temperature 0.
    """
    if sequences.temperature <= 0:
        raise ConfigError("log-probs are not defined at temperature 0", todo="sample with a temperature above 0 to train")
    width = max(int(sequences.lengths_B.max()), 2)
    tokens_BT = np.zeros((len(sequences.lengths_B), width), dtype=np.int64)
    given_BT = sequences.tokens_BT[:, :width]
    tokens_BT[:, : given_BT.shape[1]] = given_BT
    at_T = np.arange(width)[None, :]
    action_mask_BA = (at_T >= sequences.prompt_lengths_B[:, None]) & (at_T < sequences.lengths_B[:, None])
    return Experience(
        sequences=torch.from_numpy(tokens_BT).to(device),
        attention_mask=torch.from_numpy((at_T < sequences.lengths_B[:, None]).astype(np.int64)).to(device),
        action_mask=torch.from_numpy(action_mask_BA[:, 1:]).to(device),
    )


def logprobs_under(actor: Any, sequences: Sequences, device: str) -> np.ndarray[Any, Any]:
    """Log-probs [B, T] float32 of the actor without gradients, 0 outside of completions."""
    experience = tokens_of(sequences, device)
    actor.temperature = sequences.temperature
    actor.eval()
    with torch.no_grad():
        found_BA = actor(experience.sequences, experience.action_mask, attention_mask=experience.attention_mask)
    scores_BT = np.zeros(sequences.tokens_BT.shape, dtype=np.float32)
    used = min(found_BA.shape[1], scores_BT.shape[1] - 1)
    scores_BT[:, 1 : 1 + used] = found_BA[:, :used].float().cpu().numpy()
    return scores_BT
