"""How a model is shared out over the trainer ranks of a verl job, and cut into rounds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rlbridge.weights.layout import TensorMeta
from rlbridge.weights.plan import ALIGNMENT
from rlbridge_verl.wire.shares import bytes_of, shares_of
from rlbridge_verl.wire.source import copies_of

SHAPES = st.lists(st.integers(0, 9), max_size=3).map(tuple)
TENSORS = st.lists(st.tuples(SHAPES, st.sampled_from(["float32", "bfloat16", "int8"])), min_size=1, max_size=30).map(
    lambda kinds: [TensorMeta(f"t{i}", shape, dtype) for i, (shape, dtype) in enumerate(kinds)]
)
ROUNDS = st.integers(1, 6).map(lambda n: n * ALIGNMENT)


@given(TENSORS, st.integers(1, 5), ROUNDS)
def test_every_byte_of_every_tensor_is_in_one_round_of_one_rank(
    tensors: list[TensorMeta], ranks: int, round_bytes: int
) -> None:
    found: dict[int, list[tuple[int, int]]] = {index: [] for index in range(len(tensors))}
    for share in shares_of(tensors, ranks, round_bytes):
        for round_ in share.rounds:
            for chunk in round_.chunks:
                found[chunk.tensor].append((chunk.start, chunk.nbytes))
                assert chunk.offset == share.offsets[chunk.tensor] + chunk.start
                assert round_.offset <= chunk.offset
                assert chunk.offset + chunk.nbytes <= round_.offset + round_.nbytes
    for index, parts in found.items():
        ends = [0, *(start + nbytes for start, nbytes in parts)]
        assert [start for start, _ in parts] == ends[:-1]
        assert ends[-1] == bytes_of(tensors[index])


@given(TENSORS, st.integers(1, 5), ROUNDS)
def test_rounds_fit_their_part_of_a_bucket_and_lie_apart(tensors: list[TensorMeta], ranks: int, round_bytes: int) -> None:
    for rank, share in enumerate(shares_of(tensors, ranks, round_bytes)):
        end = 0
        for round_ in share.rounds:
            assert round_.nbytes <= round_bytes
            assert round_.offset % ALIGNMENT == 0  # a tensor is viewed where it lies, in its own dtype
            assert end <= round_.offset
            end = round_.offset + round_.nbytes
        assert end <= share.nbytes
        for copy in copies_of(share, "trainer", rank, "rollout", round_bytes):
            assert copy.sink_block == copy.slot % 2
            assert copy.sink_offset + copy.nbytes <= ranks * round_bytes


@given(TENSORS, st.integers(1, 5))
def test_ranks_have_equal_bytes_but_for_one_tensor(tensors: list[TensorMeta], ranks: int) -> None:
    loads = [sum(bytes_of(tensors[index]) for index in share.offsets) for share in shares_of(tensors, ranks, 1024 * ALIGNMENT)]
    assert max(loads) - min(loads) <= max(map(bytes_of, tensors))
