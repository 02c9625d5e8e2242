"""DeepSpeed's own checkpoints: parameters, optimizer, schedule and random state, looked at whole before any of it is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rlbridge.errors import CheckpointError
from rlbridge.huggingface.state_manifest import EARLIER, check_manifest, checkpoint_errors, write_manifest
from rlbridge.weights.layout import TensorMeta


def save_state(engine: Any, path: Path, tensors: Sequence[TensorMeta]) -> None:
    """Let DeepSpeed write it, then describe it. Collective.

    Raises:
        CheckpointError: it could not be written.
    """
    with checkpoint_errors(f"the trainer's state could not be written to {path}", "make room, or save elsewhere"):
        engine.save_checkpoint(str(path), tag=_tag(engine), save_latest=False)
        torch.save(_random_state(), _random_file(engine, path))
        dist.barrier()
        if dist.get_rank() == 0:
            write_manifest(path, tensors, dist.get_world_size())


def load_state(engine: Any, path: Path, tensors: Sequence[TensorMeta]) -> None:
    """Go on from it. Collective; it is looked at whole before any of it is loaded.

    Raises:
        CheckpointError: it is no state, damaged, or of another model, number of ranks or stage of ZeRO.
    """
    check_manifest(path, tensors, dist.get_world_size())
    if not (path / _tag(engine)).is_dir():
        stages = sorted(folder.name.removeprefix("zero-") for folder in path.glob("zero-*"))
        raise CheckpointError(
            f"{path} is a state of ZeRO stage {', '.join(stages) or 'unknown'}, and this trainer's is"
            f" {engine.zero_optimization_stage()}",
            todo=f"resume with trainer.zero_stage={stages[0]}" if stages else EARLIER,
        )
    with checkpoint_errors(f"the trainer's state in {path} cannot be read", EARLIER):
        random_state = torch.load(_random_file(engine, path), weights_only=True)
        engine.load_checkpoint(str(path), tag=_tag(engine))
        torch.set_rng_state(random_state["cpu"])
        if "cuda" in random_state:
            torch.cuda.set_rng_state(random_state["cuda"])


def _tag(engine: Any) -> str:
    """The folder that DeepSpeed writes to, named after the stage: files of one are no files of the other."""
    return f"zero-{engine.zero_optimization_stage()}"


def _random_file(engine: Any, path: Path) -> Path:
    return path / _tag(engine) / f"random_state_rank_{dist.get_rank()}.pt"


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state
