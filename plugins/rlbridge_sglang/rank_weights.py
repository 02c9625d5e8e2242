"""An SGLang model as a sink: its own `load_weights` says where each checkpoint tensor goes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rlbridge.errors import LayoutError
from rlbridge.roles.sink import RecordedSink
from rlbridge.weights.layout import Layout, TensorMeta


class ModelSink(RecordedSink):
    """The parameters of one tensor-parallel rank.

    SGLang's loaders drop what they do not know, and pad what is too short, with no more than a warning: both are refused here.

    Args:
        model: The rank's model.
        tensor_parallel: The number of ranks.
    """

    def __init__(self, model: Any, tensor_parallel: int = 1) -> None:
        super().__init__(model.load_weights, {name: parameter.data for name, parameter in model.named_parameters()})
        self._tensor_parallel = tensor_parallel

    def record(self, tensors: Sequence[TensorMeta]) -> Layout:
        layout = super().record(tensors)
        taken: dict[str, int] = {}
        for region in layout.regions:
            taken[region.tensor] = taken.get(region.tensor, 0) + region.numel
        for meta in tensors:
            if meta.alias_of is None:
                self._check_taken(meta, taken.get(meta.name, 0))
        return layout

    def _check_taken(self, meta: TensorMeta, taken: int) -> None:
        """All ranks together have to take all of a tensor, so each takes its share at least.

        Raises:
            LayoutError: they do not.
        """
        size = math.prod(meta.shape)
        if size and not taken:
            raise LayoutError(
                f"the engine's loader drops this tensor of shape {tuple(meta.shape)}",
                tensor=meta.name,
                todo="the trainer publishes a tensor that the engine's model has not",
            )
        if taken * self._tensor_parallel < size:
            raise LayoutError(
                f"the engine's loader takes {taken} of the {size} elements of this tensor of shape {tuple(meta.shape)}",
                tensor=meta.name,
                todo="the trainer publishes a tensor of another shape than the engine's model has",
            )
