"""Boxes of flat ranges and of strided views, against torch's own indexing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlbridge.errors import LayoutError
from rlbridge.weights.layout import Piece, Region, TensorMeta, compose, contiguous_strides, flat_boxes, strided_boxes, whole
from tests.weights.programs import box_of, examples, identical, shapes, view_programs


@examples(150)
@given(st.data())
def test_a_flat_range_is_disjoint_boxes_in_order_that_cover_exactly_it(data: st.DataObject) -> None:
    shape = data.draw(shapes(low=0))
    full = torch.arange(torch.Size(shape).numel()).reshape(shape)
    start = data.draw(st.integers(0, full.numel()))
    stop = data.draw(st.integers(start, full.numel()))
    boxes = list(flat_boxes(shape, start, stop))
    covered = [box_of(full, Region("t", offset, box)).reshape(-1) for offset, box, _ in boxes]
    assert torch.cat([*covered, full.new_empty(0)]).tolist() == list(range(start, stop))
    assert [flat for _, _, flat in boxes] == [int(elements[0]) for elements in covered]
    assert len(boxes) <= max(2 * len(shape) - 1, 1)


def test_a_zero3_partition_is_a_head_row_a_box_and_a_tail_row() -> None:
    assert list(flat_boxes((4, 6), 4, 20)) == [((0, 4), (1, 2), 4), ((1, 0), (2, 6), 6), ((3, 0), (1, 2), 18)]


@examples(300)
@given(st.data())
def test_boxes_of_a_view_replay_it_element_by_element(data: st.DataObject) -> None:
    shape = data.draw(shapes())
    full = torch.arange(torch.Size(shape).numel()).reshape(shape)
    view = data.draw(view_programs(full))(full)
    order = data.draw(st.permutations(range(view.dim())))
    other = torch.full([view.shape[d] for d in order], -1).permute([order.index(d) for d in range(view.dim())])
    boxes = list(strided_boxes(shape, view.storage_offset(), view.shape, view.stride(), other.stride(), 0))
    for offset, box, strides, at in boxes:
        other.as_strided(box, strides, at).copy_(box_of(full, Region("t", offset, box)))
    assert identical(other.contiguous(), view.contiguous())
    assert sum(torch.Size(box).numel() for _, box, _, _ in boxes) == view.numel()


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t,
        lambda t: t.narrow(0, 2, 3),
        lambda t: t.narrow(1, 2, 3),
        lambda t: t.t(),
        lambda t: t.narrow(1, 4, 4).t(),
        lambda t: t.view(2, 3, 8)[1],
        lambda t: t.view(2, 3, 8).transpose(0, 1),
        lambda t: t.view(6, 4, 2)[:, 1:3],
        lambda t: t.view(-1)[8:32],
        lambda t: t[3],
    ],
)
def test_a_usual_cut_is_few_boxes(view) -> None:
    cut = view(torch.arange(48).reshape(6, 8))
    boxes = list(strided_boxes((6, 8), cut.storage_offset(), cut.shape, cut.stride(), contiguous_strides(cut.shape), 0))
    assert len(boxes) <= (2 if cut.dim() == 3 else 1)


@pytest.mark.parametrize(("size", "step"), [(3, 1), (4, 2)])
def test_windows_that_overlap_are_followed(size: int, step: int) -> None:
    full = torch.arange(8)
    windows = full.unfold(0, size, step)
    other = torch.zeros_like(windows, memory_format=torch.contiguous_format)
    for offset, box, strides, at in strided_boxes((8,), 0, windows.shape, windows.stride(), other.stride(), 0):
        other.as_strided(box, strides, at).copy_(box_of(full, Region("t", offset, box)))
    assert torch.equal(other, windows)


@pytest.mark.parametrize("strides", [(0, 1), (1, 0), (0, 0)])
def test_a_view_that_repeats_elements_is_refused(strides: tuple[int, int]) -> None:
    with pytest.raises(LayoutError, match="repeats"):
        list(strided_boxes((4,), 0, (4, 4), strides, (4, 1), 0))


@examples(100)
@given(st.data())
def test_the_intersection_is_what_both_regions_hold(data: st.DataObject) -> None:
    shape = data.draw(shapes(dims=(1, 3)))
    full = torch.arange(torch.Size(shape).numel()).reshape(shape)
    a, b = (data.draw(_boxes(shape)) for _ in range(2))
    common = a.intersect(b)
    both = sorted(set(box_of(full, a).flatten().tolist()) & set(box_of(full, b).flatten().tolist()))
    assert (common is None) == (not both)
    assert common is None or box_of(full, common).flatten().tolist() == both
    assert a.intersect(a) == a


def test_a_narrowed_piece_views_the_inner_box() -> None:
    storage = torch.arange(100)
    piece = Piece(Region("t", (2, 3), (4, 5)), "s", 7, (1, 10))
    inner = piece.narrow(Region("t", (3, 5), (2, 2)))
    assert torch.equal(inner.view({"s": storage}), piece.view({"s": storage})[1:3, 2:4])


@examples(150)
@given(st.data())
def test_a_view_of_what_lies_in_parts_is_found_as_far_as_there_are_parts(data: st.DataObject) -> None:
    shape = data.draw(shapes(dims=(1, 3)))
    full = torch.arange(torch.Size(shape).numel()).reshape(shape)
    view = data.draw(view_programs(full))(full)
    start = data.draw(st.integers(0, full.numel() - 1))
    stop = data.draw(st.integers(start + 1, full.numel()))
    storages = {"s": torch.full((full.numel() + 5,), -7)}  # a flat shard, five elements into its buffer
    parts = []
    for offset, box, flat in flat_boxes(shape, start, stop):
        parts.append(Piece(Region("", offset, box), "s", flat - start + 5, contiguous_strides(shape)))
        parts[-1].view(storages).copy_(box_of(full, parts[-1].region))
    away = (10,) * view.dim()
    found = torch.full([n + 10 for n in view.shape], -1)
    of = Piece(Region("t", away, tuple(view.shape)), "", int(view.storage_offset()), tuple(view.stride()))
    for piece in compose(of, shape, parts):
        box_of(found, piece.region).copy_(piece.view(storages))
    inside = (view >= start) & (view < stop)
    assert torch.equal(box_of(found, of.region), view.where(inside, torch.tensor(-1)))


@examples(50)
@given(shapes(low=0))
def test_contiguous_strides_are_torchs(shape: tuple[int, ...]) -> None:
    assert contiguous_strides(shape) == torch.empty(shape).stride()


def test_a_region_prints_as_a_slice() -> None:
    assert str(Region("w", (0, 8), (2, 4))) == "w[0:2, 8:12]"
    assert whole(TensorMeta("s", (), "float32")).numel == 1


@st.composite
def _boxes(draw: st.DrawFn, shape: tuple[int, ...]) -> Region:
    offset = tuple(draw(st.integers(0, n - 1)) for n in shape)
    return Region("t", offset, tuple(draw(st.integers(1, n - o)) for n, o in zip(shape, offset, strict=True)))
