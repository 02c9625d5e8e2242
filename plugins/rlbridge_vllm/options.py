"""What the vLLM generator can be told in the config. Imports no framework."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from rlbridge.errors import ConfigError
from rlbridge.roles.generator import GeneratorOptions

_OWN_OPTIONS = {
    "tensor_parallel_size": "generator.tensor_parallel",
    "max_model_len": "generator.max_model_len",
    "gpu_memory_utilization": "generator.gpu_memory_utilization",
    "kv_cache_memory_bytes": "generator.kv_cache_gib",
    "enforce_eager": "generator.enforce_eager",
    "dtype": "generator.dtype",
    "model": "model.path",
    "seed": "run.seed",
}
"""Arguments of vLLM that have an option of their own here."""

_OURS = frozenset(
    {
        "async_scheduling",
        "data_parallel_size",
        "distributed_executor_backend",
        "enable_elastic_ep",
        "enable_eplb",
        "eplb_config",
        "generation_config",
        "logits_processors",
        "logprobs_mode",
        "pipeline_parallel_size",
        "skip_tokenizer_init",
        "speculative_config",
        "tokenizer",
        "trust_remote_code",
        "weight_transfer_config",
        "worker_cls",
        "worker_extension_cls",
    }
)
"""Arguments of vLLM that rlbridge sets, or that its log-probs and its updates do not allow."""


class VllmGeneratorOptions(GeneratorOptions):
    """The generator section of the config when `generator.backend` is vllm."""

    engine: Literal["async", "in_process"] = Field(
        "async",
        description="async: AsyncLLM, whose requests may go on over an update; in_process: the engine's core in the actor's own"
        " process, which starts sooner and is easier to look into.",
    )
    tensor_parallel: int = Field(1, ge=1, description="Ranks of an engine; each is a worker process of vLLM.")
    max_model_len: int | None = Field(None, ge=2, description="Most tokens of a prompt and its completion; null: the model's.")
    gpu_memory_utilization: float = Field(
        0.9, gt=0, le=1, description="Share of a GPU's memory that the engine may take in all, with the arena of its updates."
    )
    kv_cache_gib: float | None = Field(
        None,
        gt=0,
        description="GiB of keys and values on each rank; null: what gpu_memory_utilization leaves, and on a CPU 1.",
    )
    enforce_eager: bool | None = Field(None, description="No compiled graphs; null: on a CPU, not on a GPU.")
    install: Literal["auto", "direct", "streamed"] = Field(
        "auto",
        description="How weights get into the parameters. direct: copied to where vLLM's loader was seen to put them; streamed:"
        " loaded anew by vLLM, where kernels keep weights in another form; auto: direct where all of them can be.",
    )
    cpu_prepack: bool = Field(
        False, description="On a CPU, let vLLM pack weights for its kernels, which are faster then and loaded anew in updates."
    )
    answer_seconds: float = Field(
        300.0, gt=0, description="How long a rank may take to answer, and running requests to end in a pause that waits."
    )
    engine_args: dict[str, Any] = Field(
        default_factory=dict, description="Further arguments of vLLM's EngineArgs, for example max_num_seqs."
    )

    @field_validator("engine_args")
    @classmethod
    def _leaves_ours_alone(cls, given: dict[str, Any]) -> dict[str, Any]:
        for key in given:
            if key in _OWN_OPTIONS:
                raise ValueError(f"{key} is set by {_OWN_OPTIONS[key]}")
            if key in _OURS:
                raise ValueError(f"{key} is rlbridge's own to set: updates and log-probs depend on it")
        return given

    @model_validator(mode="after")
    def _has_a_gpu_a_rank(self) -> Self:
        if 0 < self.resources.gpus < self.tensor_parallel:
            raise ValueError(
                f"tensor_parallel={self.tensor_parallel} needs as many GPUs, and resources.gpus is {self.resources.gpus:g}"
            )
        return self


def share_of_vllm(options: VllmGeneratorOptions, model_bytes: int, gpu_bytes: int) -> float:
    """The share of a GPU that is left for vLLM beside the arena: each rank's slice of the weights, or all of them (streamed).

    Raises:
        ConfigError: there is none.
    """
    arena = model_bytes if options.install == "streamed" else model_bytes / options.tensor_parallel
    share = options.gpu_memory_utilization - arena / gpu_bytes
    if share <= 0:
        raise ConfigError(
            f"the arena of the updates takes {arena / 2**30:.1f} GiB on each GPU of {gpu_bytes / 2**30:.0f} GiB, and nothing is"
            f" left of generator.gpu_memory_utilization={options.gpu_memory_utilization:g}",
            role="generator",
            todo="take more GPUs an engine (generator.tensor_parallel)",
        )
    return share
