"""How a model is laid into buckets, and buckets dealt out to the trainer ranks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rlbridge.weights.plan import ALIGNMENT
from rlbridge_verl.wire.buckets import Packing, copies_of

BUCKET = 1024

sizes = st.lists(st.one_of(st.integers(0, 300), st.integers(0, 5 * BUCKET)), min_size=1, max_size=25)


@given(sizes, st.integers(1, 5))
def test_what_is_read_is_every_tensor_in_its_order(sizes: list[int], ranks: int) -> None:
    packing = Packing(ranks, BUCKET)
    pieces = [packing.add(size) for size in sizes]
    tensors = [bytes((7 * index + at) % 251 for at in range(size)) for index, size in enumerate(sizes)]
    arenas = [bytearray(packing.arena_bytes(rank)) for rank in range(ranks)]
    for tensor, cut in zip(tensors, pieces, strict=True):
        for piece in cut:
            place = slice(piece.source_offset, piece.source_offset + piece.nbytes)
            assert place.stop <= len(arenas[piece.rank])
            arenas[piece.rank][place] = tensor[piece.start : piece.start + piece.nbytes]
    read: list[bytes] = []
    names = [str(rank) for rank in range(ranks)]
    copies = copies_of(packing, names, "sink")
    for number, parts in enumerate(packing.parts):
        bucket = bytearray(BUCKET)
        for copy in (copy for copy in copies if copy.slot == number):
            assert copy.sink_block == number % 2
            assert copy.sink_offset + copy.nbytes <= BUCKET
            source = arenas[int(copy.source)]
            bucket[copy.sink_offset : copy.sink_offset + copy.nbytes] = source[copy.source_offset :][: copy.nbytes]
        for part in parts:
            if part.start == 0:
                assert packing.begins[part.tensor] == number
                assert part.tensor == len(read)
                read.append(b"")
            read[part.tensor] += bucket[part.offset : part.offset + part.nbytes]
    assert read == tensors


@given(sizes, st.integers(1, 5))
def test_only_what_is_larger_than_a_bucket_is_cut_and_all_is_aligned(sizes: list[int], ranks: int) -> None:
    packing = Packing(ranks, BUCKET)
    pieces = [piece for size in sizes for piece in packing.add(size)]
    assert all(piece.start % ALIGNMENT == 0 and piece.source_offset % ALIGNMENT == 0 for piece in pieces)
    for part in (part for parts in packing.parts for part in parts):
        assert part.offset % ALIGNMENT == 0
        assert part.nbytes == sizes[part.tensor] or sizes[part.tensor] > BUCKET


def test_every_rank_sends_about_equally_much_of_every_full_bucket() -> None:
    packing = Packing(4, 64 << 20)
    for size in [25 << 20, 4096, 9 << 20, 3 << 20, 17 << 20] * 20:
        packing.add(size)
    loads = [packing.arena_bytes(rank) for rank in range(4)]
    assert max(loads) < 1.05 * min(loads)
    for stripes in packing.stripes[:-1]:
        assert {stripe.rank for stripe in stripes} == {0, 1, 2, 3}


def test_a_bucket_smaller_than_its_ranks_need_is_still_filled() -> None:
    packing = Packing(5, 100)
    packing.add(1000)
    assert sum(stripe.nbytes for stripes in packing.stripes for stripe in stripes) == 1000
    assert [rank for rank in range(5) if packing.arena_bytes(rank)] == [0, 1, 2, 3, 4]
