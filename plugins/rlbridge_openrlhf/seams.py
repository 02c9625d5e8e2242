"""Everything of OpenRLHF and DeepSpeed that the trainer stands on: another version is told by name what it has changed."""

from __future__ import annotations

from typing import Any

from rlbridge.errors import PluginError
from rlbridge.importing import distribution_version
from rlbridge.seams import Seam, check_seams
from rlbridge_openrlhf import TESTED

_STRATEGY = "openrlhf.utils.deepspeed:DeepspeedStrategy"
_ENGINE = "deepspeed.runtime.engine:DeepSpeedEngine"

OPENRLHF = (
    Seam("openrlhf.models:Actor", ("pretrain_or_model",)),
    Seam("openrlhf.models:Actor.forward", ("self", "sequences", "action_mask", "attention_mask")),
    Seam("openrlhf.models:Actor.gradient_checkpointing_enable", ("self", "gradient_checkpointing_kwargs")),
    Seam("openrlhf.models.actor:_patch_zero3_weight_mapping", ()),
    Seam("openrlhf.models.utils:set_z3_leaf_modules", ("model", "detect_hybrid")),
    Seam("openrlhf.models:PolicyLoss", ("clip_eps_low", "clip_eps_high", "dual_clip")),
    Seam(
        "openrlhf.models:PolicyLoss.forward",
        (
            "self",
            "log_probs",
            "old_log_probs",
            "advantages",
            "action_mask",
            "rollout_log_probs",
            "dp_size",
            "batch_num_tokens",
            "global_batch_size",
        ),
    ),
    Seam(_STRATEGY, ("seed", "max_norm", "micro_train_batch_size", "train_batch_size", "zero_stage", "args")),
    Seam(f"{_STRATEGY}.setup_distributed", ("self", "timeout")),
    Seam(f"{_STRATEGY}.backward", ("self", "loss", "model", "_optimizer")),
    Seam(f"{_STRATEGY}.optimizer_step", ("self", "_optimizer", "model", "_scheduler", "name")),
    Seam(f"{_STRATEGY}.get_ds_train_config", ("self", "optim_dict", "max_norm")),
    Seam(f"{_STRATEGY}.get_ds_eval_config", ("self", "offload")),
    Seam(f"{_STRATEGY}.prepare", ("self",)),
    Seam(
        "openrlhf.trainer.ray.ppo_actor:ActorPPOTrainer.training_step",
        ("self", "experience", "kl_ctl", "step", "loss_batch_info"),
    ),
    Seam(
        "openrlhf.trainer.ppo_utils.experience:Experience",
        (
            "sequences",
            "attention_mask",
            "action_mask",
            "action_log_probs",
            "base_action_log_probs",
            "advantages",
        ),
    ),
)

DEEPSPEED = (
    Seam("deepspeed:init_distributed", ()),
    Seam("deepspeed:zero.GatheredParameters", ("params", "enabled")),
    Seam("deepspeed.accelerator:get_accelerator", ()),
    Seam("deepspeed.ops:__compatible_ops__"),
    Seam(f"{_ENGINE}.set_gradient_accumulation_boundary", ("self", "is_boundary")),
    Seam(f"{_ENGINE}.step", ("self",)),
    Seam(f"{_ENGINE}.save_checkpoint", ("self", "save_dir", "tag", "save_latest")),
    Seam(f"{_ENGINE}.load_checkpoint", ("self", "load_dir", "tag")),
    Seam(f"{_ENGINE}.zero_optimization_stage", ("self",)),
)


def check() -> None:
    """Hold the installed OpenRLHF and DeepSpeed to what the trainer calls.

    Raises:
        PluginError: names what has changed.
    """
    for distribution, tested, wanted in zip(("openrlhf", "deepspeed"), TESTED, (OPENRLHF, DEEPSPEED), strict=True):
        check_seams(distribution, tested, wanted)


def check_engine(engine: Any) -> None:
    """Hold DeepSpeed's optimizer and parameters to what is read of them, which no signature shows.

    Raises:
        PluginError: names what is gone.
    """
    zero = engine.optimizer
    gone = [f"{type(zero).__name__}.{name}" for name in ("averaged_gradients", "overflow") if not hasattr(zero, name)]
    if engine.zero_optimization_stage() == 3:
        parameter = next(engine.module.parameters())
        gone += [f"a parameter's {name}" for name in ("ds_tensor", "ds_shape", "ds_numel") if not hasattr(parameter, name)]
    if gone:
        raise PluginError(
            f"deepspeed {distribution_version('deepspeed')} is not what its plugin was written for: {', '.join(gone)} is gone",
            todo=f"pip install '{TESTED[1]}', or a newer rlbridge",
        )
