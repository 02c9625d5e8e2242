"""A model directory as a sharded model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM

from rlbridge.errors import ModelError


def load_model(path: str, *, dtype: str, attn_implementation: str, trust_remote_code: bool) -> Any:
    """The causal language model of a directory, on the CPU, in eval mode. Nothing is downloaded.

    Raises:
        ModelError: the directory holds no such model, or only a part of one.
    """
    if not (Path(path) / "config.json").is_file():
        raise ModelError(f"{path} is not a model directory: it has no config.json")
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=getattr(torch, dtype),
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelError(f"the model in {path} cannot be loaded: {type(error).__name__}: {error}") from error
    # transformers initialises what the files lack at random, and only logs it.
    lacking = sorted(info["missing_keys"])
    if lacking:
        raise ModelError(f"the model in {path} lacks {len(lacking)} of its tensors, {lacking[0]!r} the first")
    return model


def shard_model(model: Any, mesh: DeviceMesh, compute_dtype: str) -> None:
    """Shard `model` in place over all ranks of `mesh` (FSDP2): each decoder layer, then the rest.

    It moves to the mesh's device. Parameters keep their dtype; the passes run in `compute_dtype`, and gradients are summed over
    the ranks in fp32.
    """
    compute = getattr(torch, compute_dtype)
    policy = MixedPrecisionPolicy(
        param_dtype=None if compute == next(model.parameters()).dtype else compute,
        reduce_dtype=None if compute == torch.float32 else torch.float32,
    )
    layers = [module for module in model.modules() if type(module).__name__ in set(model._no_split_modules or ())]
    for module in (*reversed(layers), model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
