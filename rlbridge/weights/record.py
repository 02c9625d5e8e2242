"""Record where an engine's own loader puts each checkpoint tensor. No name tables.

The loader is run once over placeholder tensors on the meta device. Views of a placeholder (narrow, view, transpose, chunk ...)
are ordinary torch views, so torch itself keeps their offset and strides; a copy of one into a parameter is logged instead of
done. What is logged is the exact slice map of this rank: fused projections, tensor-parallel slices, replicated heads.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rlbridge.errors import LayoutError
from rlbridge.weights.layout import Piece, Region, TensorMeta, strided_boxes
from rlbridge.weights.boxes import Box, overlap

_aten = torch.ops.aten
_COPIES = {_aten.clone.default, _aten._to_copy.default, _aten.contiguous.default, _aten.detach_copy.default}


def record(
    load: Callable[[Iterable[tuple[str, torch.Tensor]]], Any],
    tensors: Sequence[TensorMeta],
    parameters: Mapping[str, torch.Tensor],
) -> list[Piece]:
    """The pieces of the published `tensors` that `load` copies into `parameters`, which stay untouched.

    Aliases (`TensorMeta.alias_of`) are given to the loader under their own name and recorded under the name they alias.

    Raises:
        LayoutError: an element of a parameter is not written, or is written twice; the loader computes with a tensor
            instead of copying it; the loader refuses a tensor.
    """
    recorder = _Recorder(tensors, parameters)
    try:
        with torch.no_grad(), recorder:
            load(recorder.placeholders())
    except LayoutError:
        raise
    except Exception as error:
        raise LayoutError(
            f"the engine's loader failed: {type(error).__name__}: {error}",
            tensor=recorder.current,
            todo="the trainer publishes a tensor that this engine does not take, or of another shape",
        ) from error
    pieces = recorder.pieces()
    _check_written_once(pieces, parameters, [t.name for t in tensors])
    return pieces


@dataclass(frozen=True)
class _Strided:
    """A view of one storage, in elements."""

    storage: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class _Composite:
    """A tensor that the loader built from others (cat, stack, clone): which box of it came from which view."""

    shape: tuple[int, ...]
    parts: list[tuple[tuple[int, ...], tuple[int, ...], _Strided]]


class _Recorder(TorchDispatchMode):
    def __init__(self, tensors: Sequence[TensorMeta], parameters: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.current: str | None = None
        self._tensors = tensors
        self._meta = {t.name: t for t in tensors}
        self._names: dict[int, str] = {}
        self._composites: dict[int, _Composite] = {}
        self._keep: list[torch.Tensor] = []  # storages are told apart by address, so none may be freed and reused
        self._parameters: dict[int, str] = {}
        for name, parameter in parameters.items():
            self._parameters.setdefault(parameter.untyped_storage()._cdata, name)
        self._writes: list[tuple[str, _Strided, str, _Strided]] = []

    def placeholders(self) -> Iterable[tuple[str, torch.Tensor]]:
        for tensor in self._tensors:
            self.current = tensor.name
            placeholder = torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype), device="meta")
            self._names[placeholder.untyped_storage()._cdata] = tensor.name
            self._keep.append(placeholder)
            yield tensor.name, placeholder

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _aten.copy_.default and self._tracked(args[1]):
            self._copied(args[0], args[1])
            return args[0]
        tracked = [t for t in _tensors_in(args) if self._tracked(t)]
        if not tracked:
            return func(*args, **kwargs)
        if func in _COPIES:
            out = torch.empty(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device="meta")
            return self._composite(out, [((0,) * out.dim(), tuple(out.shape), _strided(args[0]))])
        if func in (_aten.cat.default, _aten.stack.default):
            return self._joined(func, args, kwargs)
        out = func(*args, **kwargs)
        if all(self._tracked(t) for t in _tensors_in((out,))):
            return out
        raise LayoutError(
            f"the engine's loader computes with this tensor ({func}), which cannot be replayed as a copy",
            tensor=self._origin(tracked[0]),
            todo="this tensor has to be streamed through the engine's own update call",
        )

    def pieces(self) -> list[Piece]:
        found: dict[Piece, None] = {}
        for name, source, parameter, target in self._writes:
            canonical = self._meta[name].alias_of or name
            shape = self._meta[name].shape
            boxes = strided_boxes(shape, source.offset, source.shape, source.strides, target.strides, target.offset)
            for offset, box, strides, at in boxes:
                found[Piece(Region(canonical, offset, box), parameter, at, strides)] = None
        return list(found)

    def _tracked(self, value: Any) -> bool:
        if not isinstance(value, torch.Tensor) or value.device.type != "meta":
            return False
        key = value.untyped_storage()._cdata
        return key in self._names or key in self._composites

    def _origin(self, value: torch.Tensor) -> str | None:
        key = value.untyped_storage()._cdata
        return self._names.get(key, self.current)

    def _composite(self, out: torch.Tensor, parts: list[tuple[tuple[int, ...], tuple[int, ...], _Strided]]) -> torch.Tensor:
        self._composites[out.untyped_storage()._cdata] = _Composite(tuple(out.shape), parts)
        self._keep.append(out)
        return out

    def _joined(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        tensors, dim = args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0)
        if not all(self._tracked(t) for t in tensors):
            raise LayoutError("the engine's loader joins checkpoint tensors with others", tensor=self.current)
        if func is _aten.stack.default:
            dim = dim % (tensors[0].dim() + 1)
            tensors = [t.unsqueeze(dim) for t in tensors]
        dim = dim % tensors[0].dim()
        shape = list(tensors[0].shape)
        shape[dim] = sum(t.shape[dim] for t in tensors)
        parts, at = [], 0
        for tensor in tensors:
            offset = tuple(at if d == dim else 0 for d in range(len(shape)))
            parts.append((offset, tuple(tensor.shape), _strided(tensor)))
            at += tensor.shape[dim]
        return self._composite(torch.empty(shape, dtype=tensors[0].dtype, device="meta"), parts)

    def _copied(self, target: torch.Tensor, source: torch.Tensor) -> None:
        if target.shape != source.shape:
            raise LayoutError(
                f"the engine's loader copies shape {tuple(source.shape)} into shape {tuple(target.shape)}",
                tensor=self._origin(source),
            )
        name = self._parameters.get(target.untyped_storage()._cdata)
        if name is None:
            raise LayoutError(
                "the engine's loader copies into something that is none of its parameters", tensor=self._origin(source)
            )
        self._resolve(_strided(source), name, _strided(target))

    def _resolve(self, source: _Strided, parameter: str, target: _Strided) -> None:
        """Log a write, taken back through everything that the loader joined or cloned."""
        if source.storage in self._names:
            self._writes.append((self._names[source.storage], source, parameter, target))
            return
        composite = self._composites[source.storage]
        boxes = strided_boxes(composite.shape, source.offset, source.shape, source.strides, target.strides, target.offset)
        for offset, shape, strides, at in boxes:
            for part_offset, part_shape, origin in composite.parts:
                common = Region("", offset, shape).intersect(Region("", part_offset, part_shape))
                if common is None:
                    continue
                out_at = at + sum((c - o) * s for c, o, s in zip(common.offset, offset, strides, strict=True))
                in_at = origin.offset + sum(
                    (c - o) * s for c, o, s in zip(common.offset, part_offset, origin.strides, strict=True)
                )
                self._resolve(
                    _Strided(origin.storage, in_at, common.shape, origin.strides),
                    parameter,
                    _Strided(target.storage, out_at, common.shape, strides),
                )


def _strided(tensor: torch.Tensor) -> _Strided:
    return _Strided(
        tensor.untyped_storage()._cdata, int(tensor.storage_offset()), tuple(tensor.shape), tuple(tensor.stride())
    )


def _tensors_in(values: Iterable[Any]) -> Iterable[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors_in(value)


def _check_written_once(
    pieces: Sequence[Piece], parameters: Mapping[str, torch.Tensor], published: Sequence[str]
) -> None:
    """Every element of every parameter is written exactly once; parameters that share storage count as one."""
    by_storage: dict[str, list[tuple[Box, Piece]]] = {}
    for piece in pieces:
        tensor = parameters[piece.storage]
        by_storage.setdefault(piece.storage, []).extend((box, piece) for box in _target_boxes(piece, tensor))
    seen: set[int] = set()
    for name, tensor in parameters.items():
        key = tensor.untyped_storage()._cdata
        if key in seen:
            continue
        seen.add(key)
        written = by_storage.get(name, [])
        twice = overlap([box for box, _ in written])
        if twice is not None:
            first, second = (written[i][1].region for i in twice)
            raise LayoutError(f"the parameter {name!r} is written twice: by {first} and by {second}", tensor=first.tensor)
        count = sum(box.numel for box, _ in written)
        if count != tensor.numel():
            near = difflib.get_close_matches(name, published, n=3, cutoff=0.5)
            raise LayoutError(
                f"the engine's parameter {name!r} of shape {tuple(tensor.shape)} gets {count} of its {tensor.numel()} elements"
                " from the trainer",
                tensor=name,
                todo=f"nearest published names: {', '.join(near)}" if near else "no published name is like it",
            )


def _target_boxes(piece: Piece, parameter: torch.Tensor) -> Iterable[Box]:
    base = parameter.storage_offset()
    boxes = strided_boxes(
        tuple(parameter.shape), piece.offset - base, piece.region.shape, piece.strides, (0,) * len(piece.strides), 0
    )
    return [Box(offset, shape) for offset, shape, _, _ in boxes]
