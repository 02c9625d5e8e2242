"""verl's engine of a run: its configs from ours, the engine from verl's registry, and its loss."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from verl.trainer.config import CheckpointConfig
from verl.workers.config import (
    ActorConfig,
    FSDPEngineConfig,
    FSDPOptimizerConfig,
    HFModelConfig,
    McoreEngineConfig,
    McoreOptimizerConfig,
)
from verl.workers.engine import EngineRegistry
from verl.workers.utils.losses import ppo_loss

from rlbridge.errors import ConfigError, LayoutError, ModelError
from rlbridge.huggingface.checkpoint import checkpoint_tensors
from rlbridge.roles.trainer import AlgorithmOptions, OptimizerOptions, TrainerContext
from rlbridge.weights.model_files import Checkpoint
from rlbridge_verl.options import VerlTrainerOptions

_SHORT = {"float32": "fp32", "bfloat16": "bf16"}
_MANY_STEPS = 10**9


def model_config(context: TrainerContext, options: VerlTrainerOptions) -> HFModelConfig:
    """verl's description of the model in the run's directory.

    Raises:
        ModelError: the directory holds no causal language model that verl can load, or not all of its tensors.
    """
    path = context.model_path
    if not (Path(path) / "config.json").is_file():
        raise ModelError(f"{path} is not a model directory: it has no config.json")
    try:
        config = HFModelConfig(
            path=path,
            load_tokenizer=False,  # its special tokens would be written over those of the model's config
            trust_remote_code=context.trust_remote_code,
            override_config={"attn_implementation": options.attn_implementation},
            enable_gradient_checkpointing=options.enable_gradient_checkpointing,
            use_remove_padding=options.packs,
            lora_rank=options.lora_rank,
            lora_alpha=options.lora_alpha,
            target_modules=options.target_modules,
            lora={"merge": options.lora_merge},
        )
    except (OSError, ValueError, KeyError, AssertionError) as error:
        raise ModelError(f"verl cannot load the model in {path}: {type(error).__name__}: {error}") from error
    return config


def reference_model(config: HFModelConfig, dtype: torch.dtype) -> Any:
    """The transformers model without memory: what its checkpoint consists of, whatever verl's engine makes of it.

    Raises:
        ModelError: transformers has no causal language model of this class, or the directory lacks some of its tensors, which
            verl would fill with random numbers.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config.hf_config, dtype=dtype, trust_remote_code=config.trust_remote_code)
    except (ValueError, ImportError, TypeError) as error:
        raise _no_causal_model(config, str(error).splitlines()[0]) from error
    if type(model).__name__ not in config.architectures:
        raise _no_causal_model(config, f"its causal language model is {type(model).__name__}")
    try:
        present = {meta.name for meta in Checkpoint(Path(config.local_path)).tensors()}
    except LayoutError as error:
        raise ModelError(f"the model in {config.path} has no weights in safetensors files", todo=error.todo) from error
    lacking = [t.name for t in checkpoint_tensors(model) if t.alias_of is None and t.name not in present]
    if lacking:
        raise ModelError(f"the model in {config.path} lacks {len(lacking)} of its tensors, {lacking[0]!r} the first")
    return model


def _no_causal_model(config: HFModelConfig, reason: str) -> ModelError:
    return ModelError(
        f"{config.path} holds a {', '.join(config.architectures)}, which is no causal language model: {reason}",
        todo="train a model whose class is ...ForCausalLM",
    )


def make_engine(
    config: HFModelConfig, context: TrainerContext, options: VerlTrainerOptions, *, forward_only: bool = False
) -> Any:
    """The engine that verl's registry has for the strategy, initialised. Collective.

    Raises:
        ConfigError: verl has no such engine here, or its config refuses a field.
        ModelError: the model cannot be loaded.
    """
    try:
        engine = EngineRegistry.new(
            model_type="language_model",
            backend=options.strategy,
            model_config=config,
            engine_config=_engine_config(context, options, forward_only),
            optimizer_config=_optimizer_config(options, context.optimizer),
            checkpoint_config=CheckpointConfig(),
        )
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigError(
            f"verl has no engine for trainer.strategy={options.strategy} here: {error}", role="trainer", rank=context.rank
        ) from error
    try:
        engine.initialize()
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"verl cannot load the model in {context.model_path}: {type(error).__name__}: {error}",
            role="trainer",
            rank=context.rank,
        ) from error
    return engine


def loss_function(context: TrainerContext, options: VerlTrainerOptions, engine_config: Any) -> Any:
    """verl's `ppo_loss`: the clipped objective of `algorithm`, over the tokens of the global batch, with the k3 KL."""
    algorithm: AlgorithmOptions = context.algorithm
    config = ActorConfig(
        strategy=options.strategy,
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=max(options.micro_batch, 1),
        clip_ratio_low=algorithm.clip_low,
        clip_ratio_high=algorithm.clip_high,
        clip_ratio_c=options.clip_ratio_c,
        loss_agg_mode="token-mean",
        entropy_coeff=options.entropy_coeff,
        use_kl_loss=algorithm.kl_coef > 0,
        kl_loss_coef=algorithm.kl_coef,
        kl_loss_type="low_var_kl",
        engine=engine_config,
    )
    return partial(ppo_loss, config)


def _engine_config(context: TrainerContext, options: VerlTrainerOptions, forward_only: bool) -> Any:
    compute = options.compute_dtype or options.dtype
    common = {
        "strategy": options.strategy,
        "forward_only": forward_only,
        "param_offload": options.param_offload,
        "optimizer_offload": options.optimizer_offload,
        "use_remove_padding": options.packs,
        "use_dynamic_bsz": options.use_dynamic_bsz,
        "max_token_len_per_gpu": options.ppo_max_token_len_per_gpu,
        "infer_max_token_len_per_gpu": options.ppo_max_token_len_per_gpu,
        "seed": context.seed,
        **options.engine_config,
    }
    if options.strategy == "megatron":
        return McoreEngineConfig(
            **common,
            dtype=compute,
            tensor_model_parallel_size=options.tensor_model_parallel_size,
            pipeline_model_parallel_size=options.pipeline_model_parallel_size,
        )
    compiled = context.device != "cpu" if options.use_torch_compile is None else options.use_torch_compile
    return FSDPEngineConfig(
        **common,
        dtype=compute,
        model_dtype=_SHORT[options.dtype],
        mixed_precision={"param_dtype": _SHORT[compute], "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
        fsdp_size=options.fsdp_size,
        reshard_after_forward=options.reshard_after_forward,
        ulysses_sequence_parallel_size=options.ulysses_sequence_parallel_size,
        use_torch_compile=compiled,
    )


def _optimizer_config(options: VerlTrainerOptions, optimizer: OptimizerOptions) -> Any:
    common = {
        "lr": optimizer.lr,
        "betas": optimizer.betas,
        "weight_decay": optimizer.weight_decay,
        "clip_grad": optimizer.grad_clip or float("inf"),
        "lr_warmup_steps": optimizer.warmup_steps,
    }
    if options.strategy == "megatron":
        # Its schedule divides by the number of steps, which a run here does not tell.
        return McoreOptimizerConfig(
            **common, total_training_steps=_MANY_STEPS, override_optimizer_config={"adam_eps": optimizer.eps}
        )
    return FSDPOptimizerConfig(**common, override_optimizer_config={"eps": optimizer.eps})
