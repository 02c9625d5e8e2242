"""The tensors of a model's directory, with which an engine's parameters and what is published are compared."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rlbridge.errors import LayoutError
from rlbridge.weights.layout import TensorMeta

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


class Checkpoint:
    """The tensors of a directory's safetensors files.

    Raises:
        LayoutError: the directory has none.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        index = directory / "model.safetensors.index.json"
        if index.is_file():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        else:
            names = sorted(p.name for p in directory.glob("*.safetensors"))
        if not names:
            raise LayoutError(f"{directory} has no safetensors files, which weights in place are compared with")
        self._metas: dict[str, TensorMeta] = {}
        self._file_of: dict[str, str] = {}
        for file in names:
            for name, meta in _header(directory / file).items():
                if meta["dtype"] not in _DTYPES:
                    raise LayoutError(f"{file} has a tensor of dtype {meta['dtype']}, which cannot be replaced", tensor=name)
                self._metas[name] = TensorMeta(name, tuple(meta["shape"]), _DTYPES[meta["dtype"]])
                self._file_of[name] = file

    def tensors(self) -> Sequence[TensorMeta]:
        """All of them."""
        return list(self._metas.values())

    def check_shapes(self, tensors: Sequence[TensorMeta]) -> None:
        """Hold what is published under these names to the shapes here: a loader that cuts a part out takes too large a tensor.

        Raises:
            LayoutError: one has another shape.
        """
        for meta in tensors:
            own = self._metas.get(meta.name)
            if own is not None and own.shape != meta.shape:
                shapes = f"shape {meta.shape}, and the engine's model has {own.shape}"
                raise LayoutError(f"the trainer publishes this tensor with {shapes}", role="generator", tensor=meta.name)

    def read(self, name: str, box: tuple[slice, ...] = ()) -> torch.Tensor:
        """A box of one, or all of it."""
        file = self._open(self._file_of[name])
        part: torch.Tensor = file.get_slice(name)[box] if box else file.get_tensor(name)
        return part

    @functools.cache  # noqa: B019  (as many as there are files, and the checkpoint lives as long as its sink)
    def _open(self, file: str) -> Any:
        from safetensors import safe_open

        return safe_open(self._directory / file, "pt")


def checkpoint_of(path: str) -> Checkpoint:
    """The checkpoint in a directory, or of a name on the Hugging Face hub that was just loaded.

    Raises:
        LayoutError: it has no safetensors files.
    """
    if Path(path).is_dir():
        return Checkpoint(Path(path))
    from huggingface_hub import snapshot_download

    return Checkpoint(Path(snapshot_download(path, local_files_only=True)))


def _header(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header: dict[str, Any] = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    return header
