"""The verl trainer on real ranks: its steps against those of the native trainer, what it publishes, and what it refuses."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rlbridge.errors import ModelError
from tests.models import of_no_known_type, tiny_llama, tiny_qwen3, tiny_qwen3_moe, without_a_tensor
from tests.native.ranks import make_batch, on_ranks
from tests.native.training import assert_published_whole, publish, trained
from tests.verl.inside.tasks import break_a_step, forbid_gathers, kl_of_two_steps, load_only, load_the_state, save_the_state

NO_DUAL_CLIP = {"clip_ratio_c": 1e6}
"""verl's loss has a second clip, where the advantage is negative, which the native one has not."""


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen3(tmp_path_factory.mktemp("qwen3"), tied=True)


def assert_trained_alike(ours: tuple[list[Any], dict[str, torch.Tensor]], other: Any) -> None:
    """Losses, gradient norms and weights agree to the round-off of float32: both compute the same formula in another order."""
    for a, b in zip(ours[0][0], other[0][0], strict=True):
        shared = {name for name in ("loss", "grad_norm", "kl", "lr") if name in b}
        assert {name: a[name] for name in shared} == pytest.approx({name: b[name] for name in shared}, rel=1e-4, abs=1e-6)
    for name, tensor in ours[1].items():
        torch.testing.assert_close(tensor, other[1][name], rtol=1e-5, atol=5e-6, msg=name)


@pytest.mark.parametrize("ranks", [1, 2])
def test_steps_are_those_of_the_native_trainer(qwen3: Path, tmp_path: Path, ranks: int) -> None:
    native = trained(qwen3, tmp_path, ranks=1, kl_coef=0.1)
    verl = trained(qwen3, tmp_path, ranks=ranks, kl_coef=0.1, backend="verl", options=NO_DUAL_CLIP)
    assert all(metrics == verl[0][0] for metrics in verl[0])
    assert_trained_alike(verl, native)


@pytest.mark.parametrize(
    "options",
    [
        {"micro_batch": 3},
        {"use_dynamic_bsz": True, "ppo_max_token_len_per_gpu": 40},
        {"use_remove_padding": True},
        {"enable_gradient_checkpointing": True},
        {"param_offload": True, "optimizer_offload": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_an_option_that_saves_memory_changes_no_step(qwen3: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    plain = trained(qwen3, tmp_path, ranks=2, backend="verl")
    assert_trained_alike(trained(qwen3, tmp_path, ranks=2, backend="verl", options=options), plain)


def test_entropy_is_reported_where_it_is_asked_for(qwen3: Path, tmp_path: Path) -> None:
    native, _ = trained(qwen3, tmp_path, ranks=1)
    verl, _ = trained(qwen3, tmp_path, ranks=2, backend="verl", options={"calculate_entropy": True})
    assert verl[0][0]["entropy"] == pytest.approx(native[0][0]["entropy"], rel=1e-3)


@pytest.mark.parametrize(
    ("make", "ranks", "dtype"),
    [
        (partial(tiny_qwen3, tied=True), 2, "bfloat16"),
        (tiny_llama, 1, "float32"),
        (tiny_qwen3_moe, 2, "float32"),
    ],
)
@pytest.mark.parametrize("weights", ["sharded", "gathered"])
def test_the_ranks_publish_each_saved_element_once(make: Any, ranks: int, dtype: str, weights: str, tmp_path: Path) -> None:
    model = make(tmp_path / "model")
    results = on_ranks(
        ranks,
        publish,
        model,
        tmp_path,
        backend="verl",
        options={"dtype": dtype, "weights": weights},
        arguments={"path": tmp_path / "saved", "before": forbid_gathers if weights == "sharded" else None},
    )
    assert {kind for kind, _, _ in results} == {"ShardedSource" if weights == "sharded" else "GatheredSource"}
    assert_published_whole(results, load_file(tmp_path / "saved" / "model.safetensors"))
    assert all(layout.regions for _, layout, _ in results)


def test_replicas_of_a_shard_own_equal_regions(qwen3: Path, tmp_path: Path) -> None:
    arguments = {"path": tmp_path / "saved"}
    results = on_ranks(2, publish, qwen3, tmp_path, backend="verl", options={"fsdp_size": 1}, arguments=arguments)
    assert results[0][1].regions == results[1][1].regions  # the plan takes each from one of them
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    for result in results:
        assert_published_whole([result], saved)


def test_adapters_are_published_merged(qwen3: Path, tmp_path: Path) -> None:
    results = on_ranks(
        2,
        publish,
        qwen3,
        tmp_path,
        backend="verl",
        kl_coef=0.1,
        options={"lora_rank": 4, "lora_merge": True},
        arguments={"path": tmp_path / "saved"},
    )
    saved, base = (load_file(path / "model.safetensors") for path in (tmp_path / "saved", qwen3))
    assert_published_whole(results, saved)
    projections = {name for name in saved if name.endswith("_proj.weight")}
    assert projections
    moved = {name for name, tensor in saved.items() if not torch.equal(tensor, base[name].to(tensor.dtype))}
    assert moved == projections


def test_the_reference_of_adapters_is_the_base_without_them(qwen3: Path, tmp_path: Path) -> None:
    options = {"lora_rank": 4, "lora_merge": True}
    first, second = on_ranks(2, kl_of_two_steps, qwen3, tmp_path, backend="verl", kl_coef=0.1, options=options)[0]
    assert first == pytest.approx(0.0, abs=1e-6)
    assert second > 1e-7


def test_a_loss_that_is_not_finite_leaves_weights_and_schedule_alone(qwen3: Path, tmp_path: Path) -> None:
    batch = make_batch()
    batch.advantages_B[0] = np.nan  # a row of rank 0 only
    arguments = {"path": tmp_path / "saved", "batch": batch}
    rates = on_ranks(2, break_a_step, qwen3, tmp_path, backend="verl", arguments=arguments)
    before, after = (load_file(path / "model.safetensors") for path in (qwen3, tmp_path / "saved"))
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    assert rates == [pytest.approx(5e-3)] * 2  # the first of two steps of warm-up to 1e-2


def _bert(path: Path) -> Path:
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 32}
    BertForMaskedLM(BertConfig(**sizes)).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (_bert, "holds a BertForMaskedLM, which is no causal language model"),
        (of_no_known_type, "qwen3000"),
        (without_a_tensor, "lacks 1 of its tensors, 'model.norm.weight' the first"),
    ],
    ids=["another class", "unknown type", "a tensor is missing"],
)
def test_what_verl_cannot_train_is_refused_by_name(make: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=said):
        on_ranks(1, load_only, make(tmp_path / "model"), tmp_path, backend="verl")


def test_the_state_of_another_number_of_ranks_is_refused(qwen3: Path, tmp_path: Path) -> None:
    path = tmp_path / "state"
    on_ranks(2, save_the_state, qwen3, tmp_path, backend="verl", arguments={"path": path})
    (said,) = on_ranks(1, load_the_state, qwen3, tmp_path, backend="verl", arguments={"path": path})
    assert "is the state of 2 trainer ranks, and there are 1" in said
    assert "trainer.workers=2" in said
