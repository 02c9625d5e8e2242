"""The names and places of checkpoint tensors, against the files that transformers writes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import ConversionOps, WeightConverter

from rlbridge.errors import LayoutError
from rlbridge.huggingface.checkpoint import checkpoint_pieces, checkpoint_tensors, export_full, module_tensors
from rlbridge.weights.provenance import Provenance
from tests.models import tiny_llama, tiny_mixtral, tiny_qwen3, tiny_qwen3_moe

MODELS = {
    "qwen3": tiny_qwen3,
    "qwen3-tied": partial(tiny_qwen3, tied=True),
    "qwen3-bf16": partial(tiny_qwen3, dtype=torch.bfloat16),
    "llama": tiny_llama,
    "qwen3-moe": tiny_qwen3_moe,
    "qwen3-moe-tied": partial(tiny_qwen3_moe, tied=True),
    "mixtral": tiny_mixtral,
}


@pytest.fixture(params=MODELS)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    path = MODELS[request.param](tmp_path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)  # what is checked is where the live values are, not the file that they came from
    model.save_pretrained(tmp_path / "again")
    return model, load_file(tmp_path / "again" / "model.safetensors")


def test_the_tensors_are_those_that_save_pretrained_writes(saved: tuple[Any, dict[str, torch.Tensor]]) -> None:
    model, files = saved
    tensors, _ = checkpoint_pieces(model)
    described = {t.name: (t.shape, t.dtype) for t in tensors if t.alias_of is None}
    assert described == {name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in files.items()}


def test_each_piece_is_the_saved_tensor_bit_for_bit(saved: tuple[Any, dict[str, torch.Tensor]]) -> None:
    model, files = saved
    live = module_tensors(model)
    _, pieces = checkpoint_pieces(model)
    for piece in pieces:
        box = tuple(slice(o, o + n) for o, n in zip(piece.region.offset, piece.region.shape, strict=True))
        assert torch.equal(piece.view(live), files[piece.region.tensor][box])
    assert sum(p.region.numel for p in pieces) == sum(t.numel() for t in files.values())


def test_the_export_is_what_is_saved_in_the_order_of_the_tensors(saved: tuple[Any, dict[str, torch.Tensor]]) -> None:
    model, files = saved
    exported = list(export_full(model))
    assert [name for name, _ in exported] == [t.name for t in checkpoint_tensors(model) if t.alias_of is None]
    assert all(torch.equal(tensor, files[name]) for name, tensor in exported)


def test_a_tied_tensor_is_an_alias_and_an_untied_one_is_not(tmp_path: Path) -> None:
    tied = AutoModelForCausalLM.from_pretrained(tiny_qwen3(tmp_path / "tied", tied=True))
    untied = AutoModelForCausalLM.from_pretrained(tiny_qwen3(tmp_path / "untied"))
    assert {t.name: t.alias_of for t in checkpoint_tensors(tied) if t.alias_of} == {
        "lm_head.weight": "model.embed_tokens.weight"
    }
    assert not [t for t in checkpoint_tensors(untied) if t.alias_of]


def test_pieces_count_from_the_start_of_a_shared_storage(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama(tmp_path))
    block = torch.zeros(5 + 32)
    model.model.norm.weight.data = block[5:]
    _, pieces = checkpoint_pieces(model)
    piece = next(p for p in pieces if p.region.tensor == "model.norm.weight")
    piece.view(module_tensors(model)).fill_(3.0)
    assert block.tolist() == [0.0] * 5 + [3.0] * 32


class Double(ConversionOps):
    """A conversion that computes: the checkpoint holds half of what the parameter is."""

    def __init__(self, factor: float = 2.0) -> None:
        self.factor = factor

    def convert(self, input_dict: Any, source_patterns: Any, target_patterns: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        (value,) = input_dict.values()
        return {target_patterns[0]: (value[0] if isinstance(value, list) else value) * self.factor}

    @property
    def reverse_op(self) -> ConversionOps:
        return Double(1 / self.factor)


def test_a_computed_tensor_has_no_place_but_is_exported(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama(tmp_path))
    model._weight_conversions = [WeightConverter("up_proj.weight", "up_proj.weight", operations=[Double()])]
    with pytest.raises(LayoutError, match=r"layers.0.mlp.up_proj.weight"):
        checkpoint_pieces(model)
    exported = dict(export_full(model))
    assert torch.equal(exported["model.layers.1.mlp.up_proj.weight"], model.model.layers[1].mlp.up_proj.weight.detach() / 2)
    assert [t.name for t in checkpoint_tensors(model)] == list(exported)


@pytest.mark.parametrize(
    "rearrange",
    [
        lambda a, b: a.transpose(0, 1).contiguous()[1:],
        lambda a, b: torch.cat([b, a])[3:8],
        lambda a, b: torch.stack([a[:, :2], b[:, 2:4]], dim=1).reshape(12, 2),
        lambda a, b: a.reshape(3, 2, 4).transpose(0, 1).reshape(6, 4),
        lambda a, b: torch.cat([a.T, b.T]).clone().narrow(1, 1, 3).contiguous(),
    ],
)
def test_rearrangements_are_followed_through_views_and_copies(rearrange: Any) -> None:
    values = {"a": torch.arange(24.0).reshape(6, 4), "b": torch.arange(100.0, 124.0).reshape(6, 4)}
    placeholders = {name: torch.empty_like(value, device="meta") for name, value in values.items()}
    provenance = Provenance(placeholders)
    with provenance:
        result = rearrange(*placeholders.values())
    expected, found = rearrange(*values.values()), torch.full(tuple(result.shape), -1.0)
    for piece in provenance.pieces_of(result, "result"):
        box = tuple(slice(o, o + n) for o, n in zip(piece.region.offset, piece.region.shape, strict=True))
        found[box] = piece.view(values)
    assert torch.equal(found, expected)
    assert provenance.roots_of(result) <= {"a", "b"}


def test_a_placeholder_that_was_written_to_is_not_trusted() -> None:
    placeholder = torch.empty(4, device="meta")
    provenance = Provenance({"a": placeholder})
    with provenance:
        placeholder[1:].mul_(2)
    with pytest.raises(LayoutError, match="computed"):
        provenance.pieces_of(placeholder, "a")
