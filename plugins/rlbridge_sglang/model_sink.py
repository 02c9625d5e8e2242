"""An SGLang model as a sink: its own `load_weights` says where each checkpoint tensor goes.

Copying is right where a parameter holds what the loader puts there. SGLang may keep a weight in another form, and make it anew
after each update: such a model is refused before its loader is run, for the loader would undo that form under the requests that
run meanwhile. What is not known by name here is found by a parameter that has changed its place or its form, and at last by the
digests of what is served.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from rlbridge.errors import LayoutError
from rlbridge.roles.sink import RecordedSink
from rlbridge.weights.layout import Layout, TensorMeta
from rlbridge.weights.model_files import Checkpoint

MOE_RUNNER = "an MoE is held as its checkpoint has it with generator.engine_args: {moe_runner_backend: triton}"

_REARRANGED = {
    "use_flashinfer_trtllm_moe": MOE_RUNNER,
    "w13_swiglu_interleaved": "do not set SGLANG_OPT_FUSE_SWIGLU_INTERLEAVED",
}
"""What SGLang's layers call it when they move rows of their weights after loading, and what helps."""


class ModelSink(RecordedSink):
    """The parameters of one tensor-parallel rank.

    Args:
        model: The rank's model, with the weights that it was loaded with.
        refusal: Says why SGLang itself would not update this model's weights; empty where it would.
        checkpoint: What it was loaded from, where that has safetensors files.
    """

    def __init__(self, model: Any, refusal: Callable[[], str] = lambda: "", checkpoint: Checkpoint | None = None) -> None:
        self.loaded = {name: parameter.data for name, parameter in model.named_parameters()}
        super().__init__(model.load_weights, self.loaded)
        self._model, self._refusal, self._checkpoint = model, refusal, checkpoint

    def record(self, tensors: Sequence[TensorMeta]) -> Layout:
        """As any sink. Whatever the loader does, no parameter has another shape or another place after it.

        Raises:
            LayoutError: SGLang keeps a weight in another form than its loader writes, or copies of what it made of weights; or
                a tensor has another shape than in the checkpoint, and a longer one would be taken into the padding.
        """
        self._check_supported()
        if self._checkpoint is not None:
            self._checkpoint.check_shapes(tensors)
        try:
            return super().record(tensors)
        finally:
            self._check_in_place(restore=True)

    def live(self) -> list[torch.Tensor]:
        self._check_in_place()  # SGLang may have put others in their place
        return super().live()

    def scramble(self) -> None:
        """Before anything is recorded padding is known by its zeros alone, and no sync would write them again."""
        if self._pieces:
            super().scramble()
            return
        with torch.no_grad():
            for tensor in self.loaded.values():
                tensor.masked_fill_(tensor != 0, 7)

    def _check_supported(self) -> None:
        if refusal := self._refusal():
            raise LayoutError(f"SGLang cannot update the weights of this model: {refusal}", role="generator")
        for name, module in self._model.named_modules():
            method = getattr(module, "quant_method", None)
            for attribute, todo in _REARRANGED.items():
                if getattr(method, attribute, False):
                    raise LayoutError(
                        f"SGLang keeps the weights of {name!r} in another form than its loader writes ({attribute})",
                        role="generator",
                        tensor=name,
                        todo=todo,
                    )

    def _check_in_place(self, restore: bool = False) -> None:
        """Hold each parameter to what it was when the model was loaded; with `restore`, make it that again."""
        parameters, moved = dict(self._model.named_parameters()), []
        for name, tensor in self.loaded.items():
            parameter = parameters.get(name)
            if parameter is not None and _form(parameter) == _form(tensor):
                continue
            moved.append((name, "gone" if parameter is None else _said(parameter)))
            if restore and parameter is not None:
                parameter.data = tensor
        if moved:
            name, now = moved[0]
            raise LayoutError(
                f"SGLang keeps its parameter {name!r} in another form than its loader writes:"
                f" it was {_said(self.loaded[name])}, and is {now}",
                role="generator",
                tensor=name,
                todo=MOE_RUNNER,
            )


def _form(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _said(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)} at {tensor.data_ptr():#x}"
