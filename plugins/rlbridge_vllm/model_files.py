"""A model's directory: what is in it, before vLLM is asked to load it."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from rlbridge.errors import LayoutError, ModelError
from rlbridge.weights.model_files import checkpoint_of


def check_directory(path: str) -> None:
    """Refuse a directory that no engine could load. What is no directory may be a name on the Hugging Face hub.

    Raises:
        ModelError: it has no configuration, or no safetensors files.
    """
    directory = Path(path)
    if not directory.exists():
        return
    if not (directory / "config.json").is_file():
        raise ModelError(f"{path} holds no model: it has no config.json", role="generator")
    if next(directory.glob("*.safetensors"), None) is None:
        todo = "updates are compared with them; transformers' save_pretrained writes them"
        raise ModelError(f"{path} has no weights as safetensors files", role="generator", todo=todo)


def has_tokenizer(path: str) -> bool:
    """Whether a directory has the files of a tokenizer; what is no directory may have them."""
    return not Path(path).exists() or next(Path(path).glob("tokenizer*"), None) is not None


def stop_ids(path: str, *, trust_remote_code: bool = False) -> set[int]:
    """The model's own end-of-sequence tokens, as transformers reads them."""
    from transformers import AutoConfig, GenerationConfig

    try:
        found = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:
        found = getattr(AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code), "eos_token_id", None)
    return set(found) if isinstance(found, list) else {found} - {None}


def checkpoint_bytes(path: str, dtype: str) -> int:
    """Bytes of all tensors, with floating-point numbers of more than one byte in `dtype`; 0 where no file says it."""
    try:
        tensors = checkpoint_of(path).tensors()
    except (LayoutError, OSError, ValueError):
        return 0
    served = getattr(torch, dtype).itemsize
    return sum(
        math.prod(meta.shape) * (served if width.is_floating_point and width.itemsize > 1 else width.itemsize)
        for meta, width in ((meta, getattr(torch, meta.dtype)) for meta in tensors)
    )
