"""What the verl trainer can be told in the config, under the names that verl has for it. Imports no framework."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from rlbridge.roles.trainer import TrainerOptions

_OWN_OPTIONS = {
    "dtype": "trainer.compute_dtype",
    "micro_batch_size_per_gpu": "trainer.micro_batch",
    "infer_micro_batch_size_per_gpu": "trainer.micro_batch",
    "mixed_precision": "trainer.compute_dtype",
    "model_dtype": "trainer.dtype",
    "max_token_len_per_gpu": "trainer.ppo_max_token_len_per_gpu",
    "infer_max_token_len_per_gpu": "trainer.ppo_max_token_len_per_gpu",
    "seed": "run.seed",
}
"""Fields of verl's engine config that have an option of their own here."""

_OF_MEGATRON = ("tensor_model_parallel_size", "pipeline_model_parallel_size")


class VerlTrainerOptions(TrainerOptions):
    """The trainer section of the config when `trainer.backend` is verl."""

    strategy: Literal["fsdp2", "fsdp", "megatron"] = Field(
        "fsdp2", description="Engine of verl. fsdp2 runs on CPUs too; fsdp (the first FSDP) and megatron need GPUs."
    )
    attn_implementation: str = Field(
        "sdpa", description="Attention of the model, as transformers names it: sdpa, eager, flash_attention_2 ..."
    )
    compute_dtype: Literal["float32", "bfloat16"] | None = Field(
        None, description="dtype of the forward and backward passes, where it is not that of the parameters (dtype)."
    )
    use_remove_padding: bool | None = Field(
        None,
        description="Compute on packed sequences, without their padding; null: with flash attention. Any other attention takes"
        " time and memory by the square of all tokens of a micro-batch then.",
    )
    use_dynamic_bsz: bool = Field(
        False, description="Cut a batch into micro-batches by tokens (ppo_max_token_len_per_gpu) and not by sequences."
    )
    ppo_max_token_len_per_gpu: int = Field(16384, ge=1, description="Most tokens of a micro-batch with use_dynamic_bsz.")
    ulysses_sequence_parallel_size: int = Field(
        1, ge=1, description="Ranks that share each sequence. It divides trainer.workers, and needs use_remove_padding."
    )
    tensor_model_parallel_size: int = Field(1, ge=1, description="Ranks of a tensor-parallel group (megatron).")
    pipeline_model_parallel_size: int = Field(1, ge=1, description="Stages of a pipeline (megatron).")
    fsdp_size: int = Field(-1, description="Ranks over which parameters are sharded, replicated beyond that; -1: all.")
    reshard_after_forward: bool = Field(True, description="Free gathered parameters after the forward pass.")
    param_offload: bool = Field(False, description="Keep parameters on the host between steps.")
    optimizer_offload: bool = Field(False, description="Keep the optimizer's state on the host between steps.")
    enable_gradient_checkpointing: bool = Field(False, description="Recompute activations in the backward pass.")
    use_torch_compile: bool | None = Field(None, description="Compile verl's entropy; null: on a GPU, not on a CPU.")
    clip_ratio_c: float = Field(
        3.0, gt=1, description="Bound of the ratio where the advantage is negative (dual clip, arXiv 1912.09729)."
    )
    entropy_coeff: float = Field(0.0, ge=0, description="Weight of the entropy bonus in the loss.")
    calculate_entropy: bool = Field(False, description="Report the entropy of the policy.")
    lora_rank: int = Field(0, ge=0, description="Rank of LoRA adapters; 0 trains all parameters.")
    lora_alpha: int = Field(16, ge=1, description="LoRA's scale is lora_alpha / lora_rank.")
    lora_merge: bool = Field(False, description="Publish and save the base with the adapters merged into it.")
    target_modules: str | list[str] = Field("all-linear", description="Modules that get adapters, as peft names them.")
    weights: Literal["auto", "sharded", "gathered"] = Field(
        "auto",
        description="What is published. sharded: each rank's own shards where they lie (fsdp2); gathered: full tensors, one"
        " after the other, from verl's own export, the ranks taking turns as owners; auto: sharded where that can be.",
    )
    engine_config: dict[str, Any] = Field(
        default_factory=dict, description="Further fields of verl's engine config, for example forward_prefetch."
    )

    @field_validator("engine_config")
    @classmethod
    def _leaves_ours_alone(cls, given: dict[str, Any]) -> dict[str, Any]:
        for key in given:
            if key in _OWN_OPTIONS:
                raise ValueError(f"{key} is set by {_OWN_OPTIONS[key]}")
            if key in cls.model_fields:
                raise ValueError(f"{key} is set by trainer.{key}")
            if key in ("forward_only", "use_fused_kernels", "full_determinism"):
                raise ValueError(f"{key} is rlbridge's own to set: log-probs and published weights depend on it")
        return given

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.strategy != "fsdp2" and self.resources.gpus <= 0:
            raise ValueError(f"strategy={self.strategy} needs GPUs (resources.gpus); fsdp2 runs on CPUs too")
        if self.strategy == "megatron" and self.dtype != "bfloat16":
            raise ValueError("strategy=megatron keeps its parameters in bfloat16: set dtype=bfloat16")
        if self.lora_rank and not self.lora_merge:
            raise ValueError(
                "lora_rank without lora_merge: an engine would go on serving the base, since only merged weights are published"
                " (verl-project/verl#7495); set lora_merge=true"
            )
        if self.lora_rank and self.strategy == "megatron":
            raise ValueError("lora_rank is not supported with strategy=megatron")
        if self.weights == "sharded" and (self.strategy != "fsdp2" or self.lora_rank):
            why = "LoRA's merged weights are computed" if self.lora_rank else f"strategy={self.strategy} has none"
            raise ValueError(f"weights=sharded: {why}; use weights=gathered")
        for name in _OF_MEGATRON:
            if getattr(self, name) > 1 and self.strategy != "megatron":
                raise ValueError(f"{name} is an option of strategy=megatron")
        if self.ulysses_sequence_parallel_size > 1 and not (
            self.packs and self.strategy == "fsdp2" and self.attn_implementation.startswith("flash_attention")
        ):
            raise ValueError(
                "ulysses_sequence_parallel_size needs strategy=fsdp2, use_remove_padding and"
                " attn_implementation=flash_attention_2: any other attention would see each rank's part of a sequence alone"
            )
        if self.workers % self.model_parallel_size:
            raise ValueError(
                f"workers={self.workers} is no multiple of {self.model_parallel_size}, the ranks that share a sequence"
            )
        return self

    @property
    def packs(self) -> bool:
        """Whether sequences are packed."""
        flash = self.attn_implementation.startswith("flash_attention")
        return flash if self.use_remove_padding is None else self.use_remove_padding

    @property
    def model_parallel_size(self) -> int:
        """Ranks that compute on the same sequences."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.ulysses_sequence_parallel_size
