"""Boxes of one tensor: do any two of them share an element?"""

from __future__ import annotations

from collections.abc import Sequence

from rlbridge.weights.layout import Region


def overlap(regions: Sequence[Region]) -> tuple[int, int] | None:
    """The indices of two regions of one tensor that share an element, or None. Empty regions share nothing."""
    order = [i for i, region in enumerate(regions) if region.numel]
    if len(order) < 2:
        return None
    dims = range(len(regions[order[0]].shape))
    # Swept along the dimension in which the most boxes are apart: those that lie side by side are never compared.
    sweep = max(dims, key=lambda d: len({regions[i].offset[d] for i in order}), default=None)
    if sweep is None:
        return order[0], order[1]  # scalars
    order.sort(key=lambda i: regions[i].offset[sweep])
    for position, i in enumerate(order):
        a = regions[i]
        end = a.offset[sweep] + a.shape[sweep]
        for j in order[position + 1 :]:
            b = regions[j]
            if b.offset[sweep] >= end:
                break
            if all(p < q + m and q < p + n for p, n, q, m in zip(a.offset, a.shape, b.offset, b.shape, strict=True)):
                return i, j
    return None
