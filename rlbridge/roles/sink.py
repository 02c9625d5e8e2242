"""What an engine rank gives the subscriber: where each part of each checkpoint tensor goes, and the installing of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from rlbridge.errors import LayoutError
from rlbridge.weights.layout import Layout, Piece, Region, TensorMeta
from rlbridge.weights.record import record
from rlbridge.weights.threads import copy_all

Loader = Callable[[Iterable[tuple[str, torch.Tensor]]], Any]


class WeightSink(ABC):
    """One engine rank's parameters. `record` and `bind` are called once an epoch, `install` once a version."""

    @abstractmethod
    def record(self, tensors: Sequence[TensorMeta]) -> Layout:
        """The regions of the published `tensors` that this rank needs; each tensor's dtype is that of its parameter here.

        Raises:
            LayoutError: a parameter is left unwritten or written twice, or the engine's loader refuses a tensor.
        """

    @abstractmethod
    def bind(self, regions: Sequence[tuple[int, Region]]) -> None:
        """Learn which boxes `install` is going to write: (index of the recorded region, a box inside it)."""

    @abstractmethod
    def install(self, sources: Sequence[torch.Tensor]) -> None:
        """Write the live parameters: one source a bound box, of its shape and the parameter's dtype."""

    @abstractmethod
    def live(self) -> list[torch.Tensor]:
        """Views of the live parameters, one a bound box, for digests of what is in fact served."""

    @abstractmethod
    def scramble(self) -> None:
        """Fill every parameter with values that are no weights. For tests: what a sync does not write shows."""


class RecordedSink(WeightSink):
    """A sink that records the engine's own loader, and installs straight into the parameters.

    Args:
        load: The engine's loader: is given (checkpoint name, tensor) pairs and copies them into `parameters`.
        parameters: Everything that a sync has to write, by name; shared storage (tied embeddings) counts once.
        refresh: Recomputes what the engine derives from its parameters; called after each install.
    """

    def __init__(self, load: Loader, parameters: Mapping[str, torch.Tensor], refresh: Callable[[], None] | None = None) -> None:
        self._load = load
        self._parameters = dict(parameters)
        self._refresh = refresh
        self._pieces: list[Piece] = []
        self._views: list[torch.Tensor] = []
        self._pointers: dict[str, int] = {}

    def record(self, tensors: Sequence[TensorMeta]) -> Layout:
        self._pieces = record(self._load, tensors, self._parameters)
        dtypes = {p.region.tensor: str(self._parameters[p.storage].dtype).removeprefix("torch.") for p in self._pieces}
        metas = [TensorMeta(t.name, t.shape, dtypes.get(t.name, t.dtype), t.alias_of) for t in tensors]
        return Layout(metas, [piece.region for piece in self._pieces])

    def bind(self, regions: Sequence[tuple[int, Region]]) -> None:
        self._views = [self._pieces[index].narrow(region).view(self._parameters) for index, region in regions]
        self._pointers = {name: tensor.data_ptr() for name, tensor in self._parameters.items()}

    def install(self, sources: Sequence[torch.Tensor]) -> None:
        views = self.live()
        if len(sources) != len(views):
            raise LayoutError(f"{len(sources)} boxes to install, {len(views)} bound")
        copy_all(views, sources)
        if self._refresh is not None:
            self._refresh()

    def live(self) -> list[torch.Tensor]:
        for name, pointer in self._pointers.items():
            if self._parameters[name].data_ptr() != pointer:
                raise LayoutError(
                    f"the engine has moved its parameter {name!r} since it was bound", tensor=name, todo="begin a new epoch"
                )
        return self._views

    def scramble(self) -> None:
        """All that was recorded, which is everything but padding; where nothing was, every parameter."""
        recorded = [piece.view(self._parameters) for piece in self._pieces]
        with torch.no_grad():
            for tensor in recorded or self._parameters.values():
                tensor.fill_(7)
