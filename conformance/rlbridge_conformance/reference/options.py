"""What the reference backends can be told in the config. Imports no framework."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlbridge.roles.generator import GeneratorOptions
from rlbridge.roles.trainer import TrainerOptions
from rlbridge.roles.transport import TransportOptions

_KEEP_DTYPES = "Hold every tensor in the dtype of the model's files, and not the floating ones in `dtype`."


class ReferenceTrainerOptions(TrainerOptions):
    """The trainer section of the config when `trainer.backend` is reference."""

    keep_dtypes: bool = Field(False, description=_KEEP_DTYPES)
    shards: Literal["rows", "flat", "gathered"] = Field(
        "rows",
        description="What a rank publishes: rows of dimension 0, flat ranges as ZeRO-3 cuts them, or tensors that the ranks"
        " gather from each other's rows with gloo.",
    )
    contiguous: bool = Field(True, description="False: matrices are transposed views of their storage.")


class ReferenceGeneratorOptions(GeneratorOptions):
    """The generator section of the config when `generator.backend` is reference."""

    keep_dtypes: bool = Field(False, description=_KEEP_DTYPES)
    tp: int = Field(1, ge=1, description="Tensor-parallel ranks of an engine.")
    rank_processes: bool = Field(False, description="What receives a rank's weights lives in a process of its own.")
    batch: int = Field(0, ge=0, description="Requests of one call that run at once; 0 runs all of them.")
    prefix_cache: bool = Field(True, description="Keep keys and values of prompts, for prompts that begin alike.")
    pause_seconds: float = Field(
        60.0, gt=0, description="How long a request waits for the end of a pause, and a pause for the requests to end."
    )
    token_seconds: float = Field(
        0.0, ge=0, description="Sleep so long after each step, which makes one token of every running request."
    )


class ReferenceTransportOptions(TransportOptions):
    """Options of the `reference` transport."""

    bucket_bytes: int = Field(2**20, ge=1, description="Most bytes of one read; the deadline is looked at before each.")
    delay_seconds: float = Field(0.0, ge=0, description="Sleep so long before each read: a slow wire.")
