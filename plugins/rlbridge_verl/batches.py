"""rlbridge's batches as verl's: sequences without padding, in nested tensors; and the log-probs back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.workers.utils.padding import no_padding_2_padding

from rlbridge.roles.batch import Batch, Sequences


def sequences_as_tensordict(sequences: Sequences, settings: Mapping[str, Any]) -> TensorDict:
    """What `BaseEngine.infer_batch` takes; `settings` are verl's non-tensor entries."""
    return tu.get_tensordict(_tokens(sequences), {**settings, "temperature": sequences.temperature})


def batch_as_tensordict(batch: Batch, reference_BT: np.ndarray[Any, Any] | None, settings: Mapping[str, Any]) -> TensorDict:
    """What `BaseEngine.train_batch` takes with verl's `ppo_loss`; `reference_BT` are log-probs of the KL's reference."""
    sequences = batch.sequences
    tensors = _tokens(sequences)
    lengths = (sequences.lengths_B - sequences.prompt_lengths_B).tolist()
    tensors["old_log_probs"] = _completions(sequences, batch.logprobs_BT)
    tensors["advantages"] = _nested([torch.full((n,), float(a)) for n, a in zip(lengths, batch.advantages_B, strict=True)])
    if reference_BT is not None:
        tensors["ref_log_prob"] = _completions(sequences, reference_BT)
    return tu.get_tensordict(tensors, {**settings, "temperature": sequences.temperature})


def completion_logprobs(log_probs: torch.Tensor, data: TensorDict, sequences: Sequences) -> np.ndarray[Any, Any]:
    """verl's log-probs, one a token of each sequence, as [B, T] float32 that are 0 outside of completions."""
    found_BK = no_padding_2_padding(log_probs, data).float().cpu().numpy()
    scores_BT = np.zeros(sequences.tokens_BT.shape, dtype=np.float32)
    for row, (first, last) in enumerate(zip(sequences.prompt_lengths_B, sequences.lengths_B, strict=True)):
        scores_BT[row, first:last] = found_BK[row, : last - first]
    return scores_BT


def _tokens(sequences: Sequences) -> dict[str, torch.Tensor]:
    tokens_BT = torch.from_numpy(sequences.tokens_BT.astype(np.int64))
    ends = list(zip(sequences.prompt_lengths_B.tolist(), sequences.lengths_B.tolist(), strict=True))
    masks = _nested([torch.ones(last - first, dtype=torch.bool) for first, last in ends])
    return {
        "input_ids": _nested([tokens_BT[row, :last] for row, (_, last) in enumerate(ends)]),
        "position_ids": _nested([torch.arange(last) for _, last in ends]),
        "prompts": _nested([tokens_BT[row, :first] for row, (first, _) in enumerate(ends)]),
        "responses": _nested([tokens_BT[row, first:last] for row, (first, last) in enumerate(ends)]),
        "response_mask": masks,
        "loss_mask": masks,
    }


def _completions(sequences: Sequences, values_BT: np.ndarray[Any, Any]) -> torch.Tensor:
    ends = zip(sequences.prompt_lengths_B, sequences.lengths_B, strict=True)
    return _nested([torch.from_numpy(values_BT[row, first:last]) for row, (first, last) in enumerate(ends)])


def _nested(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)
