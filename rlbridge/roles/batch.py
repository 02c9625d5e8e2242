"""What crosses between the driver, a trainer and a generator: token ids, log-probs and numbers, as raw arrays."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
import numpy as np

T = TypeVar("T")


class Sampling(msgspec.Struct, frozen=True):
    """How to sample. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 switch the cut off; `seed` fixes the whole call."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None


class Completion(msgspec.Struct):
    """One sampled continuation of one prompt.

    Attributes:
        token_ids: What was sampled, the end-of-sequence token included.
        logprobs: One a token: log-softmax of logits / temperature at the sampled token, before top-k and top-p (natural log).
        versions: One a token: the weight version that made it.
        finish_reason: "stop" (end of sequence or a stop string), "length" or "abort".
    """

    token_ids: list[int]
    logprobs: list[float]
    versions: list[int]
    finish_reason: str


class Sequences(msgspec.Struct):
    """Prompts with their continuations, right-padded. B sequences of at most T tokens.

    Attributes:
        tokens_BT: int32 token ids, prompt first, then completion, then padding.
        prompt_lengths_B: int32, tokens of the prompt.
        lengths_B: int32, tokens of prompt and completion together.
        temperature: What logits are divided by before log-softmax.
    """

    tokens_BT: np.ndarray[Any, Any]
    prompt_lengths_B: np.ndarray[Any, Any]
    lengths_B: np.ndarray[Any, Any]
    temperature: float = 1.0

    def completion_mask_BT(self) -> np.ndarray[Any, Any]:
        """True where a token belongs to the completion."""
        at_T = np.arange(self.tokens_BT.shape[1])[None, :]
        return (at_T >= self.prompt_lengths_B[:, None]) & (at_T < self.lengths_B[:, None])

    def rows(self, index: slice | np.ndarray[Any, Any]) -> Sequences:
        """Some of the sequences, by a slice or by their numbers, with the padding that all of them need."""
        return Sequences(self.tokens_BT[index], self.prompt_lengths_B[index], self.lengths_B[index], self.temperature)


class Batch(msgspec.Struct):
    """One optimizer step's worth of sequences for one trainer rank.

    The core shards the global batch over the ranks (equal numbers of rows, in order) before it calls `Trainer.train_step`.
    A trainer's loss is the sum over its completion tokens divided by `total_tokens`, which counts the completion tokens of the
    *global* batch, so the sum of the ranks' losses is the loss, whatever the number of ranks and of micro-batches.

    Attributes:
        sequences: The rank's rows.
        logprobs_BT: float32 behaviour log-probs of the tokens, 0 outside of completions.
        advantages_B: float32, one a sequence.
        versions_BT: int32, the weight version that made each completion token, -1 elsewhere.
        total_tokens: Completion tokens of the global batch.
        step: The step's number, from 1.
    """

    sequences: Sequences
    logprobs_BT: np.ndarray[Any, Any]
    advantages_B: np.ndarray[Any, Any]
    versions_BT: np.ndarray[Any, Any]
    total_tokens: int
    step: int

    def shard(self, rank: int, ranks: int) -> Batch:
        """The rows of `rank`; the number of rows is a multiple of `ranks`."""
        rows = len(self.advantages_B) // ranks
        part = slice(rank * rows, (rank + 1) * rows)
        return Batch(
            self.sequences.rows(part),
            self.logprobs_BT[part],
            self.advantages_B[part],
            self.versions_BT[part],
            self.total_tokens,
            self.step,
        )


def scored_rows(rows: int, rank: int, ranks: int) -> tuple[np.ndarray[Any, Any], int]:
    """The numbers of the rows that `rank` scores, as many on each rank, and the first of them (`rows`: none is its own).

    A rank that is short of rows repeats the last one: a forward pass over sharded parameters is collective.
    """
    share = -(-rows // ranks)
    first = min(rank * share, rows)
    return np.minimum(np.arange(first, first + share), rows - 1), first


def pad_sequences(
    prompts: list[list[int]], completions: list[list[int]], *, pad: int = 0, temperature: float = 1.0
) -> Sequences:
    """Right-padded sequences of prompts joined with their completions."""
    lengths = [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]
    tokens_BT = np.full((len(prompts), max(lengths, default=0)), pad, dtype=np.int32)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        tokens_BT[row, : lengths[row]] = prompt + completion
    return Sequences(
        tokens_BT, np.array([len(p) for p in prompts], dtype=np.int32), np.array(lengths, dtype=np.int32), temperature
    )


def encode(message: object) -> bytes:
    """A struct as msgpack; numpy arrays travel as dtype, shape and raw bytes."""
    return _encoder.encode(message)


def decode(payload: bytes, kind: type[T]) -> T:
    """The struct of type `kind` that `encode` was given.

    Raises:
        msgspec.ValidationError: the payload is not a `kind`.
    """
    return msgspec.msgpack.decode(payload, type=kind, dec_hook=_array_from)


def _array_to(value: object) -> object:
    if isinstance(value, np.ndarray):
        return (value.dtype.str, value.shape, np.ascontiguousarray(value).tobytes())
    raise TypeError(f"{type(value).__name__} cannot cross to another process")


def _array_from(_kind: type, value: Any) -> object:
    dtype, shape, raw = value
    return np.frombuffer(raw, dtype=np.dtype(dtype)).reshape(shape).copy()


_encoder = msgspec.msgpack.Encoder(enc_hook=_array_to)
