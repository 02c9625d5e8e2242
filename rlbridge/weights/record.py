"""Record where an engine's own loader puts each checkpoint tensor. No name tables.

The loader is run once over placeholders on the meta device. A copy of one into a parameter is logged instead of done, with
where its elements lie in the checkpoint tensor. The log is the exact slice map of this rank: fused projections, tensor-parallel
slices, replicated heads. What the loader sets to zero beside them is padding, of a vocabulary for example, and stays as it is.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlbridge.errors import LayoutError
from rlbridge.weights.boxes import overlap
from rlbridge.weights.layout import Piece, Region, TensorMeta, contiguous_strides, strided_boxes
from rlbridge.weights.provenance import Provenance, aten, storage_key, tensors_in, written

_STREAM = "this tensor has to be streamed through the engine's own update call"


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
    recorder = _Recorder(tensors, _distinct(parameters))
    try:
        with torch.no_grad(), recorder:
            load(recorder.placeholders())
    except LayoutError:
        raise
    except Exception as error:
        notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
        raise LayoutError(
            f"the engine's loader failed: {type(error).__name__}: {error}{notes}",
            tensor=recorder.current,
            todo="the trainer publishes a tensor that this engine does not take, or of another shape",
        ) from error
    recorder.check_parameters(parameters)
    return list(recorder.pieces)


@dataclass(frozen=True)
class _Parameter:
    """A parameter as a box of a row-major frame: the strides of its storage, the outermost first.

    Attributes:
        frame: Shape of the row-major tensor, from the parameter's first element on, that the parameter is the corner of.
        box: Shape of that corner.
    """

    name: str
    tensor: torch.Tensor
    frame: tuple[int, ...]
    box: tuple[int, ...]

    def boxes(self, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Iterator[Region]:
        """The boxes of the frame that a view of the storage consists of."""
        found = strided_boxes(self.frame, offset - int(self.tensor.storage_offset()), shape, strides, strides, 0)
        for at, box, _, _ in found:
            yield Region(self.name, at, box)

    def holds(self, view: torch.Tensor) -> bool:
        """Whether all elements of `view`, of the same storage, belong to the parameter."""
        first = int(view.storage_offset()) - int(self.tensor.storage_offset())
        if first < 0 or first + _extent(view) > _extent(self.tensor):
            return False
        boxes = self.boxes(int(view.storage_offset()), tuple(view.shape), tuple(view.stride()))
        return all(o + n <= m for box in boxes for o, n, m in zip(box.offset, box.shape, self.box, strict=True))


class _Recorder(Provenance):  # type: ignore[no-untyped-call]
    def __init__(self, tensors: Sequence[TensorMeta], parameters: dict[int, list[_Parameter]]) -> None:
        self._metas = {t.name: t for t in tensors}
        self._given = {t.name: torch.empty(t.shape, dtype=getattr(torch, t.dtype), device="meta") for t in tensors}
        super().__init__(self._given)
        self.current: str | None = None
        self.pieces: dict[Piece, None] = {}
        self._padding: dict[Region, None] = {}
        self._parameters = parameters

    def placeholders(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self._given.items():
            self.current = name
            yield name, tensor

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        targets = list(written(func, args, kwargs or {}))
        if func.overloadpacket is aten.copy_ and self.roots_of(args[1]):
            self._write(args[0], args[1])
            return args[0]
        if not any(storage_key(t) in self._parameters for t in targets):
            return super().__torch_dispatch__(func, types, args, kwargs)
        if roots := sorted(root for t in tensors_in((args, kwargs)) for root in self.roots_of(t)):
            raise _computed(func, roots)
        if func.overloadpacket is aten.zero_ or (func.overloadpacket is aten.fill_ and args[1] == 0):
            self._pad(args[0])
        return targets[0] if func._schema.returns else None  # parameters stay untouched

    def check_parameters(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """Every element of every parameter is written exactly once."""
        for name, tensor in parameters.items():
            if storage_key(tensor) not in self._parameters:
                raise LayoutError(
                    f"the engine's loader puts another tensor in the place of the parameter {name!r}", tensor=name
                )
        pieces: dict[str, list[Piece]] = {}
        for piece in self.pieces:
            pieces.setdefault(piece.storage, []).append(piece)
        self._check_one_dtype(parameters)
        for parameter in (p for shared in self._parameters.values() for p in shared):
            padding = [box for box in self._padding if box.tensor == parameter.name]
            _check_written_once(parameter, pieces.get(parameter.name, []), padding, list(self._metas))

    def _check_one_dtype(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """A tensor travels in one dtype, so all parameters that it goes to have that."""
        first: dict[str, str] = {}
        for piece in self.pieces:
            a, b = first.setdefault(piece.region.tensor, piece.storage), piece.storage
            if parameters[a].dtype != parameters[b].dtype:
                raise LayoutError(
                    f"the engine holds this tensor as {parameters[a].dtype} ({a!r}) and as {parameters[b].dtype} ({b!r})",
                    tensor=piece.region.tensor,
                )

    def _write(self, target: torch.Tensor, source: torch.Tensor) -> None:
        roots = sorted(self.roots_of(source))
        computed_by = self.computed_by(source)
        if computed_by:
            raise _computed(computed_by, roots)
        try:
            source = source.expand(target.shape)
        except RuntimeError as error:
            shapes = f"shape {tuple(source.shape)} into shape {tuple(target.shape)}"
            raise LayoutError(f"the engine's loader copies {shapes}", tensor=roots[0]) from error
        if target.numel() == 0:
            return
        parameter = next((p for p in self._parameters.get(storage_key(target), ()) if p.holds(target)), None)
        if parameter is None or parameter.tensor.dtype != target.dtype:
            raise LayoutError("the engine's loader copies into something that is none of its parameters", tensor=roots[0])
        self._check_rounding(source, target.dtype, roots)
        try:
            self.pieces.update(dict.fromkeys(self._pieces(source, target, parameter.name)))
        except LayoutError as error:
            error.at(tensor=roots[0])
            raise

    def _pad(self, target: torch.Tensor) -> None:
        """Remember what is set to zero, unless it is a whole parameter: that is one that nothing was written to yet."""
        for parameter in self._parameters.get(storage_key(target), ()):
            if 0 < target.numel() < parameter.tensor.numel() and parameter.holds(target):
                boxes = parameter.boxes(int(target.storage_offset()), tuple(target.shape), tuple(target.stride()))
                self._padding.update(dict.fromkeys(boxes))

    def _pieces(self, source: torch.Tensor, target: torch.Tensor, parameter: str) -> Iterator[Piece]:
        shape = tuple(target.shape)
        into = Piece(Region("", (0,) * len(shape), shape), parameter, int(target.storage_offset()), tuple(target.stride()))
        for origin in self.boxes_of(source, ""):
            meta, part = self._metas[origin.storage], into.narrow(origin.region)
            boxes = strided_boxes(meta.shape, origin.offset, origin.region.shape, origin.strides, part.strides, part.offset)
            for offset, box, strides, at in boxes:
                yield Piece(Region(meta.alias_of or meta.name, offset, box), parameter, at, strides)

    def _check_rounding(self, source: torch.Tensor, dtype: torch.dtype, roots: Sequence[str]) -> None:
        between = self.dtypes_of(source) - {dtype} - {self._given[root].dtype for root in roots}
        if between:
            raise LayoutError(
                f"the engine's loader rounds this tensor to {next(iter(between))} on its way to a parameter of {dtype}",
                tensor=roots[0],
                todo=_STREAM,
            )


def _computed(op: object, roots: Sequence[str]) -> LayoutError:
    return LayoutError(
        f"the engine's loader computes with this tensor ({op}), which cannot be replayed as a copy",
        tensor=roots[0],
        todo=_STREAM,
    )


def _distinct(parameters: Mapping[str, torch.Tensor]) -> dict[int, list[_Parameter]]:
    """The parameters by storage; one that lies within another (tied weights) is the other's."""
    found: dict[int, list[_Parameter]] = {}
    for name, tensor in sorted(parameters.items(), key=lambda item: -item[1].numel()):
        shared = found.setdefault(storage_key(tensor), [])
        if tensor.numel() and not any(p.holds(tensor) for p in shared):
            shared.append(_framed(name, tensor))
    return found


def _framed(name: str, tensor: torch.Tensor) -> _Parameter:
    dims = sorted(((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1), reverse=True)
    strides, box = [s for s, _ in dims], [n for _, n in dims]
    frame = box[:1] + [outer // max(inner, 1) for outer, inner in itertools.pairwise(strides)]
    if strides and strides[-1] > 1:
        frame, box = [*frame, strides[-1]], [*box, 1]
    if list(contiguous_strides(frame))[: len(strides)] != strides or any(n > m for n, m in zip(box, frame, strict=True)):
        shape = f"shape {tuple(tensor.shape)} and strides {tuple(tensor.stride())}"
        raise LayoutError(f"the engine's parameter {name!r} overlaps itself in memory: {shape}", tensor=name)
    return _Parameter(name, tensor, tuple(frame), tuple(box))


def _extent(tensor: torch.Tensor) -> int:
    """Elements of the storage from the tensor's first to its last."""
    return 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0


def _check_written_once(
    parameter: _Parameter, pieces: Sequence[Piece], padding: Sequence[Region], published: Sequence[str]
) -> None:
    name, tensor = parameter.name, parameter.tensor
    boxes = [
        (box, piece.region) for piece in pieces for box in parameter.boxes(piece.offset, piece.region.shape, piece.strides)
    ]
    twice = overlap([box for box, _ in boxes])
    if twice is not None:
        first, second = (boxes[i][1] for i in twice)
        raise LayoutError(f"the parameter {name!r} is written twice: by {first} and by {second}", tensor=first.tensor)
    count = sum(box.numel for box, _ in boxes)
    padded = sum(box.numel - _shared(box, [written for written, _ in boxes]) for box in padding)
    if count + padded != tensor.numel():
        near = difflib.get_close_matches(name, published, n=3, cutoff=0.5)
        raise LayoutError(
            f"the engine's parameter {name!r} of shape {tuple(tensor.shape)} gets {count} of its {tensor.numel()} elements"
            " from the trainer",
            tensor=name,
            todo=f"nearest published names: {', '.join(near)}" if near else "no published name is like it",
        )


def _shared(box: Region, others: Sequence[Region]) -> int:
    """How many elements of `box` lie in `others`, which have none in common."""
    return sum(part.numel for other in others if (part := box.intersect(other)) is not None)
