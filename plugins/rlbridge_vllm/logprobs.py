"""Log-probs as rlbridge means them: log-softmax of logits / temperature over the whole vocabulary, before top-k and top-p.

vLLM 0.32 knows log-probs of the plain logits, or of what top-k and top-p have left. So the temperature is taken out of its
hands: logits become log-probs at the temperature asked for before vLLM samples from them, which changes no probability, and
vLLM returns its "processed logits" of the tokens that it has sampled.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

TEMPERATURE = "rlbridge_temperature"
"""Key of `SamplingParams.extra_args`; a request without it is at temperature 1."""


class Tempered(LogitsProcessor):  # type: ignore[misc]
    """Logits [B, V] to log-softmax(logits / temperature), each row at its request's temperature."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._temperatures: dict[int, float] = {}
        self._device = device
        self._column_B1: torch.Tensor | None = None

    def is_argmax_invariant(self) -> bool:
        """False although it is: vLLM leaves those out for greedy requests, whose log-probs are wanted too."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        self._column_B1 = None
        for index in batch_update.removed:
            self._temperatures.pop(index, None)
        for index, params, _, _ in batch_update.added:
            self._temperatures[index] = float((params.extra_args or {}).get(TEMPERATURE, 1.0))
        for here, there, direction in batch_update.moved:
            moved, other = self._temperatures.pop(here, None), self._temperatures.pop(there, None)
            if moved is not None:
                self._temperatures[there] = moved
            if other is not None and direction == MoveDirectionality.SWAP:
                self._temperatures[here] = other

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        if any(temperature != 1.0 for temperature in self._temperatures.values()):
            if self._column_B1 is None or len(self._column_B1) != len(logits):
                rows = [[self._temperatures.get(index, 1.0)] for index in range(len(logits))]
                self._column_B1 = torch.tensor(rows, dtype=logits.dtype, device=logits.device)
            logits.div_(self._column_B1)
        return logits.sub_(logits.logsumexp(-1, keepdim=True))


class Scoring:
    """Lets a model give log-probs at one temperature instead of logits, for as long as one is set.

    vLLM scores the tokens of prompts with plain logits, whatever the request's temperature is. While a temperature is set no
    other requests may run: it counts for all of them.
    """

    def __init__(self, model: Any) -> None:
        self.temperature: float | None = None
        compute = model.compute_logits

        def compute_logits(*args: Any, **kwargs: Any) -> torch.Tensor | None:
            logits: torch.Tensor | None = compute(*args, **kwargs)
            if self.temperature is None or logits is None:  # None: on the ranks that do not sample
                return logits
            return (logits.float() / self.temperature).log_softmax(-1)

        model.compute_logits = compute_logits


def at_temperature(temperature: float) -> dict[str, Any]:
    """Arguments of `SamplingParams` for sampling at `temperature`; 0 is greedy."""
    if temperature == 0:
        return {"temperature": 0.0}
    return {"temperature": 1.0, "extra_args": {TEMPERATURE: temperature}}
