"""Sampling from a transformers model with a KV cache, in a small loop of our own.

Four things make it faster than `generate`. A prompt that occurs several times, as in a group of GRPO, is read once. Sequences
that have ended leave the batch. The cache has room to grow, and is not copied for every token. Log-probs are taken from each
step's logits, so that those of all steps never exist together.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from rlbridge.roles.batch import Completion, Sampling

_CROWD = 0.75
"""Rows are dropped from the batch when at most this part of them is still running, since dropping copies the cache."""

Ends = Callable[[list[int]], bool]
"""Whether a completion ends with its last token."""


def decode(
    model: Any,
    prompts: list[list[int]],
    sampling: Sampling,
    *,
    ends: Ends,
    noise: torch.Generator,
    version: int,
) -> list[Completion]:
    """One completion a prompt, all of them at once. `noise` is drawn from unless the temperature is 0.

    Args:
        model: A causal language model in eval mode.
        prompts: Token ids; none is empty.
        ends: Asked after every token.
        version: Stamped on every token.
    """
    done = [Completion([], [], [], "length") for _ in prompts]
    if not prompts or sampling.max_tokens < 1:
        return done
    running = _Running(model, prompts)
    rows = list(range(len(prompts)))
    for left in range(sampling.max_tokens - 1, -1, -1):
        tokens_R, logprobs_R = pick(running.logits_RV, sampling, noise)
        for row, token, logprob in zip(rows, tokens_R.tolist(), logprobs_R.tolist(), strict=True):
            if done[row].finish_reason == "stop":
                continue
            done[row].token_ids.append(token)
            done[row].logprobs.append(logprob)
            if ends(done[row].token_ids):
                done[row].finish_reason = "stop"
        kept = [index for index, row in enumerate(rows) if done[row].finish_reason != "stop"]
        if not kept or not left:
            break
        if len(kept) <= _CROWD * len(rows):
            rows = [rows[index] for index in kept]
            tokens_R = running.keep(kept, tokens_R)
        running.advance(tokens_R)
    for completion in done:
        completion.versions = [version] * len(completion.token_ids)
    return done


def pick(logits_RV: torch.Tensor, sampling: Sampling, noise: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A token a row [R], and its log-prob [R] before top-k and top-p; at temperature 0 the likeliest, at temperature 1."""
    logprobs_RV = (logits_RV.float() / (sampling.temperature or 1.0)).log_softmax(-1)
    if sampling.temperature == 0:
        tokens_R1 = logprobs_RV.argmax(-1, keepdim=True)
    else:
        kept_RV = _top_p(_top_k(logprobs_RV, sampling.top_k), sampling.top_p)
        tokens_R1 = torch.multinomial(kept_RV.exp(), 1, generator=noise)
    return tokens_R1[:, 0], logprobs_RV.gather(-1, tokens_R1)[:, 0]


def ends_with(stop_ids: Collection[int], stop: tuple[str, ...], text: Callable[[list[int]], str]) -> Ends:
    """The rule for end-of-sequence tokens and stop strings; `text` decodes tokens and is only called if there are strings."""
    # A token of a byte-level vocabulary has at least a byte, and a character at most four.
    window = 4 * max((len(string) for string in stop), default=0) + 4

    def ends(tokens: list[int]) -> bool:
        if tokens[-1] in stop_ids:
            return True
        if not stop:
            return False
        tail = text(tokens[-window:])
        return any(string in tail for string in stop)

    return ends


class _Running:
    """The sequences in the batch: their cache, and the logits [R, V] of their next tokens.

    Where prompts differ in length they are padded on the left; where they do not there is no mask at all, which is faster.
    """

    def __init__(self, model: Any, prompts: list[list[int]]) -> None:
        self._model = model
        self.logits_RV: torch.Tensor
        distinct = list(dict.fromkeys(map(tuple, prompts)))
        width = max(map(len, distinct))
        padding = [width - len(prompt) for prompt in distinct]
        tokens_RT = torch.tensor([[0] * pad + list(prompt) for pad, prompt in zip(padding, distinct, strict=True)])
        self._mask_RT, self._position_R1 = None, None
        positions_RT = None
        if any(padding):
            self._mask_RT = (torch.arange(width)[None, :] >= torch.tensor(padding)[:, None]).long().to(model.device)
            positions_RT = (self._mask_RT.cumsum(-1) - 1).clamp(min=0)
            self._position_R1 = positions_RT[:, -1:]
        last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        self._forward(tokens_RT.to(model.device), positions_RT, None, last_only)
        _give_room(self._cache)
        if len(distinct) < len(prompts):
            index = {prompt: row for row, prompt in enumerate(distinct)}
            self._select(torch.tensor([index[tuple(prompt)] for prompt in prompts], device=model.device))

    def keep(self, rows: list[int], tokens_R: torch.Tensor) -> torch.Tensor:
        """Go on with some of the rows; their entries of `tokens_R`."""
        index_R = torch.tensor(rows, device=tokens_R.device)
        self._select(index_R)
        return tokens_R[index_R]

    def advance(self, tokens_R: torch.Tensor) -> None:
        """Append a token to each row."""
        if self._mask_RT is not None and self._position_R1 is not None:
            self._mask_RT = torch.cat([self._mask_RT, self._mask_RT.new_ones(len(tokens_R), 1)], dim=1)
            self._position_R1 = self._position_R1 + 1
        self._forward(tokens_R[:, None], self._position_R1, self._cache, {})

    def _select(self, index_R: torch.Tensor) -> None:
        self._cache.reorder_cache(index_R)
        self.logits_RV = self.logits_RV[index_R]
        if self._mask_RT is not None and self._position_R1 is not None:
            self._mask_RT, self._position_R1 = self._mask_RT[index_R], self._position_R1[index_R]

    def _forward(self, tokens_RT: torch.Tensor, positions_RT: torch.Tensor | None, cache: Any, more: dict[str, Any]) -> None:
        padded = {} if self._mask_RT is None else {"attention_mask": self._mask_RT, "position_ids": positions_RT}
        out = self._model(input_ids=tokens_RT, past_key_values=cache, use_cache=True, **padded, **more)
        self._cache, self.logits_RV = out.past_key_values, out.logits[:, -1]


def _give_room(cache: Any) -> None:
    """Replace the plain layers of a cache; sliding windows and recurrent states do not grow."""
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            cache.layers[index] = _RoomyLayer(layer)


class _RoomyLayer(DynamicLayer):  # type: ignore[misc]  # transformers is untyped here
    """Keys and values [R, H, T, D] in buffers that double. transformers' own layer copies all of them for every token."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.keys, self.values = layer.keys, layer.values
        self._buffers: tuple[torch.Tensor, ...] | None = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Append; the keys and values so far."""
        start, end = self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
        if self._buffers is None or end > self._buffers[0].shape[-2]:
            self._buffers = tuple(_roomy(held_RHTD, 2 * end) for held_RHTD in (self.keys, self.values))
        keys_RHTD, values_RHTD = self._buffers
        keys_RHTD[:, :, start:end], values_RHTD[:, :, start:end] = key_states, value_states
        self.keys, self.values = keys_RHTD[:, :, :end], values_RHTD[:, :, :end]
        return self.keys, self.values

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Pick rows."""
        super().reorder_cache(beam_idx)
        self._buffers = None


def _roomy(held_RHTD: torch.Tensor, room: int) -> torch.Tensor:
    """A buffer for `room` tokens that begins with what is held."""
    rows, heads, length, width = held_RHTD.shape
    buffer_RHTD = held_RHTD.new_empty(rows, heads, room, width)
    buffer_RHTD[:, :, :length] = held_RHTD
    return buffer_RHTD


def _top_k(logprobs_RV: torch.Tensor, top_k: int) -> torch.Tensor:
    if not 0 < top_k < logprobs_RV.shape[-1]:
        return logprobs_RV
    least_R1 = logprobs_RV.topk(top_k, dim=-1).values[:, -1:]
    return logprobs_RV.masked_fill(logprobs_RV < least_R1, -torch.inf)


def _top_p(logprobs_RV: torch.Tensor, top_p: float) -> torch.Tensor:
    """The fewest tokens whose probability, among those that top-k left, comes to `top_p`."""
    if top_p >= 1:
        return logprobs_RV
    sorted_RV, order_RV = logprobs_RV.sort(dim=-1, descending=True)
    probs_RV = sorted_RV.softmax(-1)
    cut_RV = probs_RV.cumsum(-1) - probs_RV >= top_p
    cut_RV[:, 0] = False
    return logprobs_RV.masked_fill(cut_RV.scatter(-1, order_RV, cut_RV), -torch.inf)
