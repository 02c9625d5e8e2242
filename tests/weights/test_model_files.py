"""A checkpoint's files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rlbridge.errors import LayoutError
from rlbridge.weights.layout import TensorMeta
from rlbridge.weights.model_files import Checkpoint


def test_a_checkpoint_is_read_box_by_box_over_its_files(tmp_path: Path) -> None:
    a, b = torch.arange(12.0).reshape(3, 4), torch.arange(5).to(torch.bfloat16)
    save_file({"a": a}, tmp_path / "model-1.safetensors")
    save_file({"b": b}, tmp_path / "model-2.safetensors")
    weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "unused.safetensors").write_bytes(b"not one of the model's")
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.tensors() == [TensorMeta("a", (3, 4), "float32"), TensorMeta("b", (5,), "bfloat16")]
    assert torch.equal(checkpoint.read("a", (slice(1, 2), slice(2, 4))), a[1:2, 2:4])
    assert torch.equal(checkpoint.read("b"), b)


def test_a_tensor_of_another_shape_is_refused_though_a_part_could_be_cut_out_of_it(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(4, 4)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    checkpoint.check_shapes([TensorMeta("a", (4, 4), "bfloat16"), TensorMeta("other", (9,), "float32")])
    with pytest.raises(LayoutError, match=r"\(8, 4\).*\(4, 4\)"):
        checkpoint.check_shapes([TensorMeta("a", (8, 4), "float32")])


def test_a_model_without_safetensors_cannot_be_compared(tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match="no safetensors files"):
        Checkpoint(tmp_path)
