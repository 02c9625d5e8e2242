"""What crosses between processes, there and back."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlbridge.roles.batch import Batch, Completion, Sampling, Sequences, decode, encode, pad_sequences
from tests.weights.programs import examples

tokens = st.lists(st.integers(0, 2**31 - 1), max_size=5)
rows = st.lists(st.tuples(tokens, tokens), min_size=1, max_size=6)


def make(pairs: list[tuple[list[int], list[int]]]) -> Batch:
    sequences = pad_sequences([p for p, _ in pairs], [c for _, c in pairs], temperature=0.7)
    shape = sequences.tokens_BT.shape
    noise = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    return Batch(sequences, noise, noise.sum(axis=1), np.full(shape, 3, np.int32), 17, 4)


@examples(50)
@given(rows)
def test_padding_keeps_every_token_and_masks_the_completions(pairs: list[tuple[list[int], list[int]]]) -> None:
    sequences = pad_sequences([p for p, _ in pairs], [c for _, c in pairs], pad=9)
    mask_BT = sequences.completion_mask_BT()
    assert sequences.tokens_BT.dtype == np.int32
    assert sequences.tokens_BT.shape == (len(pairs), max(len(p) + len(c) for p, c in pairs))
    for row, (prompt, completion) in enumerate(pairs):
        length = len(prompt) + len(completion)
        assert sequences.tokens_BT[row, :length].tolist() == prompt + completion
        assert (sequences.tokens_BT[row, length:] == 9).all()
        assert sequences.tokens_BT[row][mask_BT[row]].tolist() == completion


@examples(50)
@given(rows)
def test_a_batch_is_the_same_on_the_other_side(pairs: list[tuple[list[int], list[int]]]) -> None:
    batch = make(pairs)
    found = decode(encode(batch), Batch)
    assert (found.total_tokens, found.step, found.sequences.temperature) == (17, 4, 0.7)
    for name in ("logprobs_BT", "advantages_B", "versions_BT"):
        _check_equal(getattr(found, name), getattr(batch, name))
    for name in ("tokens_BT", "prompt_lengths_B", "lengths_B"):
        _check_equal(getattr(found.sequences, name), getattr(batch.sequences, name))
    found.logprobs_BT += 1  # what arrives can be written to


def test_a_strided_array_is_the_same_on_the_other_side() -> None:
    array = np.arange(24, dtype=np.int32).reshape(4, 6)
    sequences = Sequences(array[::2, ::-1].T, array[0], array[1])
    _check_equal(decode(encode(sequences), Sequences).tokens_BT, sequences.tokens_BT)


def test_the_shards_of_a_batch_are_its_rows_in_order() -> None:
    batch = make([([i], [i, i]) for i in range(6)])
    shards = [batch.shard(rank, 3) for rank in range(3)]
    assert [s.sequences.tokens_BT[:, 0].tolist() for s in shards] == [[0, 1], [2, 3], [4, 5]]
    for name in ("logprobs_BT", "advantages_B", "versions_BT"):
        _check_equal(np.concatenate([getattr(s, name) for s in shards]), getattr(batch, name))
    assert all((s.total_tokens, s.step, s.sequences.temperature) == (17, 4, 0.7) for s in shards)


def test_completions_and_sampling_cross() -> None:
    completion = Completion([1, 2], [-0.5, -1.25], [3, 4], "stop")
    assert decode(encode(completion), Completion) == completion
    sampling = Sampling(5, 0.5, stop=("\n",), stop_token_ids=(1, 2), seed=7)
    assert decode(encode(sampling), Sampling) == sampling


def test_what_is_no_such_message_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError):
        decode(encode({"tokens": 1}), Sampling)
    with pytest.raises(TypeError, match="object cannot cross to another process"):
        encode(object())


def _check_equal(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)
