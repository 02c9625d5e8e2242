"""Boxes of one tensor: do any two of them share an element?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Box:
    """`shape` elements from `offset` on, one entry a dimension."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements in the box; 1 for a scalar."""
        return math.prod(self.shape)


def overlap(boxes: Sequence[Box]) -> tuple[int, int] | None:
    """The indices of two boxes that share an element, or None. Empty boxes share nothing."""
    order = sorted((i for i, box in enumerate(boxes) if box.numel), key=lambda i: boxes[i].offset)
    for position, i in enumerate(order):
        a = boxes[i]
        for j in order[position + 1 :]:
            b = boxes[j]
            if a.offset and b.offset[0] >= a.offset[0] + a.shape[0]:
                break  # sorted by the first dimension: none that follows can reach back
            if all(p < q + m and q < p + n for p, n, q, m in zip(a.offset, a.shape, b.offset, b.shape, strict=True)):
                return i, j
    return None
