"""What the SGLang generator can be told in the config. Imports no framework."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from rlbridge.roles.generator import GeneratorOptions

_ONE_MODEL = "one engine is one model of tensor-parallel ranks on one host"

RESERVED = {
    "model_path": "it is that of model.path",
    "tokenizer_path": "the tokenizer is the model's",
    "trust_remote_code": "it follows model.trust_remote_code",
    "device": "it follows generator.resources.gpus",
    "dtype": "use generator.dtype",
    "random_seed": "it follows the run's seed",
    "tp_size": "use generator.tensor_parallel",
    "context_length": "use generator.context_length",
    "mem_fraction_static": "use generator.memory_fraction",
    "max_total_tokens": "use generator.cache_tokens",
    "max_running_requests": "use generator.running_requests",
    "attention_backend": "use generator.attention_backend",
    "sampling_backend": "use generator.sampling_backend",
    "log_level": "use generator.log_level",
    "weight_version": "it is the version that the last sync has installed",
    "skip_tokenizer_init": "it follows from whether the model has a tokenizer",
    "pp_size": _ONE_MODEL,
    "dp_size": _ONE_MODEL,
    "ep_size": _ONE_MODEL,
    "nnodes": _ONE_MODEL,
    "node_rank": _ONE_MODEL,
    "dist_init_addr": _ONE_MODEL,
    "use_ray": _ONE_MODEL,
    "tokenizer_worker_num": _ONE_MODEL,
    "speculative_algorithm": "a draft model would keep the weights that it was loaded with",
    "disaggregation_mode": "an engine reads its prompts and answers them itself",
    **dict.fromkeys(("enable_lora", "lora_paths"), "a sync writes the model's own weights"),
    "enable_eplb": "experts would move away from where a sync writes them",
    "hicache_storage_backend": "what it keeps of the old weights' keys and values would be read with the new ones",
    "enable_lmcache": "what it keeps of the old weights' keys and values would be read with the new ones",
    "weight_cache_mode": "it refuses every change of the weights",
    "custom_weight_loader": "rlbridge writes the weights itself",
    "custom_sigquit_handler": "rlbridge watches over the engine's processes itself",
}
"""Arguments of the engine that `generator.engine_args` must not hold, and why."""


class SglangGeneratorOptions(GeneratorOptions):
    """The generator section of the config when `generator.backend` is sglang."""

    tensor_parallel: int = Field(1, ge=1, description="Ranks of one engine, a process each, that divide every layer.")
    context_length: int = Field(0, ge=0, description="Tokens of a prompt with its completion, at most; 0: what the model says.")
    memory_fraction: float = Field(
        0.0, ge=0, lt=1, description="Share of the device's memory for weights and KV cache; 0: SGLang's own choice."
    )
    cache_tokens: int = Field(0, ge=0, description="Tokens of the KV cache; 0: what memory_fraction leaves, on a CPU 32768.")
    running_requests: int = Field(0, ge=0, description="Requests that run at once; 0: SGLang's own choice, on a CPU 64.")
    attention_backend: str = Field("", description="SGLang's attention backend; empty: its own choice, on a CPU torch_native.")
    sampling_backend: str = Field(
        "pytorch",
        description="SGLang's sampling backend. Only pytorch samples from seeds: with another, no call can be repeated.",
    )
    engine_args: dict[str, Any] = Field(
        default_factory=dict, description="Further arguments of sglang.Engine, as SGLang names them; they come last."
    )
    log_level: str = Field("error", description="What SGLang's processes log: debug, info, warning or error.")
    start_seconds: float = Field(1800.0, gt=0, description="Longest that an engine may take to load its model.")
    call_seconds: float = Field(3600.0, gt=0, description="Longest that one call of generate or score may take.")
    rank_seconds: float = Field(
        300.0, gt=0, description="Longest that a rank may take to answer a call of a sync, besides the waiting for bytes."
    )
    pause_seconds: float = Field(
        600.0,
        gt=0,
        description="Longest that a pause waits for running requests, and that a call waits for the end of a pause.",
    )

    @field_validator("engine_args")
    @classmethod
    def _free(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Refuse what rlbridge sets itself."""
        if taken := sorted(given.keys() & RESERVED.keys()):
            raise ValueError("; ".join(f"{key} cannot be set here: {RESERVED[key]}" for key in taken))
        return given

    @model_validator(mode="after")
    def _has_a_gpu_a_rank(self) -> Self:
        if 0 < self.resources.gpus < self.tensor_parallel:
            raise ValueError(
                f"tensor_parallel={self.tensor_parallel} needs as many GPUs, and resources.gpus is {self.resources.gpus:g}"
            )
        return self
