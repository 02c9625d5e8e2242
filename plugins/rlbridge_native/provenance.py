"""Where the values of a tensor come from: placeholders followed through views and copies, without any values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlbridge.errors import LayoutError
from rlbridge.weights.layout import Piece, Region, contiguous_strides, strided_boxes

aten = torch.ops.aten


class Provenance(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows meta placeholders through whatever runs under it, and tells of any result where its elements lie in them.

    A view is told by its storage. Out-of-place copies (clone, contiguous, cat, stack) are followed; whatever computes new
    values is not, but it is still known which placeholders they were computed from.

    Args:
        roots: Meta tensors by name.
    """

    def __init__(self, roots: Mapping[str, torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._alive: list[torch.Tensor] = []  # a storage's address names it only as long as it lives
        self._pieces: dict[int, tuple[tuple[int, ...], list[Piece]]] = {}
        self._depends: dict[int, frozenset[str]] = {}
        self._roots: dict[int, str] = {}
        for name, root in roots.items():
            self._roots[self._key(root)] = name
            self._depends[self._key(root)] = frozenset([name])
            self._alive.append(root)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        if func._schema.is_mutable:
            for tensor in inputs:
                self._forget(tensor)
            return out
        depends = frozenset[str]().union(*(self.roots_of(t) for t in inputs))
        for tensor in outputs:
            if self._key(tensor) not in self._depends:
                self._alive.append(tensor)
                self._depends[self._key(tensor)] = depends
                self._note_copy(func.overloadpacket, args, kwargs, tensor)
        return out

    def roots_of(self, tensor: torch.Tensor) -> frozenset[str]:
        """The placeholders that `tensor` was made from."""
        return self._depends.get(self._key(tensor), frozenset())

    def pieces_of(self, tensor: torch.Tensor, name: str) -> list[Piece]:
        """Where each box of `tensor` lies in the placeholders; the pieces' regions are boxes of checkpoint tensor `name`.

        Raises:
            LayoutError: some of its values were computed.
        """
        pieces = list(self._resolve(tensor, name))
        if sum(piece.region.numel for piece in pieces) != tensor.numel():
            raise LayoutError(
                f"{name!r} is not a rearrangement of the model's parameters: its values are computed", tensor=name
            )
        return pieces

    def _resolve(self, tensor: torch.Tensor, name: str = "") -> Iterator[Piece]:
        shape, start = tuple(tensor.shape), int(tensor.storage_offset())
        root = self._roots.get(self._key(tensor))
        if root is not None:
            yield Piece(Region(name, (0,) * len(shape), shape), root, start, tuple(tensor.stride()))
            return
        base, parts = self._pieces.get(self._key(tensor), ((), []))
        yield from compose(Piece(Region(name, (0,) * len(shape), shape), "", start, tuple(tensor.stride())), base, parts)

    def _note_copy(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: torch.Tensor) -> None:
        if not out.is_contiguous():
            return
        if op in (aten.clone, aten.contiguous, aten._to_copy) and args[0].dtype == out.dtype:
            sources, dim = [args[0]], 0
        elif op in (aten.cat, aten.stack):
            dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % max(out.dim(), 1)
            sources = [t.unsqueeze(dim) for t in args[0]] if op is aten.stack else list(args[0])
        else:
            return
        parts, shift = [], 0
        for source in sources:
            for piece in self._resolve(source):
                offset = tuple(o + shift * (d == dim) for d, o in enumerate(piece.region.offset))
                parts.append(Piece(Region("", offset, piece.region.shape), piece.storage, piece.offset, piece.strides))
            shift += source.shape[dim] if source.dim() else 0
        self._pieces[self._key(out)] = (tuple(out.shape), parts)

    def _forget(self, tensor: torch.Tensor) -> None:
        self._roots.pop(self._key(tensor), None)
        self._pieces.pop(self._key(tensor), None)

    @staticmethod
    def _key(tensor: torch.Tensor) -> int:
        return int(tensor.untyped_storage()._cdata)


def compose(view: Piece, base: Sequence[int], parts: Sequence[Piece]) -> Iterator[Piece]:
    """Where a view of a row-major tensor of shape `base` lies, given where boxes of that tensor lie.

    Args:
        view: A box of a checkpoint tensor, with its offset and strides in the row-major tensor.
        base: The row-major tensor's shape.
        parts: Boxes of the row-major tensor, disjoint. What no part covers is left out.

    Raises:
        LayoutError: the view is no union of boxes of the row-major tensor.
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
