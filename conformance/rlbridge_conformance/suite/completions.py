"""What the checks of completions share: their log-probs are held to the scores of the same tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlbridge.roles.batch import Completion, Sequences, pad_sequences
from rlbridge_conformance.checks import expect, holds
from rlbridge_conformance.stage import Stage

TOLERANCE = 2e-3
"""Log-probs of an engine that computes in float32 differ by less, whether tokens are sampled or scored."""


def joined(prompts: list[list[int]], said: Sequence[Completion], temperature: float = 1.0) -> Sequences:
    """Prompts with their completions."""
    return pad_sequences(prompts, [completion.token_ids for completion in said], temperature=temperature)


def close(stage: Stage, sequences: Sequences, said: Sequence[Completion], what: str, engine: int = 0) -> None:
    """Hold the log-probs of completions to the scores of the same tokens, which no prefix cache has a part in."""
    scores, mask = stage.engine_scores(sequences, engine), sequences.completion_mask_BT()
    for row, completion in enumerate(said):
        wanted = scores[row][mask[row]]
        expect(f"there is a log-prob for each token of {what}", len(completion.token_ids), len(completion.logprobs))
        apart = float(np.abs(wanted - np.array(completion.logprobs)).max())
        holds(apart < TOLERANCE, f"log-probs are the scores of {what}", f"less than {TOLERANCE:g} apart", f"{apart:.3g}")
