"""Prompts and sequences as requests, and a server's answers as completions and scores, in the words of its routes.

A vLLM's log-probs are those of the contract because the server was started with rlbridge's logits processor: it is sampled at
temperature 1 from logits that the processor has divided by the temperature asked for. SGLang's are, but for a prompt's, and
there rlbridge's ranks divide.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlbridge.errors import DataError
from rlbridge.roles.batch import Completion, Sampling, Sequences

_TEMPERATURE = "rlbridge_temperature"
_REASONS = frozenset({"stop", "length", "abort"})
_NO_LOGPROB = -9999.0
"""What vLLM writes where it has none, or one that JSON has no number for."""

_PLAIN = {"min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
"""Said with every request: what is not said would be the model's own default."""

Body = dict[str, Any]


class MalformedError(Exception):
    """An answer that does not say what was asked for."""


@dataclass(frozen=True)
class Parts:
    """What an answer says of its only choice. `versions`: spans of tokens, where the server tells which weights made them."""

    tokens: Any
    logprobs: list[float | None]
    reason: Any
    versions: Any


class Api(ABC):
    """A route for generation: what is sent to it, and what comes back."""

    path: str
    tells_versions: bool

    @abstractmethod
    def body(self, model: str, prompt: Sequence[int], sampling: Sampling, seed: int | None, stop_ids: Sequence[int]) -> Body:
        """A request for one completion. `stop_ids` are the model's own."""

    @abstractmethod
    def parts(self, answer: Any) -> Parts:
        """The only choice.

        Raises:
            MalformedError: it is not there.
        """

    def completion(self, answer: Any, version: int) -> Completion:
        """The completion; `version` made it where the server does not say.

        Raises:
            MalformedError: it is not one.
        """
        parts = self._read(answer)
        tokens, logprobs = parts.tokens, parts.logprobs
        if not isinstance(tokens, list):
            raise MalformedError("it has no token_ids: does the server know return_token_ids?")
        if parts.reason == "abort":  # of one that was aborted as it waited, SGLang may tell a token and no log-prob of it
            tokens = tokens[: len(logprobs)]
        if len(logprobs) != len(tokens):
            raise MalformedError(f"it has {len(tokens)} tokens and {len(logprobs)} log-probs")
        if parts.reason not in _REASONS:
            raise MalformedError(f"it ended for the reason {parts.reason!r}")
        versions = [version] * len(tokens)
        for span in parts.versions or ():
            versions[span["start"] : span["end"]] = [int(span["version"])] * (min(span["end"], len(tokens)) - span["start"])
        return Completion([int(token) for token in tokens], [_number(value) for value in logprobs], versions, parts.reason)

    def _read(self, answer: Any) -> Parts:
        try:
            return self.parts(answer)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise MalformedError(f"it has no choice with tokens and log-probs ({type(error).__name__}: {error})") from None


class ScoringApi(Api):
    """A route that tells the log-probs of tokens that it was given."""

    at_request: bool
    """Whether a request says at which temperature; if not, the control has to have said it."""

    @abstractmethod
    def of_sequence(self, model: str, tokens: Sequence[int], longest: int, temperature: float) -> tuple[Body, int]:
        """A request that scores the tokens of a sequence, and how many of them are sent as the prompt."""

    @abstractmethod
    def scores(self, answer: Any, tokens: Sequence[int], sent: int) -> list[float]:
        """The log-prob of each token, 0 for the first.

        Raises:
            MalformedError: they are not there.
        """


class Completions(ScoringApi):
    """OpenAI's completions, with what vLLM adds to them."""

    path = "/v1/completions"
    tells_versions = False
    at_request = False

    def body(self, model: str, prompt: Sequence[int], sampling: Sampling, seed: int | None, stop_ids: Sequence[int]) -> Body:
        extra = _extra(sampling)
        return {**self._of(model, prompt, _vllm(sampling, seed, stop_ids)), **({"vllm_xargs": extra} if extra else {})}

    def parts(self, answer: Any) -> Parts:
        choice = answer["choices"][0]
        logprobs = list((choice.get("logprobs") or {}).get("token_logprobs") or [])
        return Parts(choice.get("token_ids"), logprobs, choice.get("finish_reason"), choice.get("weight_versions"))

    def of_sequence(self, model: str, tokens: Sequence[int], longest: int, temperature: float) -> tuple[Body, int]:
        """As in any route.

        The server makes a token more, of which nothing is wanted. Where there is no room for it, it is asked for the log-prob
        of the sequence's own last token at that place.
        """
        scored: Body = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0, "logprobs": 0, "ignore_eos": True}
        if len(tokens) < longest:
            return self._of(model, tokens, scored), len(tokens)
        last = {"logprobs": 1, "logprob_token_ids": [tokens[-1]]}
        return self._of(model, tokens[:-1], {**scored, **last}), len(tokens) - 1

    def scores(self, answer: Any, tokens: Sequence[int], sent: int) -> list[float]:
        """As in any route. Those that were not `sent` were asked for at the place after the others."""
        self._read(answer)
        choice = answer["choices"][0]
        said = choice.get("prompt_logprobs")
        if not isinstance(said, list) or len(said) != sent:
            raise MalformedError("it has no prompt_logprobs of every token")
        found = [0.0, *(_number(place[str(token)]["logprob"]) for place, token in zip(said[1:], tokens[1:sent], strict=True))]
        return [*found, *(_number(choice["logprobs"]["top_logprobs"][0][f"token_id:{token}"]) for token in tokens[sent:])]

    def _of(self, model: str, prompt: Sequence[int], parameters: Body) -> Body:
        ids = {"return_token_ids": True, "return_tokens_as_token_ids": True, "add_special_tokens": False}
        return {"model": model, "prompt": list(prompt), **parameters, **ids}


class Tokens(Api):
    """vLLM's tokens in, tokens out."""

    path = "/inference/v1/generate"
    tells_versions = True

    def body(self, model: str, prompt: Sequence[int], sampling: Sampling, seed: int | None, stop_ids: Sequence[int]) -> Body:
        extra = _extra(sampling)
        parameters = {**_vllm(sampling, seed, stop_ids), "detokenize": bool(sampling.stop)}
        sent = {**parameters, **({"extra_args": extra} if extra else {})}
        return {"model": model, "token_ids": list(prompt), "sampling_params": sent}

    def parts(self, answer: Any) -> Parts:
        choice = answer["choices"][0]
        content = (choice.get("logprobs") or {}).get("content") or []
        logprobs = [place["logprob"] for place in content]
        return Parts(choice.get("token_ids"), logprobs, choice.get("finish_reason"), choice.get("weight_versions"))


class SglangGenerate(ScoringApi):
    """SGLang's tokens in, tokens out. SGLang knows the model's own stop tokens."""

    path = "/generate"
    tells_versions = True
    at_request = True

    def body(self, model: str, prompt: Sequence[int], sampling: Sampling, seed: int | None, stop_ids: Sequence[int]) -> Body:
        parameters = {
            "max_new_tokens": sampling.max_tokens,
            "min_new_tokens": 0,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            **_PLAIN,
            "stop": list(sampling.stop) or None,
            "stop_token_ids": list(sampling.stop_token_ids) or None,
            "no_stop_trim": True,
            "skip_special_tokens": False,
            "sampling_seed": int(np.random.default_rng().integers(2**31)) if seed is None else seed % 2**31,
        }
        return self._of(prompt, parameters, -1)

    def parts(self, answer: Any) -> Parts:
        meta = answer["meta_info"]
        logprobs = [entry[0] for entry in meta.get("output_token_logprobs") or ()]
        return Parts(answer.get("output_ids"), logprobs, meta["finish_reason"]["type"], meta.get("weight_versions"))

    def of_sequence(self, model: str, tokens: Sequence[int], longest: int, temperature: float) -> tuple[Body, int]:
        """As in any route; no token is made."""
        parameters = {"max_new_tokens": 0, "temperature": temperature, "top_p": 1.0, "top_k": -1, "min_p": 0.0}
        return self._of(tokens, {**parameters, "sampling_seed": 0}, 0), len(tokens)

    def scores(self, answer: Any, tokens: Sequence[int], sent: int) -> list[float]:
        """As in any route."""
        told = answer["meta_info"]["input_token_logprobs"]
        # SGLang calls the last token of the vocabulary 0 here: it takes it for a mark in the place of an image.
        if len(told) != len(tokens) or any(entry[1] not in (token, 0) for entry, token in zip(told, tokens, strict=True)):
            raise MalformedError("it has no input_token_logprobs of every token")
        return [0.0, *(_number(entry[0]) for entry in told[1:])]

    def _of(self, prompt: Sequence[int], parameters: Body, first_logprob: int) -> Body:
        asked = {"return_logprob": True, "logprob_start_len": first_logprob}
        return {"input_ids": list(prompt), "sampling_params": parameters, **asked}


APIS: dict[str, dict[str, Api]] = {
    "vLLM": {"completions": Completions(), "tokens": Tokens()},
    "SGLang": {"tokens": SglangGenerate()},
}
"""By the kind of server, what `generator.api` stands for."""

SCORING: dict[str, ScoringApi] = {"vLLM": Completions(), "SGLang": SglangGenerate()}
"""vLLM's other route tells the log-prob of no token that it was given and has not sampled."""


def of_prompts(
    api: Api, model: str, prompts: Sequence[Sequence[int]], sampling: Sampling, stop_ids: Sequence[int]
) -> list[Body]:
    """A request a prompt. With a seed each gets one that follows from it and the prompt's place."""
    seeds: list[int | None] = [None] * len(prompts)
    if sampling.seed is not None:
        seeds = [int(s) for s in np.random.default_rng(sampling.seed % 2**63).integers(2**62, size=len(prompts))]
    return [api.body(model, prompt, sampling, seed, stop_ids) for prompt, seed in zip(prompts, seeds, strict=True)]


def _vllm(sampling: Sampling, seed: int | None, stop_ids: Sequence[int]) -> Body:
    """vLLM's parameters, named alike in both of its routes."""
    shared = {
        "max_tokens": sampling.max_tokens,
        "temperature": 1.0 if sampling.temperature else 0.0,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        **_PLAIN,
        "stop": list(sampling.stop),
        "stop_token_ids": sorted({*stop_ids, *sampling.stop_token_ids}),
        "ignore_eos": True,
        "skip_special_tokens": False,
        "logprobs": 0,
    }
    return shared if seed is None else {**shared, "seed": seed}


def _extra(sampling: Sampling) -> Body:
    """What is for rlbridge's logits processor in vLLM."""
    return {_TEMPERATURE: sampling.temperature} if sampling.temperature not in (0, 1) else {}


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
                todo="start the server with a larger --max-model-len (SGLang: --context-length), or leave out long prompts",
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
