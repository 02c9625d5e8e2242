"""The M x N plan: which segment of which trainer rank's arena goes where in which engine rank's arena.

An owned region is cut where any engine rank's region begins or ends, in every dimension (the common refinement), so a segment
is wholly needed or wholly not by each engine rank. Each lies contiguous in the source arena: a tensor-parallel cut on
dimension 1 costs a strided copy in the snapshot, not a descriptor a row on the wire.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import msgspec

from rlbridge.errors import LayoutError
from rlbridge.weights.boxes import Box, overlap
from rlbridge.weights.layout import DTYPE_BYTES, Layout, Region, TensorMeta

ALIGNMENT = 64
"""Segments start at multiples of this many bytes: a cache line, and a multiple of every dtype's size."""

_FLOATS = {name for name in DTYPE_BYTES if name.startswith(("float", "bfloat"))}


class Segment(msgspec.Struct, frozen=True):
    """A box in a source arena: `nbytes` bytes from `offset` on, in the wire dtype, row-major."""

    region: Region
    dtype: str
    offset: int
    nbytes: int


class Part(msgspec.Struct, frozen=True):
    """A segment in a sink arena.

    `source` and `segment` say whose and which segment it is, `source_offset` where it starts there; `piece` is the index of
    the sink's recorded region that it lies in; `offset` is its place in the sink arena.
    """

    source: int
    segment: int
    source_offset: int
    piece: int
    region: Region
    dtype: str
    offset: int
    nbytes: int


class SourceShare(msgspec.Struct, frozen=True):
    """What one trainer rank has to know of the plan."""

    segments: list[Segment]
    arena_bytes: int


class SinkShare(msgspec.Struct, frozen=True):
    """What one engine rank has to know of the plan; `parts` in the order of the sink arena."""

    parts: list[Part]
    arena_bytes: int


class Cast(msgspec.Struct, frozen=True):
    """A tensor that is rounded to another dtype in the snapshot."""

    tensor: str
    source: str
    wire: str


@dataclass(frozen=True)
class Plan:
    """The shares of all ranks, and the casts that they imply."""

    sources: list[SourceShare]
    sinks: list[SinkShare]
    casts: list[Cast]

    @property
    def bytes(self) -> int:
        """Bytes that one version moves, over all engine ranks."""
        return sum(part.nbytes for sink in self.sinks for part in sink.parts)


class Run(msgspec.Struct, frozen=True):
    """Adjacent parts from one source, as one copy: `nbytes` from `source_offset` to `offset`, both in bytes."""

    source: int
    source_offset: int
    offset: int
    nbytes: int


def compile_plan(sources: Sequence[Layout], sinks: Sequence[Layout], *, cast: str = "generator") -> Plan:
    """The plan that carries the sources' layouts to the sinks'.

    Args:
        sources: One layout a trainer rank. Equal regions on several ranks are replicas; each segment is taken from one of them.
        sinks: One layout a engine rank, with the dtypes of its parameters.
        cast: "generator" rounds floating dtypes to the sinks' in the snapshot; "refuse" makes any difference an error.

    Raises:
        LayoutError: names the tensors that are missing, surplus or overlapping, or of another shape or dtype.
    """
    metas = _agreed(sources, "trainer")
    owners = _by_tensor(sources)
    needs = _by_tensor(sinks)
    wire, casts = _wire_dtypes(metas, sinks, needs, cast)
    _check_surplus(metas, needs)
    loads = [0] * len(sources)
    segments: list[list[Segment]] = [[] for _ in sources]
    parts: list[list[Part]] = [[] for _ in sinks]
    for name, meta in metas.items():
        if name not in needs:
            continue
        regions = _owned(name, owners.get(name, []))
        wanted = needs[name]
        covered = [0] * len(wanted)
        for box, ranks in regions.items():
            for region in _refined(box, [w[2] for w in wanted]):
                takers = [k for k, (_, _, need) in enumerate(wanted) if need.intersect(region) == region]
                if not takers:
                    continue
                source = min(ranks, key=lambda r: (loads[r], r))
                segment = _append(segments[source], region, wire[name])
                loads[source] += segment.nbytes
                for k in takers:
                    sink, piece, _ = wanted[k]
                    covered[k] += region.numel
                    parts[sink].append(
                        Part(
                            source, len(segments[source]) - 1, segment.offset, piece, region, wire[name], 0, segment.nbytes
                        )
                    )
        for k, (sink, _, need) in enumerate(wanted):
            if covered[k] != need.numel:
                raise LayoutError(
                    f"no trainer rank owns all of {need}, which the generator needs: {covered[k]} of {need.numel} elements",
                    tensor=name,
                    role="generator",
                    rank=sink,
                    todo=f"shape in the checkpoint: {meta.shape}; check the trainer's layout",
                )
    return Plan(
        [SourceShare(s, _end(s)) for s in segments],
        [_placed(p) for p in parts],
        casts,
    )


def runs(parts: Sequence[Part]) -> list[Run]:
    """The parts of one sink as the fewest copies: neighbours in both arenas are joined, the gaps of alignment included."""
    joined: list[Run] = []
    for part in parts:
        last = joined[-1] if joined else None
        if last is not None and last.source == part.source and part.source_offset - last.source_offset == part.offset - last.offset:
            joined[-1] = Run(last.source, last.source_offset, last.offset, part.offset + part.nbytes - last.offset)
        else:
            joined.append(Run(part.source, part.source_offset, part.offset, part.nbytes))
    return joined


def spread(tensors: Sequence[TensorMeta], ranks: int) -> list[int]:
    """An owner for each tensor, so that bytes are as even over `ranks` as the largest-first rule makes them."""
    loads, owners = [0] * ranks, [0] * len(tensors)
    for index in sorted(range(len(tensors)), key=lambda i: -_nbytes(tensors[i])):
        owner = min(range(ranks), key=lambda r: loads[r])
        owners[index] = owner
        loads[owner] += _nbytes(tensors[index])
    return owners


def _nbytes(tensor: TensorMeta) -> int:
    return Region(tensor.name, (0,) * len(tensor.shape), tensor.shape).numel * DTYPE_BYTES[tensor.dtype]


def _agreed(layouts: Sequence[Layout], role: str) -> dict[str, TensorMeta]:
    """Every tensor that is no alias, by name; all ranks must describe it alike."""
    metas: dict[str, TensorMeta] = {}
    for rank, layout in enumerate(layouts):
        for meta in layout.tensors:
            known = metas.setdefault(meta.name, meta)
            if known != meta:
                raise LayoutError(
                    f"{role} ranks disagree: {known.dtype}{list(known.shape)} and {meta.dtype}{list(meta.shape)}",
                    tensor=meta.name,
                    role=role,
                    rank=rank,
                )
    return {name: meta for name, meta in metas.items() if meta.alias_of is None}


def _by_tensor(layouts: Sequence[Layout]) -> dict[str, list[tuple[int, int, Region]]]:
    """(rank, index in its layout, region) of every region that has elements, by tensor."""
    found: dict[str, list[tuple[int, int, Region]]] = {}
    for rank, layout in enumerate(layouts):
        for index, region in enumerate(layout.regions):
            if region.numel:
                found.setdefault(region.tensor, []).append((rank, index, region))
    return found


def _wire_dtypes(
    metas: dict[str, TensorMeta], sinks: Sequence[Layout], needs: dict[str, list[tuple[int, int, Region]]], cast: str
) -> tuple[dict[str, str], list[Cast]]:
    sink_metas = [layout.meta() for layout in sinks]
    wire: dict[str, str] = {}
    casts = []
    for name, wanted in needs.items():
        meta = metas.get(name)
        if meta is None:
            raise LayoutError("the generator needs a tensor that the trainer does not publish", tensor=name)
        for rank in sorted({rank for rank, _, _ in wanted}):
            there = sink_metas[rank][name]
            if there.shape != meta.shape:
                raise LayoutError(
                    f"the trainer has shape {list(meta.shape)} ({meta.dtype}), the generator {list(there.shape)} ({there.dtype})",
                    tensor=name,
                    role="generator",
                    rank=rank,
                    todo="both must be made from the same model directory",
                )
            if wire.setdefault(name, there.dtype) != there.dtype:
                raise LayoutError(f"engine ranks hold it as {wire[name]} and as {there.dtype}", tensor=name, rank=rank)
        if wire[name] == meta.dtype:
            continue
        if cast != "generator" or not {wire[name], meta.dtype} <= _FLOATS:
            raise LayoutError(
                f"the trainer has {meta.dtype}{list(meta.shape)}, the generator {wire[name]}{list(meta.shape)}",
                tensor=name,
                todo="give trainer and generator one dtype, or let the snapshot round with sync.cast=generator"
                if {wire[name], meta.dtype} <= _FLOATS
                else "only floating dtypes can be cast",
            )
        casts.append(Cast(name, meta.dtype, wire[name]))
    return wire, casts


def _check_surplus(metas: dict[str, TensorMeta], needs: dict[str, list[tuple[int, int, Region]]]) -> None:
    surplus = [m.name for m in metas.values() if m.name not in needs and _nbytes(m)]
    if surplus:
        raise LayoutError(
            f"the trainer publishes {len(surplus)} tensors that no engine rank takes: {', '.join(surplus[:8])}",
            tensor=surplus[0],
            todo="are trainer and generator the same model? a tied tensor must be declared as an alias",
        )


def _owned(name: str, found: Iterable[tuple[int, int, Region]]) -> dict[Region, list[int]]:
    """The distinct regions of one tensor with the ranks that hold each; they must be disjoint."""
    regions: dict[Region, list[int]] = {}
    for rank, _, region in found:
        regions.setdefault(region, []).append(rank)
    distinct = list(regions)
    twice = overlap([Box(r.offset, r.shape) for r in distinct])
    if twice is not None:
        a, b = (distinct[i] for i in twice)
        raise LayoutError(f"two trainer ranks own {a} (rank {regions[a][0]}) and {b} (rank {regions[b][0]}), which overlap", tensor=name)
    return regions


def _refined(region: Region, wanted: Sequence[Region]) -> Iterator[Region]:
    """`region` cut wherever one of `wanted` begins or ends, in every dimension."""
    axes = []
    for d, (start, length) in enumerate(zip(region.offset, region.shape, strict=True)):
        edges = {w.offset[d] for w in wanted} | {w.offset[d] + w.shape[d] for w in wanted}
        inner = sorted(e for e in edges if start < e < start + length)
        axes.append(list(itertools.pairwise([start, *inner, start + length])))
    for cell in itertools.product(*axes):
        yield Region(region.tensor, tuple(a for a, _ in cell), tuple(b - a for a, b in cell))


def _append(segments: list[Segment], region: Region, dtype: str) -> Segment:
    segment = Segment(region, dtype, _end(segments), region.numel * DTYPE_BYTES[dtype])
    segments.append(segment)
    return segment


def _end(segments: Sequence[Segment | Part]) -> int:
    return _aligned(segments[-1].offset + segments[-1].nbytes) if segments else 0


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _placed(parts: Sequence[Part]) -> SinkShare:
    """The parts with their places in the sink arena: in the source's order, so that neighbours stay neighbours."""
    placed: list[Part] = []
    for part in sorted(parts, key=lambda p: (p.source, p.source_offset)):
        placed.append(msgspec.structs.replace(part, offset=_end(placed)))
    return SinkShare(placed, _end(placed))
