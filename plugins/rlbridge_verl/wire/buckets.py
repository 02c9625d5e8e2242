"""Where each byte of a model lies: in a bucket of the rollout workers, and in the arena of the trainer rank that sends it.

verl's tensors are laid one after the other, in the order of its export, into buckets; only what is larger than a bucket is cut.
Each bucket is dealt out to the trainer ranks in stripes, so all of them send of every bucket, about equally much. All of it
follows from the sizes of the tensors in their order: every party computes the same, and none of it travels.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from rlbridge.roles.transport import Copy
from rlbridge.weights.layout import DTYPE_BYTES, TensorMeta, whole
from rlbridge.weights.plan import ALIGNMENT

_STRIPE_BYTES = 4 * 2**20
"""What one read takes at most: enough to be worth it, and little enough that ranks come out even."""

_STRIPES_OF_A_RANK = 4
"""In a full bucket, at the least."""


class Part(msgspec.Struct, frozen=True):
    """`nbytes` bytes of tensor number `tensor`, from its byte `start` on, at byte `offset` of a bucket."""

    tensor: int
    start: int
    nbytes: int
    offset: int


class Stripe(msgspec.Struct):
    """`nbytes` bytes of a bucket from byte `offset` on, which `rank` sends from byte `source_offset` of its arena on."""

    rank: int
    offset: int
    source_offset: int
    nbytes: int = 0


class Piece(msgspec.Struct, frozen=True):
    """`nbytes` bytes of a tensor, from its byte `start` on, at byte `source_offset` of rank `rank`'s arena."""

    rank: int
    start: int
    nbytes: int
    source_offset: int


class Packing:
    """Grows tensor by tensor, as they come by.

    Attributes:
        parts: What lies in each bucket, in the order of the tensors.
        stripes: Who sends which bytes of each bucket.
        begins: The bucket in which each tensor begins: when it comes by, those before are complete.
    """

    def __init__(self, ranks: int, bucket_bytes: int) -> None:
        self.parts: list[list[Part]] = []
        self.stripes: list[list[Stripe]] = []
        self.begins: list[int] = []
        self._bucket_bytes = max(bucket_bytes // ALIGNMENT * ALIGNMENT, ALIGNMENT)
        even = self._bucket_bytes // (ranks * _STRIPES_OF_A_RANK) // ALIGNMENT * ALIGNMENT
        self._stripe_bytes = min(max(even, ALIGNMENT), _STRIPE_BYTES)
        self._ends = [0] * ranks
        self._offset = self._bucket_bytes  # where the next tensor begins; the first one opens the first bucket

    def add(self, nbytes: int) -> list[Piece]:
        """Lay down the next tensor. Returns its pieces by rank, in order; none if it is empty."""
        index, pieces, start = len(self.begins), [], 0
        if self._offset + min(nbytes, self._bucket_bytes) > self._bucket_bytes or not self.parts:
            self._open()
        self.begins.append(len(self.parts) - 1)
        while True:
            size = min(nbytes - start, self._bucket_bytes - self._offset)
            self.parts[-1].append(Part(index, start, size, self._offset))
            pieces += self._cut(start, size)
            start += size
            if start == nbytes:
                break
            self._open()
        self._offset = _aligned(self._offset)
        return pieces

    def arena_bytes(self, rank: int) -> int:
        """Bytes of a rank's arena."""
        return self._ends[rank]

    def _open(self) -> None:
        self.parts.append([])
        self.stripes.append([])
        self._offset = 0

    def _cut(self, start: int, nbytes: int) -> list[Piece]:
        pieces, stripes = [], self.stripes[-1]
        while nbytes:
            within = self._offset % self._stripe_bytes
            if not stripes or within == 0:
                rank = self._ends.index(min(self._ends))
                stripes.append(Stripe(rank, self._offset, _aligned(self._ends[rank])))
            stripe = stripes[-1]
            size = min(nbytes, self._stripe_bytes - within)
            pieces.append(Piece(stripe.rank, start, size, stripe.source_offset + self._offset - stripe.offset))
            self._offset += size
            stripe.nbytes = self._offset - stripe.offset
            self._ends[stripe.rank] = stripe.source_offset + stripe.nbytes
            start, nbytes = start + size, nbytes - size
        return pieces


def bytes_of(tensor: TensorMeta) -> int:
    """Bytes of a tensor on the wire."""
    return whole(tensor).numel * DTYPE_BYTES[tensor.dtype]


def packing_of(tensors: Sequence[TensorMeta], ranks: int, bucket_bytes: int) -> Packing:
    """The packing of a whole model."""
    packing = Packing(ranks, bucket_bytes)
    for tensor in tensors:
        packing.add(bytes_of(tensor))
    return packing


def copies_of(packing: Packing, sources: Sequence[str], sink: str) -> list[Copy]:
    """What `sink` reads: each bucket is a slot, and goes into one of two blocks in turns."""
    return [
        Copy(sources[stripe.rank], sink, number, 0, stripe.source_offset, number % 2, stripe.offset, stripe.nbytes)
        for number, stripes in enumerate(packing.stripes)
        for stripe in stripes
        if stripe.nbytes
    ]


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
