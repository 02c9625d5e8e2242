"""An SGLang model as a sink: its own `load_weights` says where each checkpoint tensor goes."""

from __future__ import annotations

from typing import Any

import torch

from rlbridge.roles.sink import RecordedSink


class ModelSink(RecordedSink):
    """The parameters of one tensor-parallel rank.

    Args:
        model: The rank's model, with the weights that it was loaded with.
    """

    def __init__(self, model: Any) -> None:
        self.loaded = {name: parameter.data for name, parameter in model.named_parameters()}
        super().__init__(model.load_weights, self.loaded)

    def scramble(self) -> None:
        """Before anything is recorded padding is known by its zeros alone, and no sync would write them again."""
        if self._pieces:
            super().scramble()
            return
        with torch.no_grad():
            for tensor in self.loaded.values():
                tensor.masked_fill_(tensor != 0, 7)
