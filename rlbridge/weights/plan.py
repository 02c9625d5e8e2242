"""The M x N plan: which segment of which trainer rank's arena goes where in which engine rank's arena.

An owned region is cut where any engine rank's region begins or ends, in every dimension (the common refinement), so a segment
is wholly needed or wholly not by each engine rank. Each lies contiguous in the source arena, beside the others that the same
engine ranks take: a tensor-parallel cut on dimension 1 is a strided copy in the snapshot, not a descriptor a row on the wire.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter

import msgspec

from rlbridge.errors import LayoutError
from rlbridge.weights.boxes import overlap
from rlbridge.weights.layout import DTYPE_BYTES, Layout, Region, TensorMeta, whole

ALIGNMENT = 64
"""Segments start at multiples of this many bytes: a cache line, and a multiple of every dtype's size."""

_FLOATS = {"float16", "bfloat16", "float32", "float64"}  # float8 means nothing without its scales: it is never cast

_Held = tuple[int, int, Region]
"""A region, with the rank that holds it and its index in that rank's layout."""


_Draft = tuple[tuple[int, ...], tuple[int, ...], Region, str, int]
"""A segment without a place: the sinks that take it, the index of the region that it lies in there, region, dtype, bytes."""


class Segment(msgspec.Struct, frozen=True, gc=False):
    """A box in a source arena: `nbytes` bytes from `offset` on, in the wire dtype, row-major."""

    region: Region
    dtype: str
    offset: int
    nbytes: int


class Part(msgspec.Struct, frozen=True, gc=False):
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
        sinks: One layout an engine rank, with the dtypes of its parameters.
        cast: "generator" rounds floating dtypes to the sinks' in the snapshot; "refuse" makes any difference an error.

    Raises:
        LayoutError: names the tensors that are missing, surplus or overlapping, or of another shape or dtype.
    """
    metas = _agreed(sources, "trainer")
    owners = _by_tensor(sources, "trainer")
    needs = _by_tensor(sinks, "generator")
    wire, casts = _wire_dtypes(metas, sinks, needs, cast)
    _check_surplus(metas, needs)
    loads = [0] * len(sources)
    drafts: list[list[_Draft]] = [[] for _ in sources]
    for name, meta in metas.items():
        needed = needs.get(name)
        if needed is None:
            continue
        wanted = _Wanted(needed)
        covered = [0] * len(needed)
        for box, ranks in _owned(name, owners.get(name, [])).items():
            for region, takers in wanted.cut(box):
                source = min(ranks, key=lambda rank: (loads[rank], rank))
                nbytes = region.numel * DTYPE_BYTES[wire[name]]
                loads[source] += nbytes
                drafts[source].append(
                    (tuple(needed[k][0] for k in takers), tuple(needed[k][1] for k in takers), region, wire[name], nbytes)
                )
                for k in takers:
                    covered[k] += region.numel
        _check_covered(meta, needed, covered)
    return _placed(drafts, len(sinks), casts)


def runs(parts: Sequence[Part]) -> list[Run]:
    """The parts of one sink as the fewest copies: neighbours in both arenas are joined, the gaps of alignment included."""
    joined: list[Run] = []
    for part in parts:
        last = joined[-1] if joined else None
        if (
            last is not None
            and last.source == part.source
            and part.source_offset - last.source_offset == part.offset - last.offset
        ):
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
    if tensor.dtype not in DTYPE_BYTES:
        raise LayoutError(f"tensors of {tensor.dtype} cannot be carried", tensor=tensor.name)
    return whole(tensor).numel * DTYPE_BYTES[tensor.dtype]


def _described(meta: TensorMeta) -> str:
    return f"{meta.dtype}{list(meta.shape)}" + (f", an alias of {meta.alias_of}" if meta.alias_of else "")


def _agreed(layouts: Sequence[Layout], role: str) -> dict[str, TensorMeta]:
    """Every tensor that is no alias, by name; all ranks must describe it alike."""
    metas: dict[str, TensorMeta] = {}
    for rank, layout in enumerate(layouts):
        for meta in layout.tensors:
            known = metas.setdefault(meta.name, meta)
            if known != meta:
                raise LayoutError(
                    f"{role} ranks disagree: {_described(known)} and {_described(meta)}",
                    tensor=meta.name,
                    role=role,
                    rank=rank,
                )
    return {name: meta for name, meta in metas.items() if meta.alias_of is None}


def _by_tensor(layouts: Sequence[Layout], role: str) -> dict[str, list[_Held]]:
    """Every region that has elements, by tensor; each must lie within its tensor."""
    found: dict[str, list[_Held]] = {}
    for rank, layout in enumerate(layouts):
        metas = layout.meta()
        for index, region in enumerate(layout.regions):
            meta = metas.get(region.tensor)
            if meta is None or not _within(region, meta.shape):
                raise LayoutError(
                    f"this {role} rank's layout has {region}, which is no part of any tensor that it lists",
                    tensor=region.tensor,
                    role=role,
                    rank=rank,
                    todo=f"the tensor's shape there: {list(meta.shape)}" if meta else "",
                )
            if region.numel:
                found.setdefault(region.tensor, []).append((rank, index, region))
    return found


def _within(region: Region, shape: Sequence[int]) -> bool:
    if not len(region.offset) == len(region.shape) == len(shape):
        return False
    return all(o >= 0 and n >= 0 and o + n <= m for o, n, m in zip(region.offset, region.shape, shape, strict=True))


def _wire_dtypes(
    metas: dict[str, TensorMeta], sinks: Sequence[Layout], needs: dict[str, list[_Held]], cast: str
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
                    f"the trainer has {_described(meta)}, the generator {_described(there)}: the shapes differ",
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
                f"the trainer has {_described(meta)}, the generator {wire[name]}{list(meta.shape)}: the dtypes differ",
                tensor=name,
                todo="give trainer and generator one dtype, or let the snapshot round with sync.cast=generator"
                if {wire[name], meta.dtype} <= _FLOATS
                else "only floating dtypes can be cast",
            )
        casts.append(Cast(name, meta.dtype, wire[name]))
    return wire, casts


def _check_surplus(metas: dict[str, TensorMeta], needs: dict[str, list[_Held]]) -> None:
    surplus = [m.name for m in metas.values() if _nbytes(m) and m.name not in needs]
    if surplus:
        raise LayoutError(
            f"the trainer publishes {len(surplus)} tensors that no engine rank takes: {', '.join(surplus[:8])}",
            tensor=surplus[0],
            todo="are trainer and generator the same model? a tied tensor must be declared as an alias",
        )


def _check_covered(meta: TensorMeta, needed: Sequence[_Held], covered: Sequence[int]) -> None:
    for (sink, _, need), found in zip(needed, covered, strict=True):
        if found != need.numel:
            raise LayoutError(
                f"no trainer rank owns all of {need}, which the generator needs: {found} of {need.numel} elements",
                tensor=meta.name,
                role="generator",
                rank=sink,
                todo=f"shape in the checkpoint: {meta.shape}; check the trainer's layout",
            )


def _owned(name: str, found: Iterable[_Held]) -> dict[Region, list[int]]:
    """The distinct regions of one tensor with the ranks that hold each; they must be disjoint."""
    regions: dict[Region, list[int]] = {}
    for rank, _, region in found:
        regions.setdefault(region, []).append(rank)
    distinct = list(regions)
    twice = overlap(distinct)
    if twice is not None:
        a, b = (distinct[i] for i in twice)
        raise LayoutError(
            f"two trainer ranks own {a} (rank {regions[a][0]}) and {b} (rank {regions[b][0]}), which overlap", tensor=name
        )
    return regions


class _Wanted:
    """What the engine ranks need of one tensor: each distinct region once, found by the row that it starts in."""

    def __init__(self, needed: Sequence[_Held]) -> None:
        takers: dict[Region, list[int]] = {}
        for k, (_, _, region) in enumerate(needed):
            takers.setdefault(region, []).append(k)
        self._wanted = sorted(takers.items(), key=lambda item: _rows(item[0]))
        self._starts = [_rows(region)[0] for region, _ in self._wanted]
        self._longest = max(stop - start for start, stop in map(_rows, takers))

    def cut(self, box: Region) -> Iterator[tuple[Region, list[int]]]:
        """The parts of an owned region that are wholly needed or wholly not by each engine rank, with who needs them."""
        common: dict[Region, list[int]] = {}
        start, stop = _rows(box)
        for index in range(bisect_right(self._starts, start - self._longest), bisect_left(self._starts, stop)):
            region, takers = self._wanted[index]
            inner = box.intersect(region)
            if inner is not None:
                common.setdefault(inner, []).extend(takers)
        if overlap(list(common)) is None:
            yield from common.items()
            return
        for cell in _refined(box, list(common)):
            takers = [k for part, some in common.items() if part.intersect(cell) is not None for k in some]
            if takers:
                yield cell, takers


def _rows(region: Region) -> tuple[int, int]:
    """Where a region starts and stops in the first dimension."""
    return (region.offset[0], region.offset[0] + region.shape[0]) if region.shape else (0, 1)


def _refined(region: Region, wanted: Sequence[Region]) -> Iterator[Region]:
    """`region` cut wherever one of `wanted`, boxes in it, begins or ends, in every dimension."""
    axes = []
    for d, (start, length) in enumerate(zip(region.offset, region.shape, strict=True)):
        edges = {w.offset[d] for w in wanted} | {w.offset[d] + w.shape[d] for w in wanted} | {start, start + length}
        axes.append(list(itertools.pairwise(sorted(edges))))
    for cell in itertools.product(*axes):
        yield Region(region.tensor, tuple(a for a, _ in cell), tuple(b - a for a, b in cell))


def _placed(drafts: Sequence[list[_Draft]], sinks: int, casts: list[Cast]) -> Plan:
    """The plan, with a place for every segment in the arenas."""
    shares: list[SourceShare] = []
    parts: list[list[Part]] = [[] for _ in range(sinks)]
    ends = [0] * sinks
    for source, drafted in enumerate(drafts):
        # What the same engine ranks take lies together, so that each of them gets it in one copy.
        drafted.sort(key=itemgetter(0))
        segments: list[Segment] = []
        end = 0
        for index, (takers, pieces, region, dtype, nbytes) in enumerate(drafted):
            segments.append(Segment(region, dtype, end, nbytes))
            for sink, piece in zip(takers, pieces, strict=True):
                parts[sink].append(Part(source, index, end, piece, region, dtype, ends[sink], nbytes))
                ends[sink] = _aligned(ends[sink] + nbytes)
            end = _aligned(end + nbytes)
        shares.append(SourceShare(segments, end))
    return Plan(shares, [SinkShare(p, end) for p, end in zip(parts, ends, strict=True)], casts)


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
