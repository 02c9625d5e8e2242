"""Prompts and sequences as requests to vLLM, and its replies as scores."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from vllm import SamplingParams

from rlbridge.errors import DataError
from rlbridge.roles.batch import Sampling, Sequences
from rlbridge_vllm.logprobs import at_temperature
from rlbridge_vllm.serving import Reply, Request


def check_prompts(prompts: list[list[int]], longest: int, vocabulary: int) -> None:
    """Refuse what vLLM would refuse in the middle of a batch.

    Raises:
        DataError: a prompt is empty, leaves no room for a completion, or holds a token that is not in the vocabulary.
    """
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise DataError(f"prompt {index} has no tokens", role="generator", todo="give it a text or a bos token")
        if len(prompt) >= longest:
            raise DataError(
                f"prompt {index} has {len(prompt)} tokens, and the engine takes {longest} of prompt and completion together",
                role="generator",
                todo="let generator.max_model_len be more, if the model can, or leave out long prompts",
            )
        _check_tokens(f"prompt {index}", prompt, vocabulary)


def of_prompts(prompts: list[list[int]], sampling: Sampling, stop_ids: set[int]) -> list[Request]:
    """A request a prompt. With a seed each gets one that follows from it and the prompt's place."""
    seeds: list[int | None] = [None] * len(prompts)
    if sampling.seed is not None:
        seeds = [int(s) for s in np.random.default_rng(sampling.seed % 2**63).integers(2**62, size=len(prompts))]
    return [
        Request(
            prompt,
            SamplingParams(
                **at_temperature(sampling.temperature),
                max_tokens=sampling.max_tokens,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                seed=seed,
                stop=list(sampling.stop) or None,
                stop_token_ids=sorted(stop_ids | set(sampling.stop_token_ids)),
                ignore_eos=True,
                detokenize=bool(sampling.stop),
                skip_special_tokens=False,
                logprobs=0,
            ),
        )
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]


def of_sequences(sequences: Sequences, longest: int, vocabulary: int) -> list[Request]:
    """A request a sequence: all its tokens are a prompt that is scored.

    vLLM has to make a token more. A sequence that leaves no room for one is a prompt without its last token, whose log-prob is
    asked for at the place of the one that is made.

    Raises:
        DataError: a sequence is longer than the engine takes, or holds a token that is not in the vocabulary.
    """
    requests = []
    for row, length in enumerate(sequences.lengths_B):
        tokens = [int(token) for token in sequences.tokens_BT[row, :length]]
        if len(tokens) > longest:
            raise DataError(f"sequence {row} has {len(tokens)} tokens, and the engine takes {longest}", role="generator")
        _check_tokens(f"sequence {row}", tokens, vocabulary)
        scored: dict[str, Any] = {
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": 0,
            "detokenize": False,
            "ignore_eos": True,
        }
        last: tuple[int, ...] = ()
        if len(tokens) == longest:
            tokens, last = tokens[:-1], (tokens[-1],)
            scored["logprob_token_ids"] = list(last)
        requests.append(Request(tokens, SamplingParams(**scored), last))
    return requests


def scores(sequences: Sequences, replies: Iterable[Reply]) -> np.ndarray[Any, Any]:
    """Log-probs [B, T] float32 of completion tokens, 0 elsewhere."""
    found_BT = np.zeros(sequences.tokens_BT.shape, dtype=np.float32)
    for row, reply in enumerate(replies):
        found = reply.prompt_logprobs + reply.logprobs
        count = int(sequences.lengths_B[row])
        found_BT[row, :count] = found[:count]
    found_BT[~sequences.completion_mask_BT()] = 0
    return found_BT


def _check_tokens(what: str, tokens: list[int], vocabulary: int) -> None:
    wrong = [token for token in tokens if not 0 <= token < vocabulary]
    if wrong:
        raise DataError(
            f"{what} holds the token {wrong[0]}, and the model has {vocabulary}",
            role="generator",
            todo="is the tokenizer that of the model?",
        )
