"""A model directory as OpenRLHF's actor, in DeepSpeed's engine."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from rlbridge.errors import ModelError
from rlbridge.roles.trainer import TrainerContext
from rlbridge_openrlhf import shims
from rlbridge_openrlhf.options import OpenRLHFTrainerOptions
from rlbridge_openrlhf.strategy import Strategy
from rlbridge_openrlhf.upstream import Actor, HfDeepSpeedConfig, mend_zero3_loading, set_z3_leaf_modules


@dataclass(frozen=True)
class Described:
    """What is written beside a model's weights, as it was loaded: training needs a config of its own."""

    config: Any
    generation_config: Any
    dtype: torch.dtype

    def can_generate(self) -> bool:
        """Whether there is a generation config."""
        return self.generation_config is not None


def make_actor(context: TrainerContext, options: OpenRLHFTrainerOptions, ds_config: dict[str, Any]) -> tuple[Any, Described]:
    """OpenRLHF's actor around the model of the run's directory. Collective with ZeRO-3, which shards while it loads.

    The actor is given a model, since what it loads itself it loads with `trust_remote_code`, never in float32, and with random
    numbers where the files lack a tensor.

    Raises:
        ModelError: the directory holds no such model, or only a part of one.
    """
    model = _load(context, options, ds_config)
    described = Described(copy.deepcopy(model.config), copy.deepcopy(model.generation_config), model.dtype)
    set_z3_leaf_modules(model, detect_hybrid=False)
    model.config.use_cache = False
    actor = Actor(model)
    actor.packing_samples = False  # set by Actor where it loads the model
    if options.gradient_checkpointing_enable:
        actor.gradient_checkpointing_enable({"use_reentrant": False})
    return actor, described


def prepare_for_training(strategy: Strategy, actor: Any, context: TrainerContext) -> Any:
    """The strategy's own `prepare`; returns the schedule. `actor.model` is DeepSpeed's engine afterwards."""
    optimizer = context.optimizer
    settings = {
        "optim": "adam",
        "adam": {
            "lr": optimizer.lr,
            "betas": optimizer.betas,
            "eps": optimizer.eps,
            "weight_decay": optimizer.weight_decay,
        },
        "lr_scheduler": "constant_with_warmup",
        "lr_warmup_ratio": 1.0,
        "scheduler_steps": optimizer.warmup_steps,
        "max_norm": optimizer.grad_clip,
    }
    _, _, schedule = strategy.prepare((actor, settings))
    with warnings.catch_warnings():
        # Its first step would have the rate of step 0, which is none; torch warns of a schedule that goes ahead.
        warnings.simplefilter("ignore")
        schedule.step()
    return schedule


def _load(context: TrainerContext, options: OpenRLHFTrainerOptions, ds_config: dict[str, Any]) -> Any:
    path = context.model_path
    if not (Path(path) / "config.json").is_file():
        raise ModelError(f"{path} is not a model directory: it has no config.json")
    sharded = None
    if options.zero_stage == 3:
        if shims.mends_zero3_loading():
            mend_zero3_loading()
        sharded = HfDeepSpeedConfig(ds_config)  # transformers shards while it loads, for as long as this lives
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=getattr(torch, options.dtype),
            attn_implementation=options.attn_implementation,
            trust_remote_code=context.trust_remote_code,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # it then says which, below
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelError(f"the model in {path} cannot be loaded: {type(error).__name__}: {error}") from error
    finally:
        del sharded
    lacking = sorted(info["missing_keys"])
    if lacking:
        raise ModelError(f"the model in {path} lacks {len(lacking)} of its tensors, {lacking[0]!r} the first")
    for name, theirs, ours in sorted(info["mismatched_keys"]):
        raise ModelError(f"the model in {path} has {name!r} of shape {list(theirs)}, where its config says {list(ours)}")
    return model
