"""Overlap, against counting elements."""

from __future__ import annotations

import time

import torch
from hypothesis import given
from hypothesis import strategies as st

from rlbridge.weights.boxes import overlap
from rlbridge.weights.layout import Region
from tests.weights.programs import box_of, examples, shapes


@examples(200)
@given(st.data())
def test_overlap_finds_two_regions_that_share_an_element_or_none(data: st.DataObject) -> None:
    shape = data.draw(shapes(dims=(0, 3)))
    regions = data.draw(st.lists(_regions(shape), max_size=6))
    held = []
    for region in regions:
        marks = torch.zeros(shape, dtype=torch.bool)
        box_of(marks, region).fill_(True)
        held.append(marks)
    found = overlap(regions)
    if found is None:
        assert not held or int(sum(m.int() for m in held).max()) <= 1
    else:
        a, b = found
        assert a != b
        assert bool((held[a] & held[b]).any())


def test_thousands_of_columns_are_told_apart_at_once() -> None:
    start = time.perf_counter()
    assert overlap([Region("w", (0, c), (4096, 1)) for c in range(20_000)]) is None
    assert time.perf_counter() - start < 2  # comparing each with each takes minutes


@st.composite
def _regions(draw: st.DrawFn, shape: tuple[int, ...]) -> Region:
    offset = tuple(draw(st.integers(0, n - 1)) for n in shape)
    return Region("t", offset, tuple(draw(st.integers(0, n - o)) for n, o in zip(shape, offset, strict=True)))
