"""A Hugging Face model directory: its tensors read and written, and the dtypes that they are held in."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rlbridge.errors import CheckpointError, ModelError
from rlbridge_conformance.reference.config import HEAD, ModelConfig

_CASTABLE = {torch.float16, torch.bfloat16, torch.float32, torch.float64}  # float8 means nothing without its scales
_BESIDE_THE_WEIGHTS = {".json", ".txt", ".model", ".jinja"}


def read_tensors(path: Path, config: ModelConfig) -> dict[str, torch.Tensor]:
    """Every tensor of the directory's safetensors files, by name; a tied head is left out.

    Raises:
        ModelError: there are no files, they are damaged, or a tensor of the model is missing or of another shape.
    """
    found: dict[str, torch.Tensor] = {}
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{path} holds no safetensors files", todo="give a Hugging Face model directory")
    for file in files:
        try:
            found |= load_file(file)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file} cannot be read: {error}", todo="copy the model again") from error
    if config.tied:
        found.pop(HEAD, None)
    for name, shape in config.shapes().items():
        if name not in found:
            raise ModelError(f"the model in {path} lacks a tensor that its config asks for", tensor=name)
        if tuple(found[name].shape) != shape:
            raise ModelError(
                f"a tensor in {path} has shape {list(found[name].shape)}, its config asks for {list(shape)}", tensor=name
            )
    return found


def held_dtype(found: torch.dtype, wanted: str, *, keep: bool) -> torch.dtype:
    """The dtype in which a backend holds a tensor that the file has as `found`: floating ones in `wanted`, unless kept."""
    dtype: torch.dtype = getattr(torch, wanted)
    return found if keep or found not in _CASTABLE else dtype


def can_walk(tensor: torch.Tensor) -> bool:
    """Whether a step of training moves the tensor."""
    return tensor.dtype in _CASTABLE


def write_tensors(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write `tensors` as one safetensors file, row-major.

    Raises:
        CheckpointError: it could not be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} could not be written: {error}", todo="make room, or save elsewhere") from error


def copy_beside(source: Path, target: Path) -> None:
    """Copy what a model directory holds beside its weights: the configs and the tokenizer.

    Raises:
        CheckpointError: a file could not be copied.
    """
    try:
        for file in sorted(source.iterdir()):
            if file.suffix in _BESIDE_THE_WEIGHTS and not file.name.endswith(".index.json"):
                shutil.copyfile(file, target / file.name)
    except OSError as error:
        raise CheckpointError(f"{target} could not be completed: {error}", todo="make room, or save elsewhere") from error
