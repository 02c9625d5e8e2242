"""verl's own checkpoints: parameters, optimizer, schedule and random state, looked at whole before any of it is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from rlbridge.huggingface.state_manifest import EARLIER, check_manifest, checkpoint_errors, write_manifest
from rlbridge.weights.layout import TensorMeta


def save_state(engine: Any, path: Path, tensors: Sequence[TensorMeta]) -> None:
    """Let verl write it, then describe it. Collective.

    Raises:
        CheckpointError: it could not be written.
    """
    with checkpoint_errors(f"the trainer's state could not be written to {path}", "make room, or save elsewhere"):
        engine.save_checkpoint(local_path=str(path))
        if dist.get_rank() == 0:
            write_manifest(path, tensors, dist.get_world_size())


def load_state(engine: Any, path: Path, tensors: Sequence[TensorMeta]) -> None:
    """Go on from it. Collective; it is looked at whole before any of it is loaded.

    Raises:
        CheckpointError: it is no state, damaged, or of another model or number of ranks.
    """
    check_manifest(path, tensors, dist.get_world_size())
    with checkpoint_errors(f"the trainer's state in {path} cannot be read", EARLIER):
        engine.load_checkpoint(local_path=str(path), del_local_after_load=False)
