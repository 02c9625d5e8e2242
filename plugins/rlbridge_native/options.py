"""What the native trainer and generator can be told in the config. Imports no framework."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlbridge.roles.generator import GeneratorOptions
from rlbridge.roles.trainer import TrainerOptions

_ATTENTION = "Attention of the model, as transformers names it: sdpa, eager, flash_attention_2 ..."


class NativeTrainerOptions(TrainerOptions):
    """The trainer section of the config when `trainer.backend` is native."""

    attn_implementation: str = Field("sdpa", description=_ATTENTION)
    compute_dtype: Literal["float32", "bfloat16"] | None = Field(
        None, description="dtype of the forward and backward passes, where it is not that of the parameters (dtype)."
    )
    gradient_checkpointing: bool = Field(False, description="Recompute activations in the backward pass, to save memory.")


class NativeGeneratorOptions(GeneratorOptions):
    """The generator section of the config when `generator.backend` is native."""

    attn_implementation: str = Field("sdpa", description=_ATTENTION)
    batch: int = Field(0, ge=0, description="Sequences generated at once; 0 takes all of a call's.")
