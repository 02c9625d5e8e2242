"""The plan, by carrying random tensors from random sources to random sinks, in one process and with no transport."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from rlbridge.errors import LayoutError
from rlbridge.roles.sink import RecordedSink
from rlbridge.roles.source import GatheredSource, ShardedSource, WeightSource
from rlbridge.weights.arena import Arena
from rlbridge.weights.digest import digests
from rlbridge.weights.layout import Layout, Piece, Region, TensorMeta, contiguous_strides, flat_boxes, whole
from rlbridge.weights.plan import ALIGNMENT, Plan, compile_plan, runs, spread
from tests.weights.programs import DTYPES, box_of, examples, identical, shapes, values

Tensors = dict[str, torch.Tensor]


@dataclass
class Engine:
    """One engine rank: its parameters, and the boxes of checkpoint tensors that make them, in order."""

    parameters: Tensors
    boxes: dict[str, list[Region]]

    @property
    def sink(self) -> RecordedSink:
        return RecordedSink(self.load, self.parameters)

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            for parameter, boxes in self.boxes.items():
                flat, at = self.parameters[parameter].view(-1), 0
                for box in boxes:
                    if box.tensor == name:
                        flat[at : at + box.numel].view(box.shape).copy_(box_of(tensor, box))
                    at += box.numel

    def expected(self, tensors: Tensors) -> Tensors:
        """What the parameters are to be, joined by hand."""
        return {
            name: torch.cat([box_of(tensors[box.tensor], box).reshape(-1) for box in boxes]).to(self.parameters[name].dtype)
            for name, boxes in self.boxes.items()
        }


@st.composite
def checkpoints(draw: st.DrawFn) -> Tensors:
    every = draw(st.lists(st.tuples(shapes(low=0, dims=(0, 3)), st.sampled_from(DTYPES)), min_size=1, max_size=4))
    return {f"t{i}": values(shape, dtype, i) for i, (shape, dtype) in enumerate(every)}


@st.composite
def trainers(draw: st.DrawFn, tensors: Tensors) -> list[WeightSource]:
    ranks = draw(st.integers(1, 4))
    storages: list[Tensors] = [{} for _ in range(ranks)]
    pieces: list[list[Piece]] = [[] for _ in range(ranks)]
    for name, tensor in tensors.items():
        kind = draw(st.sampled_from(["rows", "flat", "replicated", "owner", "hybrid"]))
        if kind in ("rows", "hybrid") and tensor.dim():
            groups = 2 if kind == "hybrid" and ranks % 2 == 0 else 1  # HSDP: each half of the ranks holds everything
            d = draw(st.integers(0, tensor.dim() - 1))
            ends = draw(_cuts(tensor.shape[d], ranks // groups))
            for rank in range(ranks):
                start, stop = ends[rank % (ranks // groups)]
                offset = tuple(start * (k == d) for k in range(tensor.dim()))
                shard = tensor.narrow(d, start, stop - start).clone(memory_format=torch.contiguous_format)
                storages[rank][name] = shard
                region = Region(name, offset, tuple(shard.shape))
                pieces[rank].append(Piece(region, name, 0, contiguous_strides(shard.shape)))
        elif kind == "flat":
            for rank, (start, stop) in enumerate(draw(_cuts(tensor.numel(), ranks))):
                storages[rank][name] = tensor.reshape(-1)[start:stop].clone()
                for offset, box, flat in flat_boxes(tensor.shape, start, stop):
                    pieces[rank].append(Piece(Region(name, offset, box), name, flat - start, contiguous_strides(tensor.shape)))
        else:
            owner = draw(st.integers(0, ranks - 1))
            for rank in range(ranks) if kind == "replicated" else [owner]:
                storages[rank][name] = tensor.clone()
                pieces[rank].append(Piece(whole(_meta(name, tensor)), name, 0, contiguous_strides(tensor.shape)))
    metas = [_meta(name, tensor) for name, tensor in tensors.items()]
    return [ShardedSource(metas, p, lambda s=s: s) for p, s in zip(pieces, storages, strict=True)]


@st.composite
def engines(draw: st.DrawFn, tensors: Tensors, dtype: str | None = None) -> Engine:
    """Boxes of the tensors, each fused with others of its dtype; some cut on a dimension, some twice, some left out."""
    fused: dict[str, list[Region]] = {}
    for name, tensor in draw(st.permutations(sorted(tensors.items(), key=lambda item: item[0]))):
        for _ in range(draw(st.sampled_from([1, 1, 1, 2, 0]))):
            box = draw(_boxes(name, tensor))
            fused.setdefault(f"{tensor.dtype}.{draw(st.integers(0, 1))}".removeprefix("torch."), []).append(box)
    parameters = {
        name: torch.zeros(sum(b.numel for b in boxes), dtype=getattr(torch, dtype or name.split(".")[0]))
        for name, boxes in fused.items()
    }
    return Engine(parameters, fused)


@st.composite
def _boxes(draw: st.DrawFn, name: str, tensor: torch.Tensor) -> Region:
    offset, shape = [0] * tensor.dim(), list(tensor.shape)
    for d in draw(st.sets(st.sampled_from(range(tensor.dim())), max_size=2)) if tensor.numel() and tensor.dim() else ():
        ways = draw(st.sampled_from([1, 2, 3]))
        start, stop = draw(st.sampled_from([(a, b) for a, b in _even(shape[d], ways) if a < b]))
        offset[d], shape[d] = start, stop - start
    return Region(name, tuple(offset), tuple(shape))


@st.composite
def _cuts(draw: st.DrawFn, length: int, parts: int) -> list[tuple[int, int]]:
    ends = sorted(draw(st.lists(st.integers(0, length), min_size=parts - 1, max_size=parts - 1)))
    return list(zip([0, *ends], [*ends, length], strict=True))


def _even(length: int, parts: int) -> list[tuple[int, int]]:
    size = -(-length // parts)
    return [(min(i * size, length), min((i + 1) * size, length)) for i in range(parts)]


def _meta(name: str, tensor: torch.Tensor) -> TensorMeta:
    return TensorMeta(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def carry(sources: list[WeightSource], engines: list[Engine], cast: str = "generator") -> Plan:
    """Compile, snapshot, copy the runs' bytes, install; every digest is compared on the way."""
    sinks = [engine.sink for engine in engines]
    layouts = [source.layout() for source in sources]
    plan = compile_plan(layouts, [sink.record(layouts[0].tensors) for sink in sinks], cast=cast)
    arenas = []
    for source, share in zip(sources, plan.sources, strict=True):
        source.bind([segment.region for segment in share.segments])
        arena = Arena(share.arena_bytes)
        source.snapshot([arena.view(s.offset, s.nbytes, s.dtype, s.region.shape) for s in share.segments])
        arenas.append(arena)
    for engine, sink, share in zip(engines, sinks, plan.sinks, strict=True):
        arena = Arena(share.arena_bytes)
        for run in runs(share.parts):
            sent = arenas[run.source].tensor[run.source_offset : run.source_offset + run.nbytes]
            arena.tensor[run.offset : run.offset + run.nbytes] = sent
        views = [arena.view(p.offset, p.nbytes, p.dtype, p.region.shape) for p in share.parts]
        sink.bind([(part.piece, part.region) for part in share.parts])
        sink.scramble()
        sink.install(views)
        published = [
            digests([arenas[p.source].view(s.offset, s.nbytes, s.dtype, s.region.shape)])[0]
            for p in share.parts
            for s in [plan.sources[p.source].segments[p.segment]]
        ]
        assert published == digests(views) == digests(sink.live())
        assert sum(p.region.numel for p in share.parts) == sum(t.numel() for t in engine.parameters.values())
    return plan


def check_places(plan: Plan) -> None:
    """Aligned, apart, inside their arenas; each part beside its segment; a run holds its parts and no more than gaps."""
    for share in plan.sources:
        _check_arena([(s.offset, s.nbytes) for s in share.segments], share.arena_bytes)
    for share in plan.sinks:
        _check_arena([(p.offset, p.nbytes) for p in share.parts], share.arena_bytes)
        for part in share.parts:
            segment = plan.sources[part.source].segments[part.segment]
            assert (part.region, part.dtype, part.source_offset) == (segment.region, segment.dtype, segment.offset)
        parts, moved = sum(p.nbytes for p in share.parts), sum(run.nbytes for run in runs(share.parts))
        assert parts <= moved < parts + ALIGNMENT * len(share.parts) + 1
        _check_arena([(run.offset, run.nbytes) for run in runs(share.parts)], share.arena_bytes)
    assert plan.bytes == sum(p.nbytes for share in plan.sinks for p in share.parts)


def _check_arena(places: list[tuple[int, int]], arena_bytes: int) -> None:
    end = 0
    for offset, nbytes in sorted(places):
        assert offset % ALIGNMENT == 0
        assert offset >= end
        end = offset + nbytes
    assert end <= arena_bytes <= sum(-(-nbytes // ALIGNMENT) * ALIGNMENT for _, nbytes in places)


@examples(150)
@given(st.data())
def test_what_arrives_is_what_was_published_byte_for_byte(data: st.DataObject) -> None:
    tensors = data.draw(checkpoints())
    generators = [data.draw(engines(tensors)) for _ in range(data.draw(st.integers(1, 3)))]
    taken = {box.tensor for engine in generators for boxes in engine.boxes.values() for box in boxes}
    tensors = {name: tensor for name, tensor in tensors.items() if name in taken}
    assume(tensors)
    plan = carry(data.draw(trainers(tensors)), generators)
    check_places(plan)
    assert not plan.casts
    for engine in generators:
        for name, expected in engine.expected(tensors).items():
            assert identical(engine.parameters[name], expected)


@examples(40)
@given(st.data())
def test_a_cast_is_torchs_own_rounding(data: st.DataObject) -> None:
    trained, served = data.draw(st.permutations(["float32", "bfloat16", "float16", "float64"]))[:2]
    tensors = {"t": values(data.draw(shapes(dims=(0, 3))), trained, 1)}
    generators = [data.draw(engines(tensors, served)) for _ in range(2)]
    assume(any(engine.boxes for engine in generators))
    plan = carry(data.draw(trainers(tensors)), generators)
    check_places(plan)
    assert [(c.tensor, c.source, c.wire) for c in plan.casts] == [("t", trained, served)]
    for engine in generators:
        for name, expected in engine.expected(tensors).items():
            assert identical(engine.parameters[name], expected)
    with pytest.raises(LayoutError, match=rf"{trained}.*{served}"):
        carry([GatheredSource([_meta("t", tensors["t"])], lambda: iter(()), 0, 1)], generators, cast="refuse")


@examples(40)
@given(st.data())
def test_tensors_of_a_collective_exporter_arrive(data: st.DataObject) -> None:
    tensors = data.draw(checkpoints())
    ranks = data.draw(st.integers(1, 4))
    metas = [_meta(name, tensor) for name, tensor in tensors.items()]
    sources: list[WeightSource] = [GatheredSource(metas, lambda: iter(tensors.items()), rank, ranks) for rank in range(ranks)]
    everything = Engine(
        {name: torch.zeros(t.numel(), dtype=t.dtype) for name, t in tensors.items()},
        {name: [whole(_meta(name, t))] for name, t in tensors.items()},
    )
    generators = [everything, data.draw(engines(tensors))]
    check_places(carry(sources, generators))
    for engine in generators:
        for name, expected in engine.expected(tensors).items():
            assert identical(engine.parameters[name], expected)


@examples(60)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=40), st.integers(1, 5))
def test_replicas_share_the_sending(sizes: list[int], ranks: int) -> None:
    metas = [TensorMeta(f"t{i}", (n,), "float32") for i, n in enumerate(sizes)]
    layout = Layout(metas, [whole(m) for m in metas])
    plan = compile_plan([layout] * ranks, [layout, layout])
    sent = [sum(s.nbytes for s in share.segments) for share in plan.sources]
    assert sum(sent) == 4 * sum(sizes)
    assert max(sent) - min(sent) <= 4 * max(sizes)


@examples(60)
@given(st.lists(st.integers(0, 200), min_size=1, max_size=40), st.integers(1, 5))
def test_owners_are_spread_by_bytes(sizes: list[int], ranks: int) -> None:
    owners = spread([TensorMeta(f"t{i}", (n,), "float32") for i, n in enumerate(sizes)], ranks)
    loads = [sum(n for n, owner in zip(sizes, owners, strict=True) if owner == rank) for rank in range(ranks)]
    assert max(loads) - min(loads) <= max(sizes)
    assert all(loads) or sum(n > 0 for n in sizes) < ranks


def test_a_large_tensor_counts_as_much_as_many_small_ones() -> None:
    assert spread([TensorMeta(f"t{n}", (n,), "float32") for n in (31, 90, 30, 29)], 2) == [1, 0, 1, 1]


def _held(
    name: str, *regions: tuple[tuple[int, ...], tuple[int, ...]], shape: tuple[int, ...], dtype: str = "float32"
) -> Layout:
    return Layout([TensorMeta(name, shape, dtype)], [Region(name, *region) for region in regions])


FULL = _held("w", ((0, 0), (4, 6)), shape=(4, 6))


def test_a_cut_on_dimension_1_is_one_segment_a_rank_and_one_copy_each() -> None:
    metas = [TensorMeta(f"w{i}", (8, 8), "float32") for i in range(5)]
    rows = [Layout(metas, [Region(m.name, (4 * r, 0), (4, 8)) for m in metas]) for r in range(2)]
    columns = [Layout(metas, [Region(m.name, (0, 2 * r), (8, 2)) for m in metas]) for r in range(4)]
    plan = compile_plan(rows, columns)
    assert [len(share.segments) for share in plan.sources] == [20, 20]
    assert [len(runs(share.parts)) for share in plan.sinks] == [2, 2, 2, 2]


def test_what_all_engines_need_alike_is_not_cut_by_what_others_need_elsewhere() -> None:
    sink = _held("w", ((0, 0), (2, 6)), shape=(4, 6))
    other = _held("w", ((2, 1), (2, 3)), ((2, 4), (2, 2)), shape=(4, 6))
    plan = compile_plan([FULL], [sink, sink, other])
    assert [str(s.region) for s in plan.sources[0].segments] == ["w[0:2, 0:6]", "w[2:4, 1:4]", "w[2:4, 4:6]"]


def test_regions_that_overlap_are_cut_where_either_begins_or_ends() -> None:
    left, right = (_held("w", ((0, c), (4, 4)), shape=(4, 6)) for c in (0, 2))
    plan = compile_plan([FULL], [left, right])
    assert sorted(str(s.region) for s in plan.sources[0].segments) == ["w[0:4, 0:2]", "w[0:4, 2:4]", "w[0:4, 4:6]"]
    assert [len(share.parts) for share in plan.sinks] == [2, 2]


def test_a_box_that_goes_to_two_places_of_one_rank_travels_twice() -> None:
    twice = Layout(FULL.tensors, FULL.regions * 2)
    plan = compile_plan([FULL], [twice])
    assert [p.piece for p in plan.sinks[0].parts] == [0, 1]
    assert len({p.offset for p in plan.sinks[0].parts}) == 2
    check_places(plan)


def test_aliases_and_empty_tensors_are_no_surplus() -> None:
    metas = [*FULL.tensors, TensorMeta("head", (4, 6), "float32", alias_of="w"), TensorMeta("none", (0, 6), "float32")]
    source = Layout(metas, [*FULL.regions, Region("none", (0, 0), (0, 6))])
    assert compile_plan([source], [Layout(metas, FULL.regions)]).bytes == 96


def test_a_rank_with_nothing_has_an_empty_arena() -> None:
    plan = compile_plan([FULL, Layout(FULL.tensors, [])], [FULL, Layout(FULL.tensors, [])])
    assert [share.arena_bytes for share in plan.sources] == [128, 0]
    assert [share.arena_bytes for share in plan.sinks] == [128, 0]
    assert runs([]) == []


_ROW = ((0, 0), (1, 6))


@pytest.mark.parametrize(
    ("sources", "sinks", "message"),
    [
        ([_held("v", ((0,), (2,)), shape=(2,))], [FULL], "does not publish"),
        ([FULL], [], "takes: w"),
        ([FULL], [_held("w", shape=(4, 6))], "takes: w"),
        ([_held("w", _ROW, shape=(4, 6))], [FULL], r"owns all of w\[0:4, 0:6\].*: 6 of 24 elements"),
        ([FULL, _held("w", _ROW, shape=(4, 6))], [FULL], r"w\[0:4, 0:6\] \(rank 0\) and w\[0:1, 0:6\] \(rank 1\).*overlap"),
        ([FULL], [_held("w", ((0, 0), (6, 4)), shape=(6, 4), dtype="bfloat16")], r"float32\[4, 6\].*bfloat16\[6, 4\]"),
        ([FULL, _held("w", shape=(4, 5))], [FULL], r"ranks disagree: float32\[4, 6\] and float32\[4, 5\]"),
        ([FULL], [_held("w", _ROW, shape=(4, 6), dtype=d) for d in ("float32", "float16")], "as float32 and as float16"),
        ([FULL], [_held("w", _ROW, shape=(4, 6), dtype="int32")], r"float32\[4, 6\].*int32\[4, 6\]"),
        ([_held("w", _ROW, shape=(4, 6), dtype="int64")], [_held("w", _ROW, shape=(4, 6), dtype="int32")], r"int64.*int32"),
        ([FULL], [_held("w", _ROW, shape=(4, 6), dtype="float8_e4m3fn")], r"float32.*float8_e4m3fn"),
        ([_held("w", ((0, 2), (4, 6)), shape=(4, 6))], [FULL], r"w\[0:4, 2:8\], which is no part"),
        ([_held("w", ((0,), (4,)), shape=(4, 6))], [FULL], "which is no part"),
        ([FULL], [Layout([], FULL.regions)], "which is no part"),
        ([_held("w", _ROW, shape=(4, 6), dtype="complex64")], [FULL], "complex64"),
    ],
)
def test_what_does_not_fit_is_named(sources: list[Layout], sinks: list[Layout], message: str) -> None:
    with pytest.raises(LayoutError, match=message) as caught:
        compile_plan(sources, sinks)
    assert caught.value.where["tensor"] in {"w", "v"}


def test_a_plan_for_many_ranks_is_made_in_linear_time() -> None:
    def seconds(tensors: int) -> float:
        metas = [TensorMeta(f"w{i}", (64, 64), "bfloat16") for i in range(tensors)]
        rows = [Layout(metas, [Region(m.name, (r, 0), (1, 64)) for m in metas]) for r in range(64)]
        cut = [Layout(metas, [Region(m.name, (8 * r, 0), (8, 64)) for m in metas]) for r in range(8)]
        start = time.process_time()
        plan = compile_plan(rows, cut)
        found = time.process_time() - start
        assert sum(len(share.segments) for share in plan.sources) == 64 * tensors
        return found

    few = min(seconds(20) for _ in range(3))
    assert seconds(160) < 8 * few * 3


def test_carrying_nothing_is_a_plan() -> None:
    assert compile_plan([Layout([], [])], [Layout([], [])]).bytes == 0
