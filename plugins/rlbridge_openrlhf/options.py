"""What the OpenRLHF trainer can be told in the config, under the names that OpenRLHF has for it. Imports no framework."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from rlbridge.roles.trainer import TrainerOptions

_STAGES = (2, 3)


class OpenRLHFTrainerOptions(TrainerOptions):
    """The trainer section of the config when `trainer.backend` is openrlhf."""

    zero_stage: int = Field(
        2, description="DeepSpeed's ZeRO: 2 shards gradients and optimizer over the ranks, 3 the parameters too."
    )
    attn_implementation: str = Field(
        "sdpa", description="Attention of the model, as transformers names it: sdpa, eager, flash_attention_2 ..."
    )
    gradient_checkpointing_enable: bool = Field(False, description="Recompute activations in the backward pass.")
    grad_accum_dtype: Literal["fp32", "bf16"] | None = Field(
        None, description="dtype in which gradients of micro-batches are added up; null: that of the parameters."
    )
    dual_clip: float | None = Field(
        None, gt=1, description="Bound of the ratio where the advantage is negative (arXiv 1912.09729); null: none."
    )
    entropy_coef: float | None = Field(
        None, ge=0, description="Weight of the entropy bonus in the loss; 0 reports the entropy alone; null: neither."
    )
    torch_adam: bool | None = Field(
        None,
        description="torch's AdamW and not DeepSpeed's, which a compiler makes at its first use; null: on a CPU, not on a GPU.",
    )
    weights: Literal["auto", "sharded", "gathered"] = Field(
        "auto",
        description="What is published. sharded: each rank's own part of the parameters where it lies; gathered: full tensors,"
        " one after the other, the ranks taking turns as owners; auto: sharded where that can be.",
    )

    @field_validator("zero_stage")
    @classmethod
    def _is_a_stage_that_shards(cls, stage: int) -> int:
        if stage not in _STAGES:
            raise ValueError(
                f"zero_stage={stage} is not supported: 2 and 3 are. 0 and 1 hold whole gradients on every rank, which 2 shards"
                " at no cost, and their steps and states have not been tried here"
            )
        return stage
