"""Between rlbridge's sampling and completions and SGLang's own. Imports no framework."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlbridge.errors import DataError
from rlbridge.roles.batch import Completion, Sampling, Sequences

_REASONS = {"stop": "stop", "length": "length", "abort": "abort"}


def sampling_params(sampling: Sampling, prompts: int, seed: int) -> list[dict[str, Any]]:
    """SGLang's parameters of each prompt, every one of them given: none is left to the model's own defaults.

    Args:
        sampling: How to sample.
        prompts: How many prompts there are.
        seed: Of the whole call; each prompt's follows from it and the prompt's place.
    """
    shared = {
        "max_new_tokens": sampling.max_tokens,
        "min_new_tokens": 0,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "min_p": 0.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "repetition_penalty": 1.0,
        "stop": list(sampling.stop) or None,
        "stop_token_ids": list(sampling.stop_token_ids) or None,
        "no_stop_trim": True,
        "skip_special_tokens": False,
    }
    return [{**shared, "sampling_seed": zlib.crc32(f"{seed} {index}".encode())} for index in range(prompts)]


def completion(output: Mapping[str, Any], version: int) -> Completion:
    """SGLang's answer to one prompt. `version` is stamped on its tokens where SGLang says none."""
    meta = output["meta_info"]
    tokens = list(output["output_ids"])
    logprobs = [float(entry[0]) for entry in meta.get("output_token_logprobs") or ()]
    count = min(len(tokens), len(logprobs))  # of a request that was aborted as it waited, SGLang may give one and not the other
    reason = _REASONS.get((meta.get("finish_reason") or {}).get("type", ""), "abort")
    return Completion(tokens[:count], logprobs[:count], token_versions(meta, count, version), reason)


def token_versions(meta: Mapping[str, Any], count: int, version: int) -> list[int]:
    """The version that made each of `count` tokens: SGLang tells spans of them."""
    found = [version] * count
    for span in meta.get("weight_versions") or ():
        for index in range(span["start"], min(span["end"], count)):
            found[index] = int(span["version"])
    return found


def score_params(temperature: float) -> dict[str, Any]:
    """SGLang's parameters of a request that makes no token: its prompt's log-probs are what is asked for."""
    return {"max_new_tokens": 0, "temperature": temperature or 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "sampling_seed": 0}


def scores(sequences: Sequences, outputs: Sequence[Mapping[str, Any]]) -> np.ndarray[Any, Any]:
    """Log-probs [B, T] float32 of the completions' tokens, 0 elsewhere, out of SGLang's answer to each whole sequence."""
    found_BT = np.zeros(sequences.tokens_BT.shape, dtype=np.float32)
    for row, output in enumerate(outputs):
        told = output["meta_info"]["input_token_logprobs"]
        first, end = int(sequences.prompt_lengths_B[row]), int(sequences.lengths_B[row])
        found_BT[row, first:end] = [entry[0] for entry in told[first:end]]
    return found_BT


def check_prompts(prompts: Sequence[Sequence[int]], vocabulary: int) -> None:
    """Refuse what an engine cannot read: SGLang would end its scheduler over a token that is not in the vocabulary.

    Raises:
        DataError: a prompt is empty, or holds a token that is not in the vocabulary.
    """
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise DataError(f"prompt {index} has no tokens", role="generator", todo="give it a text or a bos token")
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            wrong = next(token for token in prompt if not 0 <= token < vocabulary)
            raise DataError(f"prompt {index} holds the token {wrong}, and the vocabulary has {vocabulary}", role="generator")
