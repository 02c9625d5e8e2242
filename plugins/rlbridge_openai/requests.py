"""Prompts and sequences as requests, and a server's answers as completions and scores: OpenAI's completions, and vLLM's tokens.

Log-probs are those of the contract because the server was started with rlbridge's logits processor: it is sampled at
temperature 1 from logits that the processor has divided by the temperature asked for.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlbridge.errors import DataError
from rlbridge.roles.batch import Completion, Sampling, Sequences

_TEMPERATURE = "rlbridge_temperature"
_REASONS = frozenset({"stop", "length", "abort"})
_NO_LOGPROB = -9999.0
"""What vLLM writes where it has none, or one that JSON has no number for."""

Body = dict[str, Any]


class MalformedError(Exception):
    """An answer that does not say what was asked for."""


class Api(ABC):
    """A route for generation: what is sent to it, and what comes back."""

    path: str
    tells_versions: bool

    @abstractmethod
    def body(self, model: str, prompt: Sequence[int], parameters: Body, extra: Body) -> Body:
        """A request. `parameters` are named alike in both routes; `extra` is for logits processors."""

    @abstractmethod
    def parts(self, answer: Any) -> tuple[Mapping[str, Any], list[float | None]]:
        """The only choice, and the log-probs of its tokens.

        Raises:
            MalformedError: they are not there.
        """

    def completion(self, answer: Any, version: int) -> Completion:
        """The completion; `version` made it where the server does not say.

        Raises:
            MalformedError: it is not one.
        """
        choice, logprobs = self._read(answer)
        tokens = choice.get("token_ids")
        if not isinstance(tokens, list):
            raise MalformedError("it has no token_ids: does the server know return_token_ids?")
        if len(logprobs) != len(tokens):
            raise MalformedError(f"it has {len(tokens)} tokens and {len(logprobs)} log-probs")
        reason = choice.get("finish_reason")
        if reason not in _REASONS:
            raise MalformedError(f"it ended for the reason {reason!r}")
        versions = [version] * len(tokens)
        for span in choice.get("weight_versions") or ():
            versions[span["start"] : span["end"]] = [int(span["version"])] * (min(span["end"], len(tokens)) - span["start"])
        return Completion([int(token) for token in tokens], [_number(value) for value in logprobs], versions, str(reason))

    def _read(self, answer: Any) -> tuple[Mapping[str, Any], list[float | None]]:
        try:
            return self.parts(answer)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise MalformedError(f"it has no choice with tokens and log-probs ({type(error).__name__}: {error})") from None


class Completions(Api):
    """OpenAI's completions, with what vLLM adds to them."""

    path = "/v1/completions"
    tells_versions = False

    def body(self, model: str, prompt: Sequence[int], parameters: Body, extra: Body) -> Body:
        ids = {"return_token_ids": True, "return_tokens_as_token_ids": True, "add_special_tokens": False}
        sent = {key: value for key, value in parameters.items() if key != "detokenize"}
        return {"model": model, "prompt": list(prompt), **sent, **ids, **({"vllm_xargs": extra} if extra else {})}

    def parts(self, answer: Any) -> tuple[Mapping[str, Any], list[float | None]]:
        choice = answer["choices"][0]
        return choice, list((choice.get("logprobs") or {}).get("token_logprobs") or [])

    def scores(self, answer: Any, tokens: Sequence[int], sent: int) -> list[float]:
        """The log-prob of each token, 0 for the first. Those that were not `sent` were asked for at the place after the others.

        Raises:
            MalformedError: they are not there.
        """
        choice, _ = self._read(answer)
        said = choice.get("prompt_logprobs")
        if not isinstance(said, list) or len(said) != sent:
            raise MalformedError("it has no prompt_logprobs of every token")
        found = [0.0, *(_number(place[str(token)]["logprob"]) for place, token in zip(said[1:], tokens[1:sent], strict=True))]
        return [*found, *(_number(choice["logprobs"]["top_logprobs"][0][f"token_id:{token}"]) for token in tokens[sent:])]


class Tokens(Api):
    """vLLM's tokens in, tokens out."""

    path = "/inference/v1/generate"
    tells_versions = True

    def body(self, model: str, prompt: Sequence[int], parameters: Body, extra: Body) -> Body:
        sampling = {**parameters, **({"extra_args": extra} if extra else {})}
        return {"model": model, "token_ids": list(prompt), "sampling_params": sampling}

    def parts(self, answer: Any) -> tuple[Mapping[str, Any], list[float | None]]:
        choice = answer["choices"][0]
        content = (choice.get("logprobs") or {}).get("content") or []
        return choice, [place["logprob"] for place in content]


def of_prompts(
    api: Api, model: str, prompts: Sequence[Sequence[int]], sampling: Sampling, stop_ids: Sequence[int]
) -> list[Body]:
    """A request a prompt. With a seed each gets one that follows from it and the prompt's place."""
    seeds: list[int | None] = [None] * len(prompts)
    if sampling.seed is not None:
        seeds = [int(s) for s in np.random.default_rng(sampling.seed % 2**63).integers(2**62, size=len(prompts))]
    shared = {
        "max_tokens": sampling.max_tokens,
        "temperature": 1.0 if sampling.temperature else 0.0,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop": list(sampling.stop),
        "stop_token_ids": sorted({*stop_ids, *sampling.stop_token_ids}),
        "ignore_eos": True,
        "skip_special_tokens": False,
        "detokenize": bool(sampling.stop),
        "logprobs": 0,
    }
    extra = {_TEMPERATURE: sampling.temperature} if sampling.temperature not in (0, 1) else {}
    bodies = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        bodies.append(api.body(model, prompt, shared if seed is None else {**shared, "seed": seed}, extra))
    return bodies


def of_sequence(api: Completions, model: str, tokens: Sequence[int], longest: int) -> tuple[Body, int]:
    """A request that scores the tokens of a sequence as a prompt, and how many of them are sent.

    The server makes a token more, of which nothing is wanted. Where there is no room for it, it is asked for the log-prob of
    the sequence's own last token at that place.
    """
    scored: Body = {
        "max_tokens": 1,
        "temperature": 0.0,
        "prompt_logprobs": 0,
        "logprobs": 0,
        "ignore_eos": True,
        "detokenize": False,
    }
    if len(tokens) < longest:
        return api.body(model, tokens, scored, {}), len(tokens)
    return api.body(model, tokens[:-1], {**scored, "logprobs": 1, "logprob_token_ids": [tokens[-1]]}, {}), len(tokens) - 1


def scored(sequences: Sequences, found: Sequence[Sequence[float]]) -> np.ndarray[Any, Any]:
    """Log-probs [B, T] float32 of completion tokens, 0 elsewhere."""
    scores_BT = np.zeros(sequences.tokens_BT.shape, dtype=np.float32)
    for row, logprobs in enumerate(found):
        scores_BT[row, : len(logprobs)] = logprobs
    scores_BT[~sequences.completion_mask_BT()] = 0
    return scores_BT


def check_prompts(prompts: Sequence[Sequence[int]], longest: int, vocabulary: int) -> None:
    """Refuse what the server would refuse in the middle of a batch.

    Raises:
        DataError: a prompt is empty, leaves no room for a completion, or holds a token that is not in the vocabulary.
    """
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise DataError(f"prompt {index} has no tokens", role="generator", todo="give it a text or a bos token")
        if len(prompt) >= longest:
            raise DataError(
                f"prompt {index} has {len(prompt)} tokens, and the server takes {longest} with its completion",
                role="generator",
                todo="start the server with a larger --max-model-len, if the model can, or leave out long prompts",
            )
        check_tokens(f"prompt {index}", prompt, vocabulary)


def check_tokens(what: str, tokens: Sequence[int], vocabulary: int) -> None:
    """Refuse what is not in the vocabulary.

    Raises:
        DataError: a token is not.
    """
    wrong = [token for token in tokens if not 0 <= token < vocabulary]
    if wrong:
        raise DataError(
            f"{what} holds the token {wrong[0]}, and the server's model has {vocabulary}",
            role="generator",
            todo="is the tokenizer that of the model?",
        )


def _number(value: object) -> float:
    """A log-prob that is one.

    Raises:
        MalformedError: it is none.
    """
    if not isinstance(value, int | float) or not math.isfinite(value) or value <= _NO_LOGPROB:
        raise MalformedError(f"a token has the log-prob {value!r}")
    return float(value)
