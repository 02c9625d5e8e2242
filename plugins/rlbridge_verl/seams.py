"""Everything of verl that is called here, and what it calls: another version of verl is told by name what it has changed."""

from __future__ import annotations

from rlbridge.seams import Seam, check_seams
from rlbridge_verl import TESTED

_BASE = "verl.workers.engine:BaseEngine"

TRAINER = (
    Seam(
        "verl.workers.engine:EngineRegistry.new",
        ("model_type", "backend", "model_config", "engine_config", "optimizer_config", "checkpoint_config"),
    ),
    Seam(f"{_BASE}.initialize", ("self",)),
    Seam(f"{_BASE}.train_mode", ("self",)),
    Seam(f"{_BASE}.eval_mode", ("self",)),
    Seam(f"{_BASE}.train_batch", ("self", "data", "loss_function")),
    Seam(f"{_BASE}.infer_batch", ("self", "data")),
    Seam(f"{_BASE}.lr_scheduler_step", ("self",)),
    Seam(f"{_BASE}.get_per_tensor_param", ("self",)),
    Seam(f"{_BASE}.save_checkpoint", ("self", "local_path")),
    Seam(f"{_BASE}.load_checkpoint", ("self", "local_path", "del_local_after_load")),
    Seam(f"{_BASE}.get_data_parallel_size", ("self",)),
    Seam(f"{_BASE}.get_data_parallel_rank", ("self",)),
    Seam(f"{_BASE}.is_mp_src_rank_with_outputs", ("self",)),
    Seam(f"{_BASE}.disable_adapter", ("self",)),
    Seam("verl.workers.utils.losses:ppo_loss", ("config", "model_output", "data", "dp_group")),
    Seam("verl.workers.utils.padding:no_padding_2_padding", ("tensor", "data")),
    Seam("verl.utils.tensordict_utils:get_tensordict", ("tensor_dict", "non_tensor_dict")),
    Seam("verl.workers.engine.fsdp.transformer_impl:FSDPEngineWithLMHead"),
)
PLATFORM = (
    Seam("verl.plugin.platform:PlatformRegistry.register", ("platform",)),
    Seam("verl.plugin.platform:PlatformRegistry.get", ("name",)),
    Seam("verl.plugin.platform:PlatformBase"),
)


_ENGINE = "verl.checkpoint_engine.base:CheckpointEngine"

WIRE = (
    Seam("verl.checkpoint_engine.base:CheckpointEngineRegistry.register", ("backend",)),
    Seam(f"{_ENGINE}.prepare", ("self",)),
    Seam(f"{_ENGINE}.build_topology", ("actor_wg_world_size", "rollout_world_size", "metadata")),
    Seam(f"{_ENGINE}.init_process_group", ("self",)),
    Seam(f"{_ENGINE}.send_weights", ("self", "weights", "global_steps")),
    Seam(f"{_ENGINE}.receive_weights", ("self", "global_steps")),
    Seam(f"{_ENGINE}.finalize", ("self",)),
    Seam("verl.checkpoint_engine.base:CheckpointEngineManager.build_process_group", ("self", "rollout")),
    Seam("verl.checkpoint_engine.base:CheckpointEngineManager.update_weights", ("self", "global_steps")),
)
"""What verl calls of a checkpoint engine, and what calls it."""


def check_platform() -> None:
    """Hold the installed verl to what is needed before its engines can be imported.

    Raises:
        PluginError: names what has changed.
    """
    check_seams("verl", TESTED, PLATFORM)


def check_trainer() -> None:
    """Hold the installed verl to what the trainer calls.

    Raises:
        PluginError: names what has changed.
    """
    check_seams("verl", TESTED, TRAINER)


def check_wire() -> None:
    """Hold the installed verl to what it has to call of a checkpoint engine.

    Raises:
        PluginError: names what has changed.
    """
    check_seams("verl", TESTED, WIRE)
