"""The checkpoints of a run: whole directories, written beside their place and renamed into it.

A checkpoint holds `trainer/` (the trainer's sharded state), `model/` (a Hugging Face directory) and `run.json`. A directory
that is not whole has another name, so the newest checkpoint is always one that can be used.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlbridge.errors import CheckpointError, RlbridgeError

_PREFIX = "step-"
_PARTIAL = ".partial"


def save_checkpoint(directory: Path, step: int, state: dict[str, Any], write: Callable[[str, str], None], keep: int) -> Path:
    """Write the checkpoint of `step` under `directory`, then delete all but the newest `keep`.

    Args:
        directory: The run's `checkpoints/`.
        step: The step that is finished.
        state: The run's own state, as JSON.
        write: Called with ("save_state", path) and ("save", path): the trainer writes there.
        keep: How many checkpoints stay.

    Raises:
        CheckpointError: it could not be written. What was written of it is removed; earlier checkpoints are untouched.
    """
    target = directory / f"{_PREFIX}{step:06d}"
    if target.exists():
        return target
    partial = target.with_name(target.name + _PARTIAL)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write("save_state", str(partial / "trainer"))
        write("save", str(partial / "model"))
        (partial / "run.json").write_text(json.dumps({"step": step, **state}, indent=1) + "\n")
        partial.rename(target)
    except (OSError, RlbridgeError) as error:
        left = latest_checkpoint(directory)
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written: {error.what if isinstance(error, RlbridgeError) else error}",
            todo=f"the newest checkpoint is {left}" if left else "there is no earlier checkpoint",
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # renamed by now, unless it was not finished
    for old in _checkpoints(directory)[:-keep]:
        shutil.rmtree(old)
    return target


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest whole checkpoint under `directory`."""
    found = _checkpoints(directory)
    return found[-1] if found else None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The run's own state out of a checkpoint.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    try:
        state = json.loads((checkpoint / "run.json").read_text())
        return {**state, "step": int(state["step"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"the checkpoint {checkpoint} is damaged: {error}", todo="delete it, and the one before it is used"
        ) from error


def _checkpoints(directory: Path) -> list[Path]:
    found = [p for p in directory.glob(f"{_PREFIX}*") if p.is_dir() and p.name.removeprefix(_PREFIX).isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix(_PREFIX)))
