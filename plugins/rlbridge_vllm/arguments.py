"""What vLLM is told at its start: arguments, and environment variables, of which some are read when it is imported."""

from __future__ import annotations

import os
from typing import Any

from vllm.config import WeightTransferConfig

from rlbridge.roles.generator import GeneratorContext
from rlbridge_vllm.cpu import EAGER_VARIABLE, PREPACK_VARIABLE
from rlbridge_vllm.model_files import checkpoint_bytes, has_tokenizer
from rlbridge_vllm.options import VllmGeneratorOptions, share_of_vllm
from rlbridge_vllm.processes import ACTOR_VARIABLE
from rlbridge_vllm.registration import TRANSFER_BACKEND
from rlbridge_vllm.tail import LOG_VARIABLE

_CPU_KV_CACHE_GIB = 1.0


def engine_arguments(context: GeneratorContext, options: VllmGeneratorOptions) -> dict[str, Any]:
    """Arguments of vLLM's EngineArgs."""
    on_cpu = context.device == "cpu"
    kv_cache_gib = options.kv_cache_gib or (_CPU_KV_CACHE_GIB if on_cpu else None)
    ours: dict[str, Any] = {
        "model": context.model_path,
        "trust_remote_code": context.trust_remote_code,
        "dtype": options.dtype,
        "seed": context.seed + context.engine,
        "tensor_parallel_size": options.tensor_parallel,
        "max_model_len": options.max_model_len,
        "gpu_memory_utilization": options.gpu_memory_utilization if on_cpu else _share_of_vllm(context, options),
        "kv_cache_memory_bytes": None if kv_cache_gib is None else int(kv_cache_gib * 2**30),
        "enforce_eager": _eager(options, context.device),
        "skip_tokenizer_init": not has_tokenizer(context.model_path),
        "generation_config": "vllm",  # its stop tokens are given with each request, and nothing else of it is wanted
        "logprobs_mode": "processed_logits",
        "logits_processors": ["rlbridge_vllm.logprobs:Tempered"],
        "worker_extension_cls": "rlbridge_vllm.worker.WorkerExtension",
        "weight_transfer_config": WeightTransferConfig(backend=TRANSFER_BACKEND),
    }
    return {"use_tqdm_on_load": False, **options.engine_args, **ours}


def _share_of_vllm(context: GeneratorContext, options: VllmGeneratorOptions) -> float:
    """What vLLM may take of a GPU: what the engine may, less the arena of its updates, which is made after vLLM has taken all.

    Raises:
        ConfigError: nothing is left.
    """
    from vllm.platforms import current_platform

    total = current_platform.get_device_total_memory()
    return share_of_vllm(options, checkpoint_bytes(context.model_path, options.dtype), total)


def set_variables(options: VllmGeneratorOptions, device: str, log: str) -> None:
    """The variables of this process, which vLLM's processes inherit."""
    os.environ[ACTOR_VARIABLE] = str(os.getpid())
    os.environ[LOG_VARIABLE] = log
    os.environ[PREPACK_VARIABLE] = "1" if options.cpu_prepack else "0"
    os.environ[EAGER_VARIABLE] = "1" if _eager(options, device) else "0"
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0" if options.engine == "in_process" else "1"
    # The logits processor and the scoring are those of the first model runner: the only one that runs on CPUs too.
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if device == "cpu":
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would come before generator.kv_cache_gib
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # as many ranks and actors share the cores as will


def _eager(options: VllmGeneratorOptions, device: str) -> bool:
    return device == "cpu" if options.enforce_eager is None else options.enforce_eager
