"""A model as a Hugging Face directory, written from tensors that several ranks hold."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError

from rlbridge.errors import CheckpointError

_BESIDE_THE_WEIGHTS = {".json", ".txt", ".model", ".jinja", ".tiktoken"}


def save_directory(tensors: Iterable[tuple[str, torch.Tensor]], model: Any, source: Path, path: Path) -> None:
    """Write a model that transformers loads to `path`, with the tokenizer of `source`. Collective; rank 0 writes.

    The directory appears whole or not at all.

    Args:
        tensors: Names and full tensors as the checkpoint has them (`export_full`), on every rank. A tensor need only live until
            the next is asked for.
        model: The transformers model, for its configs.
        source: The directory that the model was loaded from.
        path: The directory to write, or to replace.

    Raises:
        CheckpointError: it could not be written; on every rank.
    """
    keep = dist.get_rank() == 0
    state = {}
    for name, tensor in tensors:
        if keep:
            state[name] = tensor.detach().to("cpu", copy=True)
    _on_rank_0(lambda: _write(state, model, source, path), path)


def _write(state: dict[str, torch.Tensor], model: Any, source: Path, path: Path) -> None:
    part = path.with_name(f".{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir()
        save_torch_state_dict(state, part)
        _write_configs(model, part)
        _copy_tokenizer(source, part)
        _replace(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write_configs(model: Any, target: Path) -> None:
    """config.json in the dtype that the parameters have, and generation_config.json."""
    config = model.config
    before = config.dtype
    config.dtype = model.dtype
    try:
        config.save_pretrained(target)
    finally:
        config.dtype = before
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(target)


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
