"""An engine of vLLM as the generator uses it, in whichever process its core runs."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any, TypeVar

from rlbridge.roles.generator import PauseMode

T = TypeVar("T")

_LOOK_SECONDS = 0.5
"""How often whoever waits for an answer looks whether there still is somebody to give it."""

_LAST_SECONDS = 2.0
"""How long vLLM gets to tell of the end of its processes itself."""


class LostError(Exception):
    """A process of the engine is gone, and vLLM does not say so: it is told only by those that can still tell."""


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
        lost: Whether a process of the engine is gone.
    """

    max_model_len: int
    vocabulary: int
    lost: Callable[[], bool] = staticmethod(lambda: False)

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


def awaited(future: Future[T], seconds: float | None, lost: Callable[[], bool]) -> T:
    """What comes of `future`.

    Raises:
        TimeoutError: nothing within `seconds`.
        LostError: nobody is left who could answer.
    """
    limit = None if seconds is None else time.monotonic() + seconds
    while True:
        left = _LOOK_SECONDS if limit is None else min(limit - time.monotonic(), _LOOK_SECONDS)
        gone = lost()
        if wait([future], max(left, _LAST_SECONDS if gone else 0.0)).done:
            return future.result()
        if gone:
            raise LostError
        if limit is not None and time.monotonic() >= limit:
            raise TimeoutError


def of_places(logprobs: Sequence[Any] | None, tokens: Sequence[int]) -> list[float]:
    """The log-prob of each token, out of what vLLM says of its place; nothing where it was not asked."""
    return [float(place[token].logprob) for place, token in zip(logprobs or [], tokens, strict=False)]


def of_prompt(logprobs: Sequence[Any] | None, prompt: Sequence[int]) -> list[float]:
    """The log-prob of each token of a prompt; vLLM says nothing of the first."""
    return [0.0 if place is None else float(place[token].logprob) for place, token in zip(logprobs or [], prompt, strict=False)]
