"""Where the values of a tensor come from: placeholders followed through views and copies, without any values.

Views are told by their storage, so torch itself keeps their offset and strides, whichever op made them. Out-of-place copies
(clone, contiguous, to, cat, stack) are followed; whatever else makes new values is known by its op and by the placeholders that
went into it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlbridge.errors import LayoutError
from rlbridge.weights.layout import Piece, Region, compose

aten = torch.ops.aten


@dataclass
class _Origin:
    """What is known of a storage.

    Attributes:
        tensor: The tensor that it was made with. Held, since a storage's address names it only as long as it lives.
        roots: The placeholders that went into it.
        parts: Where boxes of the row-major `tensor` lie in the placeholders; None for a placeholder itself.
        dtypes: Those that its values have passed through.
        computed_by: The op that made new values, or "".
    """

    tensor: torch.Tensor
    roots: frozenset[str]
    parts: list[Piece] | None
    dtypes: frozenset[torch.dtype]
    computed_by: str = ""


class Provenance(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows placeholders through whatever runs under it, and tells of any result where its elements lie in them.

    Args:
        placeholders: Tensors on the meta device, by name. Several names may share one.
    """

    def __init__(self, placeholders: Mapping[str, torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._origins: dict[int, _Origin] = {}
        for name, tensor in placeholders.items():
            self._origins[storage_key(tensor)] = _Origin(tensor, frozenset([name]), None, frozenset([tensor.dtype]))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        origins = [o for t in tensors_in((args, kwargs)) if (o := self._origins.get(storage_key(t))) is not None]
        if not origins:
            return func(*args, **kwargs)
        roots = frozenset[str]().union(*(o.roots for o in origins))
        copied = None if func._schema.is_mutable else self._copied(func, args, kwargs)
        if copied is not None:
            self._origins[storage_key(copied.tensor)] = copied
            return copied.tensor
        try:
            out = func(*args, **kwargs)
        except Exception as error:
            error.add_note(f"in {func} of {', '.join(sorted(roots))}")
            raise
        changed = list(written(func, args, kwargs))
        new = [t for t in tensors_in(out) if storage_key(t) not in self._origins]
        computed_by = next((o.computed_by for o in origins if o.computed_by), str(func))
        for tensor in changed + new:
            self._origins[storage_key(tensor)] = _Origin(tensor, roots, [], frozenset([tensor.dtype]), computed_by)
        return out

    def roots_of(self, tensor: torch.Tensor) -> frozenset[str]:
        """The placeholders that `tensor` was made from."""
        origin = self._origins.get(storage_key(tensor))
        return origin.roots if origin is not None else frozenset()

    def computed_by(self, tensor: torch.Tensor) -> str:
        """The op that made values of `tensor` which no placeholder holds, or "" if all were copied."""
        origin = self._origins.get(storage_key(tensor))
        if origin is None:
            return "nothing of a placeholder went into it"
        return "a view as another dtype" if tensor.dtype != origin.tensor.dtype else origin.computed_by

    def dtypes_of(self, tensor: torch.Tensor) -> frozenset[torch.dtype]:
        """The dtypes that the values of `tensor` have passed through, its own included."""
        return self._origins[storage_key(tensor)].dtypes

    def pieces_of(self, tensor: torch.Tensor, name: str) -> list[Piece]:
        """Where each box of `tensor` lies in the placeholders; the pieces' regions are boxes of a tensor called `name`.

        Raises:
            LayoutError: some of its values were computed, or rounded to another dtype.
        """
        computed_by = self.computed_by(tensor) or ("a change of dtype" if len(self.dtypes_of(tensor)) > 1 else "")
        if computed_by:
            roots = ", ".join(sorted(self.roots_of(tensor)))
            raise LayoutError(
                f"{name!r} is not a rearrangement of {roots}: its values are computed ({computed_by})", tensor=name
            )
        return list(self.boxes_of(tensor, name))

    def boxes_of(self, tensor: torch.Tensor, name: str) -> Iterator[Piece]:
        """`pieces_of`, for a tensor that is known not to be computed, whatever dtypes it has passed through."""
        shape = tuple(tensor.shape)
        origin = self._origins[storage_key(tensor)]
        view = Piece(Region(name, (0,) * len(shape), shape), "", int(tensor.storage_offset()), tuple(tensor.stride()))
        if origin.parts is None:
            yield Piece(view.region, next(iter(origin.roots)), view.offset, view.strides)
        else:
            yield from compose(view, tuple(origin.tensor.shape), origin.parts)

    def _copied(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Origin | None:
        """The result of an op that only copies, row-major and on the meta device; None if it does more than that."""
        op, dim = func.overloadpacket, 0
        if op in (aten.clone, aten._to_copy):
            sources, shape, dtype = [args[0]], args[0].shape, kwargs.get("dtype") or args[0].dtype
        elif op in (aten.cat, aten.stack) and all(self.roots_of(t) for t in args[0]):
            made = func(*args, **kwargs)
            sources, shape, dtype = list(args[0]), made.shape, made.dtype
            dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % made.dim()
            sources = [t.unsqueeze(dim) for t in sources] if op is aten.stack else sources
        else:
            return None
        if any(self.computed_by(t) for t in sources):
            return None
        roots = frozenset[str]().union(*(self.roots_of(t) for t in sources))
        dtypes = frozenset([dtype]).union(*(self.dtypes_of(t) for t in sources))
        return _Origin(torch.empty(shape, dtype=dtype, device="meta"), roots, list(self._joined(sources, dim)), dtypes)

    def _joined(self, sources: Sequence[torch.Tensor], dim: int) -> Iterator[Piece]:
        shift = 0
        for source in sources:
            if source.numel() == 0:
                continue  # torch joins an empty tensor of one dimension with anything
            for piece in self.boxes_of(source, ""):
                offset = tuple(o + shift * (d == dim) for d, o in enumerate(piece.region.offset))
                yield Piece(Region("", offset, piece.region.shape), piece.storage, piece.offset, piece.strides)
            shift += source.shape[dim] if source.dim() else 0


def storage_key(tensor: torch.Tensor) -> int:
    """What names the memory of `tensor` as long as that lives."""
    return int(tensor.untyped_storage()._cdata)


def written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[torch.Tensor]:
    """The tensors that a call of `func` changes in place."""
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from tensors_in(args[index] if index < len(args) else kwargs.get(argument.name))


def tensors_in(values: Any) -> list[torch.Tensor]:
    """The tensors in an op's arguments or results."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]
