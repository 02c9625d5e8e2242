"""One prompt on its way through an engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from rlbridge.roles.batch import Completion, Sampling


@dataclass(eq=False)
class Request:
    """A prompt, what has been sampled of its completion, and the keys and values of what the model has read so far.

    `noise` is its own, so that the other requests, and when they run, change nothing of what it samples.
    """

    prompt: list[int]
    sampling: Sampling
    noise: torch.Generator
    completion: Completion = field(default_factory=lambda: Completion([], [], [], ""))
    state: Literal["waiting", "running", "done"] = "waiting"
    kv_LSBKTH: torch.Tensor | None = None

    def tokens(self) -> list[int]:
        """Prompt and completion."""
        return self.prompt + self.completion.token_ids

    def append(self, token: int, logprob: float, version: int) -> None:
        """Add a sampled token."""
        self.completion.token_ids.append(token)
        self.completion.logprobs.append(logprob)
        self.completion.versions.append(version)

    def end(self, reason: str) -> None:
        """Nothing more is sampled."""
        self.completion.finish_reason = reason
        self.state, self.kv_LSBKTH = "done", None
