"""How one rank's parameters take weights: copied to where vLLM's loader puts them, or loaded anew by vLLM.

Copying is right where what lies in each parameter is what the loader was seen to put there. Kernels may keep weights in another
form, of the same shape even, so that is not believed but looked at: the parameters of a model that vLLM has just loaded are
compared with the files that it was loaded from.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from rlbridge.errors import LayoutError
from rlbridge.roles.sink import RecordedSink, WeightSink
from rlbridge.weights.digest import digests
from rlbridge.weights.layout import Layout, Piece, TensorMeta
from rlbridge.weights.model_files import Checkpoint, checkpoint_of
from rlbridge.weights.record import record
from rlbridge_vllm.streamed import StreamedSink

_log = logging.getLogger(__name__)

_ROWS = 16
"""Rows of each piece that are compared."""


def choose_sink(worker: Any, install: str, path: str) -> tuple[WeightSink, str]:
    """The sink of a worker whose model is just loaded from `path`, and whether it is "direct" or "streamed".

    Raises:
        LayoutError: `install` is direct, and a tensor cannot be copied; it is named.
    """
    checkpoint = checkpoint_of(path)
    if install != "streamed":
        try:
            return DirectSink(worker.get_model(), checkpoint, lambda: _derive_anew(worker)), "direct"
        except LayoutError as error:
            if install == "direct":
                error.todo = "set generator.install to auto or streamed: vLLM then loads the weights anew"
                raise error.at(role="generator") from error
            _log.info("weights are streamed: %s", error)
    return StreamedSink(worker, checkpoint), "streamed"


class DirectSink(RecordedSink):
    """Copies, for a model that is just loaded from `checkpoint`.

    Raises:
        LayoutError: a tensor is computed with, or a parameter does not hold what the loader puts there.
    """

    def __init__(self, model: Any, checkpoint: Checkpoint, refresh: Callable[[], None]) -> None:
        parameters = _parameters(model)
        super().__init__(model.load_weights, parameters, refresh)
        self._model, self._checkpoint = model, checkpoint
        pieces = record(model.load_weights, checkpoint.tensors(), parameters)
        for piece in pieces:
            _compare(piece, parameters, checkpoint)
        self._passed_over = {meta.name for meta in checkpoint.tensors()} - {piece.region.tensor for piece in pieces}

    def record(self, tensors: Sequence[TensorMeta]) -> Layout:
        self._checkpoint.check_shapes(tensors)
        layout = super().record(tensors)
        own = {meta.name for meta in tensors if meta.alias_of is None}
        surplus = own - {region.tensor for region in layout.regions} - self._passed_over
        if surplus:
            raise LayoutError("the engine's loader puts this tensor nowhere", tensor=min(surplus))
        return layout

    def live(self) -> list[torch.Tensor]:
        self._parameters.update(_parameters(self._model))  # vLLM may have put others in their place
        return super().live()


def _derive_anew(worker: Any) -> None:
    """What attention layers make of their parameters, as vLLM's own reload has them make it again."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.attention import is_deferred_attention_layer

    with set_current_vllm_config(worker.vllm_config), torch.no_grad():
        for layer in worker.get_model().modules():
            if is_deferred_attention_layer(layer):
                layer.process_weights_after_loading(worker.model_config.dtype)


def _parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.data for name, parameter in model.named_parameters(remove_duplicate=False)}


def _compare(piece: Piece, parameters: Mapping[str, torch.Tensor], checkpoint: Checkpoint) -> None:
    """Hold some rows of a parameter to the checkpoint's file.

    Raises:
        LayoutError: another value lies in the parameter.
    """
    live, region = piece.view(parameters), piece.region
    if not live.numel():
        return
    rows = range(region.shape[0]) if len(region.shape) > 1 else range(1)
    step = max(len(rows) // _ROWS, 1)
    for row in {*rows[::step], rows[-1]}:
        box = [slice(o, o + n) for o, n in zip(region.offset, region.shape, strict=True)]
        if len(box) > 1:
            box[0] = slice(region.offset[0] + row, region.offset[0] + row + 1)
        shown = live[row : row + 1] if len(box) > 1 else live
        filed = checkpoint.read(region.tensor, tuple(box)).to(live.dtype)
        if digests([shown]) != digests([filed]):
            raise LayoutError(
                f"vLLM keeps {region} in its parameter {piece.storage!r} in another form than its loader writes",
                tensor=region.tensor,
            )
