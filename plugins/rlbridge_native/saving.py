"""The model as a Hugging Face directory."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor

from rlbridge.errors import CheckpointError
from rlbridge_native.checkpoint import module_tensors

_BESIDE_THE_WEIGHTS = {".json", ".txt", ".model", ".jinja", ".tiktoken"}


def save_directory(model: Any, source: Path, path: Path) -> None:
    """Write `model` to `path` as transformers would, with the tokenizer of `source`. Collective; rank 0 writes.

    The directory appears whole or not at all.

    Raises:
        CheckpointError: it could not be written; on every rank.
    """
    state = _gathered(model, keep=dist.get_rank() == 0)
    _on_rank_0(lambda: _write(model, state, source, path), path)


def _gathered(model: Any, *, keep: bool) -> dict[str, torch.Tensor]:
    """Full tensors on the CPU of a rank that keeps them. Names of one parameter share one, so that it is known as tied."""
    made: dict[int, torch.Tensor] = {}
    state = {}
    for name, tensor in module_tensors(model).items():
        if id(tensor) not in made:
            full = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()
            made[id(tensor)] = full.cpu() if keep else torch.empty(0)
        state[name] = made[id(tensor)]
    return state if keep else {}


def _write(model: Any, state: dict[str, torch.Tensor], source: Path, path: Path) -> None:
    part = path.with_name(f".{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        model.save_pretrained(part, state_dict=state)
        _copy_tokenizer(source, part)
        _replace(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _copy_tokenizer(source: Path, target: Path) -> None:
    for file in sorted(source.iterdir()):
        index = file.name.endswith(".index.json")
        if file.suffix in _BESIDE_THE_WEIGHTS and file.is_file() and not index and not (target / file.name).exists():
            shutil.copyfile(file, target / file.name)


def _replace(new: Path, path: Path) -> None:
    """Rename `new` to `path`; what was there is moved aside first, since a directory is not renamed over another."""
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    new.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def _on_rank_0(write: Callable[[], None], path: Path) -> None:
    """Run `write` on rank 0 and let every rank know how it went, so that none waits for one that failed."""
    failure: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            write()
        except (OSError, SafetensorError) as error:
            failure[0] = f"{type(error).__name__}: {error}"
    dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise CheckpointError(f"the model could not be written to {path}: {failure[0]}", todo="make room, or save elsewhere")
