"""An engine of vLLM as the generator uses it, in whichever process its core runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlbridge.roles.generator import PauseMode


@dataclass(frozen=True)
class Request:
    """One prompt and vLLM's `SamplingParams` for it.

    Attributes:
        instead: Tokens whose log-probs are wanted at the places of those that are sampled.
    """

    prompt: list[int]
    params: Any
    instead: tuple[int, ...] = ()


@dataclass(frozen=True)
class Reply:
    """What became of a request.

    Attributes:
        token_ids, logprobs, versions: One each a sampled token.
        finish_reason: "stop", "length" or "abort".
        prompt_logprobs: One a token of the prompt, the first 0, where they were asked for.
    """

    token_ids: list[int]
    logprobs: list[float]
    versions: list[int]
    finish_reason: str
    prompt_logprobs: list[float]


class Serving(ABC):
    """One engine. Its methods may be called from any thread, also while `generate` runs on another.

    Attributes:
        max_model_len: Most tokens of a prompt and its completion.
        vocabulary: How many tokens there are.
    """

    max_model_len: int
    vocabulary: int

    @abstractmethod
    def generate(self, requests: Sequence[Request]) -> list[Reply]:
        """Answer every request. While the engine is paused they wait."""

    @abstractmethod
    def rpc(self, method: str, args: tuple[Any, ...], seconds: float) -> list[Any]:
        """What a method of the worker extension returns on each rank, between two steps of the engine.

        Raises:
            TimeoutError: not all answered within `seconds`.
        """

    @abstractmethod
    def pause(self, mode: PauseMode, seconds: float) -> None:
        """Stop making tokens.

        Raises:
            TimeoutError: running requests did not end within `seconds`.
        """

    @abstractmethod
    def resume(self, seconds: float) -> None:
        """Go on."""

    @abstractmethod
    def drop_caches(self, seconds: float) -> bool:
        """Forget all keys and values; requests that are held make theirs again. Whether that was done."""

    @abstractmethod
    def set_version(self, version: int, seconds: float) -> None:
        """Stamp tokens with it from now on."""

    @abstractmethod
    def close(self) -> None:
        """Let vLLM end its processes."""


def of_places(logprobs: Sequence[Any] | None, tokens: Sequence[int]) -> list[float]:
    """The log-prob of each token, out of what vLLM says of its place; nothing where it was not asked."""
    return [float(place[token].logprob) for place, token in zip(logprobs or [], tokens, strict=False)]


def of_prompt(logprobs: Sequence[Any] | None, prompt: Sequence[int]) -> list[float]:
    """The log-prob of each token of a prompt; vLLM says nothing of the first."""
    return [0.0 if place is None else float(place[token].logprob) for place, token in zip(logprobs or [], prompt, strict=False)]
