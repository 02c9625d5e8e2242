"""Which trainer rank sends which tensor, where it lies in that rank's arena, and in which round it is read. Pure functions.

Every party computes the same from the same list of tensors, so none of it travels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import msgspec

from rlbridge.weights.layout import DTYPE_BYTES, TensorMeta, whole
from rlbridge.weights.plan import ALIGNMENT


class Chunk(msgspec.Struct, frozen=True):
    """`nbytes` bytes of tensor number `tensor`, from its byte `start` on, at byte `offset` of the owner's arena."""

    tensor: int
    start: int
    nbytes: int
    offset: int


class Round(msgspec.Struct, frozen=True):
    """What is read from one rank at once: `nbytes` bytes of its arena from `offset` on, and the chunks in them."""

    offset: int
    nbytes: int
    chunks: list[Chunk]


class Share(msgspec.Struct, frozen=True):
    """One trainer rank's part: the bytes of its arena, where each of its tensors begins there, and the rounds."""

    nbytes: int
    offsets: dict[int, int]
    rounds: list[Round]


class Owners:
    """Gives out tensors as they come by, each to the rank that has the fewest bytes."""

    def __init__(self, ranks: int) -> None:
        self._loads = [0] * ranks

    def next(self, nbytes: int) -> int:
        """The owner of the next tensor."""
        owner = min(range(len(self._loads)), key=self._loads.__getitem__)
        self._loads[owner] += nbytes
        return owner


def bytes_of(tensor: TensorMeta) -> int:
    """Bytes of a tensor on the wire."""
    return whole(tensor).numel * DTYPE_BYTES[tensor.dtype]


def shares_of(tensors: Sequence[TensorMeta], ranks: int, round_bytes: int) -> list[Share]:
    """The share of each rank; a round holds at most `round_bytes` bytes, and cuts only what is larger."""
    owners = Owners(ranks)
    owned: list[list[int]] = [[] for _ in range(ranks)]
    for index, tensor in enumerate(tensors):
        owned[owners.next(bytes_of(tensor))].append(index)
    return [_share(tensors, indices, round_bytes) for indices in owned]


def _share(tensors: Sequence[TensorMeta], indices: Iterable[int], round_bytes: int) -> Share:
    offsets, end = {}, 0
    for index in indices:
        offsets[index] = end
        end = _aligned(end + bytes_of(tensors[index]))
    chunks = [chunk for index, offset in offsets.items() for chunk in _chunks(tensors[index], index, offset, round_bytes)]
    return Share(end, offsets, list(_rounds(chunks, round_bytes)))


def _chunks(tensor: TensorMeta, index: int, offset: int, round_bytes: int) -> Iterator[Chunk]:
    total = bytes_of(tensor)
    for start in range(0, total, round_bytes) if total else (0,):
        yield Chunk(index, start, min(round_bytes, total - start), offset + start)


def _rounds(chunks: Sequence[Chunk], round_bytes: int) -> Iterator[Round]:
    held: list[Chunk] = []
    for chunk in chunks:
        if held and chunk.offset + chunk.nbytes - held[0].offset > round_bytes:
            yield _round(held)
            held = []
        held.append(chunk)
    if held:
        yield _round(held)


def _round(chunks: list[Chunk]) -> Round:
    return Round(chunks[0].offset, chunks[-1].offset + chunks[-1].nbytes - chunks[0].offset, chunks)


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
