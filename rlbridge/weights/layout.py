"""What a rank holds, in checkpoint coordinates.

A `Region` is a box of a checkpoint tensor. A `Piece` says where that box lies in one process: at which element offset and
with which strides of which storage. Regions travel between processes, pieces do not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec

from rlbridge.errors import LayoutError

if TYPE_CHECKING:
    import torch

DTYPE_BYTES = {
    "bool": 1, "uint8": 1, "int8": 1, "uint16": 2, "int16": 2, "uint32": 4, "int32": 4, "uint64": 8, "int64": 8,
    "float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e8m0fnu": 1,
    "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8,
}  # fmt: skip


class TensorMeta(msgspec.Struct, frozen=True):
    """A checkpoint tensor: its name, full shape and dtype; `alias_of` names the tensor whose storage it shares."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    alias_of: str | None = None


class Region(msgspec.Struct, frozen=True, gc=False):
    """The box of checkpoint tensor `tensor` that starts at `offset` and has `shape` (elements, one entry a dimension)."""

    tensor: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements in the box; 1 for a scalar."""
        return math.prod(self.shape)

    def intersect(self, other: Region) -> Region | None:
        """The common box of two regions of one tensor, or None if they share no element."""
        offset, shape = [], []
        for a, n, b, m in zip(self.offset, self.shape, other.offset, other.shape, strict=True):
            low, high = max(a, b), min(a + n, b + m)
            if high <= low:
                return None
            offset.append(low)
            shape.append(high - low)
        return Region(self.tensor, tuple(offset), tuple(shape))

    def __str__(self) -> str:
        box = ", ".join(f"{o}:{o + n}" for o, n in zip(self.offset, self.shape, strict=True))
        return f"{self.tensor}[{box}]"


class Layout(msgspec.Struct, frozen=True):
    """The regions that one rank holds, and the tensors they are regions of."""

    tensors: list[TensorMeta]
    regions: list[Region]

    def meta(self) -> dict[str, TensorMeta]:
        """The tensors by name."""
        return {t.name: t for t in self.tensors}


class Piece(msgspec.Struct, frozen=True):
    """Where `region` lies in this process: element `offset` of `storage`, one stride (elements) a dimension of the region."""

    region: Region
    storage: str
    offset: int
    strides: tuple[int, ...]

    def narrow(self, inner: Region) -> Piece:
        """The part of this piece that is `inner`, a box inside its region."""
        shift = sum((i - o) * s for i, o, s in zip(inner.offset, self.region.offset, self.strides, strict=True))
        return Piece(inner, self.storage, self.offset + shift, self.strides)

    def view(self, storages: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The live tensor of the region's shape; `storages` maps storage names to any tensor over that storage."""
        return storages[self.storage].detach().as_strided(self.region.shape, self.strides, self.offset)


def whole(meta: TensorMeta) -> Region:
    """The region that is the whole tensor."""
    return Region(meta.name, (0,) * len(meta.shape), meta.shape)


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """The row-major strides of `shape`, in elements."""
    strides = [1] * len(shape)
    for d in range(len(shape) - 2, -1, -1):
        strides[d] = strides[d + 1] * max(shape[d + 1], 1)
    return tuple(strides)


def flat_boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """The boxes that the flat range [start, stop) of a row-major tensor of `shape` consists of, in flat order.

    Yields (offset, box shape, flat start). This is how a ZeRO-3 partition becomes a layout: a head row, a box and a tail row,
    and the same again in each dimension below.
    """
    if start >= stop:
        return
    if len(shape) == 0:
        yield (), (), 0
        return
    row = math.prod(shape[1:])
    first, last = start // row, (stop - 1) // row
    if len(shape) == 1:
        yield (start,), (stop - start,), start
        return
    if first == last and stop - start < row:
        yield from _in_row(shape, first, start, stop)
        return
    whole_from, whole_to = first, stop // row
    if start % row:
        yield from _in_row(shape, first, start, (first + 1) * row)
        whole_from += 1
    if whole_to > whole_from:
        rest = tuple(shape[1:])
        yield (whole_from, *(0,) * len(rest)), (whole_to - whole_from, *rest), whole_from * row
    if stop % row and whole_to >= whole_from:
        yield from _in_row(shape, whole_to, whole_to * row, stop)


def _in_row(shape: Sequence[int], index: int, start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int]]:
    row = math.prod(shape[1:])
    for offset, box, flat in flat_boxes(shape[1:], start - index * row, stop - index * row):
        yield (index, *offset), (1, *box), flat + index * row


def strided_boxes(
    shape: Sequence[int],
    view_offset: int,
    view_shape: Sequence[int],
    view_strides: Sequence[int],
    other_strides: Sequence[int],
    other_offset: int,
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]]:
    """The boxes of a row-major tensor of `shape` that a strided view of it consists of.

    The view (`view_offset`, `view_shape`, `view_strides`, in elements) is paired element by element with a second strided
    array of the same shape (`other_strides`, `other_offset`), its destination or source. Yields (box offset, box shape,
    strides of the other array along the box's dimensions, its offset at the box's first element).

    Raises:
        LayoutError: the view repeats elements (an expanded dimension), or leaves the tensor.
    """
    if any(n == 0 for n in view_shape):
        return
    own = contiguous_strides(shape)
    dims = [(n, s, o) for n, s, o in zip(view_shape, view_strides, other_strides, strict=True) if n > 1]
    if any(s <= 0 for _, s, _ in dims):
        raise LayoutError("a view repeats elements of a checkpoint tensor (an expanded dimension)")
    # The largest stride first: a transposed view is the same boxes with the other array's strides in another order.
    dims.sort(key=lambda d: -d[1])
    yield from _boxes(tuple(shape), own, view_offset, _merged(dims), other_offset)


def compose(view: Piece, base: Sequence[int], parts: Sequence[Piece]) -> Iterator[Piece]:
    """Where a view of a row-major tensor of shape `base` lies, given where boxes of that tensor lie.

    Args:
        view: A box of a checkpoint tensor, with its offset and strides in the row-major tensor.
        base: The row-major tensor's shape.
        parts: Boxes of the row-major tensor, disjoint. What no part covers is left out.

    Raises:
        LayoutError: the view repeats elements of the row-major tensor.
    """
    shape = view.region.shape
    if not parts:
        return
    for offset, box, strides, flat in strided_boxes(base, view.offset, shape, view.strides, contiguous_strides(shape), 0):
        for part in parts:
            inner = part.region.intersect(Region(part.region.tensor, offset, box))
            if inner is None:
                continue
            at = flat + sum((i - o) * s for i, o, s in zip(inner.offset, offset, strides, strict=True))
            source = part.narrow(inner)
            for own, size, steps, first in strided_boxes(shape, at, inner.shape, strides, source.strides, source.offset):
                origin = tuple(o + i for o, i in zip(view.region.offset, own, strict=True))
                yield Piece(Region(view.region.tensor, origin, size), source.storage, first, steps)


def _merged(dims: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """The same elements in as few dimensions as both arrays allow."""
    merged: list[tuple[int, int, int]] = []
    for n, s, o in dims:
        if merged and merged[-1][1] == s * n and merged[-1][2] == o * n:
            merged[-1] = (merged[-1][0] * n, s, o)
        else:
            merged.append((n, s, o))
    return merged


def _boxes(
    shape: tuple[int, ...], own: tuple[int, ...], start: int, dims: list[tuple[int, int, int]], other: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]]:
    offset = _coordinates(shape, own, start)
    box, strides = [1] * len(shape), [0] * len(shape)
    for index, (n, s, o) in enumerate(dims):
        # The outermost dimension in which a step of s elements moves.
        d = next((k for k in range(len(shape)) if shape[k] > 1 and own[k] <= s), None)
        if d is None:
            raise LayoutError("a view steps outside of its checkpoint tensor")
        inner_uses_d = any(own[d] <= inner for _, inner, _ in dims[index + 1 :])
        if s == own[d] and offset[d] + n <= shape[d] and not inner_uses_d:
            box[d], strides[d] = n, o
            continue
        if s == own[d] and not inner_uses_d and offset[d] == 0 and n % shape[d] == 0 and d > 0:
            # It runs over whole rows of the dimension above: two that were merged. Split it again.
            split = [(n // shape[d], s * shape[d], o * shape[d]), (shape[d], s, o)]
            yield from _boxes(shape, own, start, dims[:index] + split + dims[index + 1 :], other)
            return
        # A step over rows, or a run that crosses a row's end: one box for each index.
        for i in range(n):
            yield from _boxes(shape, own, start + i * s, dims[:index] + dims[index + 1 :], other + i * o)
        return
    yield offset, tuple(box), tuple(strides), other


def _coordinates(shape: tuple[int, ...], own: tuple[int, ...], flat: int) -> tuple[int, ...]:
    """Where element `flat` of a row-major tensor of `shape` and strides `own` lies."""
    found = []
    for n, stride in zip(shape, own, strict=True):
        at, flat = divmod(flat, stride) if n > 1 else (0, flat)
        found.append(at)
    return tuple(found)
