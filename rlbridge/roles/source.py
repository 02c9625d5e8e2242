"""What a trainer rank gives the publisher: a layout, and a snapshot of its current weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from rlbridge.errors import LayoutError
from rlbridge.weights.layout import Layout, Piece, Region, TensorMeta, whole
from rlbridge.weights.threads import copy_all


class WeightSource(ABC):
    """One trainer rank's part of the weights. `bind` is called once an epoch, `snapshot` once a version."""

    @abstractmethod
    def layout(self) -> Layout:
        """The regions that this rank owns, and their tensors. May be collective."""

    @abstractmethod
    def bind(self, regions: Sequence[Region]) -> None:
        """Learn which boxes, each inside one region of the layout, `snapshot` is going to copy."""

    @abstractmethod
    def snapshot(self, destinations: Sequence[torch.Tensor]) -> None:
        """Copy the current weights: one destination a bound region, of its shape, in the wire dtype. May be collective."""

    def live(self) -> list[torch.Tensor]:
        """The parameters' own memory, one view a bound region: what `publish: barrier` lets the peers read in place.

        Raises:
            LayoutError: this source has no storage that is the weights.
        """
        raise LayoutError(
            f"{type(self).__name__} gathers its tensors and has no storage to read in place", todo="use sync.publish=snapshot"
        )


class ShardedSource(WeightSource):
    """Local shards straight from storage, no gather: for trainers whose shards are boxes of checkpoint tensors.

    Args:
        tensors: Every checkpoint tensor of the model, aliases included; the same on every rank.
        pieces: Where the boxes that this rank owns lie.
        storages: Gives the current tensors by the pieces' storage names. Called at each snapshot, so that an optimizer that
            replaces a parameter's storage is followed.
    """

    def __init__(
        self, tensors: Sequence[TensorMeta], pieces: Sequence[Piece], storages: Callable[[], Mapping[str, torch.Tensor]]
    ) -> None:
        self._layout = Layout(list(tensors), [piece.region for piece in pieces])
        self._pieces: dict[str, list[Piece]] = {}
        for piece in pieces:
            self._pieces.setdefault(piece.region.tensor, []).append(piece)
        self._storages = storages
        self._bound: list[Piece] = []
        self._views: list[torch.Tensor] = []
        self._pointers: dict[str, int] = {}

    def layout(self) -> Layout:
        return self._layout

    def bind(self, regions: Sequence[Region]) -> None:
        self._bound = [self._piece_of(region).narrow(region) for region in regions]
        self._pointers = {}

    def snapshot(self, destinations: Sequence[torch.Tensor]) -> None:
        copy_all(destinations, self.live())

    def live(self) -> list[torch.Tensor]:
        storages = self._storages()
        used = {piece.storage for piece in self._bound}
        pointers = {name: storages[name].untyped_storage().data_ptr() for name in used}
        if pointers != self._pointers:
            self._views = [piece.view(storages) for piece in self._bound]
            self._pointers = pointers
        return self._views

    def _piece_of(self, region: Region) -> Piece:
        for piece in self._pieces.get(region.tensor, []):
            if piece.region.intersect(region) == region:
                return piece
        raise LayoutError(f"the plan asks for {region}, which this rank does not own", tensor=region.tensor)


class GatheredSource(WeightSource):
    """Full checkpoint tensors from a collective exporter; owners are spread over the ranks by bytes, so all ranks send.

    Args:
        tensors: Every checkpoint tensor, in the order in which `export` yields them; the same on every rank.
        export: Yields (name, full tensor) on every rank at once. A tensor need only live until the next is asked for.
    """

    def __init__(
        self, tensors: Sequence[TensorMeta], export: Callable[[], Iterator[tuple[str, torch.Tensor]]], rank: int, ranks: int
    ) -> None:
        from rlbridge.weights.plan import spread

        distinct = [t for t in tensors if t.alias_of is None]
        owners = spread(distinct, ranks)
        self._layout = Layout(list(tensors), [whole(t) for t, owner in zip(distinct, owners, strict=True) if owner == rank])
        self._export = export
        self._bound: dict[str, list[tuple[int, Region]]] = {}

    def layout(self) -> Layout:
        return self._layout

    def bind(self, regions: Sequence[Region]) -> None:
        self._bound = {}
        for index, region in enumerate(regions):
            self._bound.setdefault(region.tensor, []).append((index, region))

    def snapshot(self, destinations: Sequence[torch.Tensor]) -> None:
        missing = set(self._bound)
        with torch.no_grad():
            for name, tensor in self._export():
                for index, region in self._bound.get(name, ()):
                    box = tuple(slice(o, o + n) for o, n in zip(region.offset, region.shape, strict=True))
                    destinations[index].copy_(tensor[box])
                missing.discard(name)
        if missing:
            raise LayoutError(f"the trainer's exporter did not yield {sorted(missing)[0]!r}", tensor=sorted(missing)[0])
