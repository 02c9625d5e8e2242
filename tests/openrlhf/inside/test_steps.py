"""The OpenRLHF trainer on real ranks: its steps against those of the native trainer, and what it refuses."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from rlbridge.errors import ModelError, RlbridgeError
from rlbridge.roles.batch import Batch
from rlbridge_openrlhf.trainer import OpenRLHFTrainer
from tests.models import of_no_known_type, tiny_llama, tiny_qwen3, tiny_qwen3_moe, without_a_tensor
from tests.native.ranks import make_batch, on_ranks
from tests.native.training import train, trained

STAGES = pytest.mark.parametrize("stage", [2, 3])
DECAY = 0.01 * 0.005
"""The weight decay of `on_ranks`, times the rate of its first step of two of warm-up."""

Training = tuple[list[Any], dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen3(tmp_path_factory.mktemp("qwen3"), tied=True)


def one_step(model: Path, tmp_path: Path, ranks: int, **settings: Any) -> Training:
    path = tmp_path / f"one-step-{len(list(tmp_path.iterdir()))}"
    arguments = {"path": path, "batches": [make_batch(seed=1, temperature=0.8)]}
    return on_ranks(ranks, train, model, tmp_path, arguments=arguments, **settings), load_file(path / "model.safetensors")


def assert_trained_alike(ours: Training, other: Training) -> None:
    """Metrics agree to 1e-4 and weights to 5e-6, the round-off of float32: the same formula is computed in another order."""
    for a, b in zip(ours[0][0], other[0][0], strict=True):
        shared = a.keys() & b.keys()
        assert {n: a[n] for n in shared} == pytest.approx({n: b[n] for n in shared}, rel=1e-4, abs=1e-6)
    for name, tensor in ours[1].items():
        torch.testing.assert_close(tensor, other[1][name], rtol=1e-5, atol=5e-6, msg=name)


@STAGES
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_is_that_of_the_native_trainer(qwen3: Path, tmp_path: Path, ranks: int, stage: int) -> None:
    native = one_step(qwen3, tmp_path, 1)
    ours = one_step(qwen3, tmp_path, ranks, backend="openrlhf", options={"zero_stage": stage})
    start = load_file(qwen3 / "model.safetensors")
    for name in (name for name in start if "norm" in name):  # OpenRLHF decays no norms and biases, the native trainer all
        ours[1][name] -= DECAY * start[name]
    assert all(metrics == ours[0][0] for metrics in ours[0])
    assert_trained_alike(ours, native)


@STAGES
def test_the_penalty_is_that_of_the_native_trainer(qwen3: Path, tmp_path: Path, stage: int) -> None:
    (*_, native), _ = trained(qwen3, tmp_path, ranks=1, kl_coef=0.5)
    (*_, ours), _ = trained(qwen3, tmp_path, ranks=2, kl_coef=0.5, backend="openrlhf", options={"zero_stage": stage})
    shared = {"loss", "grad_norm", "kl", "lr"}
    assert ours[1]["kl"] > 0.01
    # To 1e-3 in the second step, since norms have been decayed in the one and not in the other.
    assert {n: ours[1][n] for n in shared} == pytest.approx({n: native[1][n] for n in shared}, rel=1e-3)


@STAGES
@pytest.mark.parametrize(
    "options",
    [{"micro_batch": 3}, {"gradient_checkpointing_enable": True}, {"grad_accum_dtype": "fp32", "micro_batch": 1}],
    ids=lambda options: next(iter(options)),
)
def test_an_option_that_saves_memory_changes_no_step(qwen3: Path, tmp_path: Path, options: Any, stage: int) -> None:
    plain = trained(qwen3, tmp_path, ranks=2, kl_coef=0.1, backend="openrlhf", options={"zero_stage": stage})
    options = options | {"zero_stage": stage}
    other = trained(qwen3, tmp_path, ranks=2, kl_coef=0.1, backend="openrlhf", options=options)
    assert_trained_alike(other, plain)


@STAGES
def test_a_bfloat16_step_goes_the_way_of_a_float32_one(qwen3: Path, tmp_path: Path, stage: int) -> None:
    start = load_file(qwen3 / "model.safetensors")
    options = {"zero_stage": stage}
    wide = trained(qwen3, tmp_path, ranks=2, backend="openrlhf", options=options)
    narrow = trained(qwen3, tmp_path, ranks=2, backend="openrlhf", options=options | {"dtype": "bfloat16", "micro_batch": 2})
    assert narrow[0][0][0]["loss"] == pytest.approx(wide[0][0][0]["loss"], rel=0.05)
    steps = [torch.cat([(run[1][name].float() - t).flatten() for name, t in start.items()]) for run in (wide, narrow)]
    assert float(torch.nn.functional.cosine_similarity(steps[0], steps[1], dim=0)) > 0.9


@STAGES
@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen3_moe])
def test_other_models_are_trained_too(make: Any, tmp_path: Path, stage: int) -> None:
    model = make(tmp_path / "model")
    native = trained(model, tmp_path, ranks=2)
    ours = trained(model, tmp_path, ranks=2, backend="openrlhf", options={"zero_stage": stage})
    assert ours[0][0][0]["loss"] == pytest.approx(native[0][0][0]["loss"], rel=1e-4)
    assert ours[0][0][0]["grad_norm"] == pytest.approx(native[0][0][0]["grad_norm"], rel=1e-3)


def test_entropy_is_reported_where_it_is_asked_for(qwen3: Path, tmp_path: Path) -> None:
    native, _ = trained(qwen3, tmp_path, ranks=1)
    options = {"entropy_coef": 0.0, "micro_batch": 2}
    (ours, _), _ = trained(qwen3, tmp_path, ranks=2, backend="openrlhf", options=options)
    assert ours[0]["entropy"] == pytest.approx(native[0][0]["entropy"], rel=1e-4)
    assert ours[0]["loss"] == pytest.approx(native[0][0]["loss"], rel=1e-4)


def test_an_entropy_bonus_and_a_second_clip_change_the_step(qwen3: Path, tmp_path: Path) -> None:
    plain, *others = (
        trained(qwen3, tmp_path, ranks=1, backend="openrlhf", options=options)[0][0][0]
        for options in ({}, {"entropy_coef": 0.5}, {"dual_clip": 1.01})
    )
    assert others[0]["loss"] == pytest.approx(plain["loss"] - 0.5 * others[0]["entropy"], rel=1e-4)
    assert others[1]["loss"] < plain["loss"]


def break_a_step(trainer: OpenRLHFTrainer, path: Path, batch: Batch) -> dict[str, float]:
    with pytest.raises(RlbridgeError, match=r"step 1: the loss is nan.*the weights are untouched"):
        trainer.train_step(batch.shard(dist.get_rank(), dist.get_world_size()))
    trainer.save(path)
    return trainer.train_step(make_batch().shard(dist.get_rank(), dist.get_world_size()))


@STAGES
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("micro_batch", [0, 1])
def test_a_loss_that_is_not_finite_leaves_weights_and_schedule_alone(
    qwen3: Path, tmp_path: Path, dtype: str, stage: int, micro_batch: int
) -> None:
    options = {"zero_stage": stage, "dtype": dtype, "micro_batch": micro_batch}
    batch = make_batch()
    batch.advantages_B[0] = np.nan  # a row of rank 0 only, and not of its last micro-batch
    arguments = {"path": tmp_path / "saved", "batch": batch}
    broken = on_ranks(2, break_a_step, qwen3, tmp_path, backend="openrlhf", options=options, arguments=arguments)
    before, after = (load_file(path / "model.safetensors") for path in (qwen3, tmp_path / "saved"))
    assert all(torch.equal(before[name].to(tensor.dtype), tensor) for name, tensor in after.items())
    arguments = {"path": tmp_path / "other", "batches": [make_batch()]}
    whole = on_ranks(2, train, qwen3, tmp_path, backend="openrlhf", options=options, arguments=arguments)
    assert broken == [metrics[0] for metrics in whole]  # as if the step had not been tried


def _compile_elsewhere(directory: Path) -> None:
    os.environ["TORCH_EXTENSIONS_DIR"] = str(directory)


@STAGES
def test_nothing_is_compiled_without_a_gpu(qwen3: Path, tmp_path: Path, stage: int) -> None:
    extensions = tmp_path / "extensions"
    settings = {"options": {"zero_stage": stage, "entropy_coef": 0.0}, "first": partial(_compile_elsewhere, extensions)}
    trained(qwen3, tmp_path, ranks=2, backend="openrlhf", **settings)
    assert not extensions.exists()


def load_only(trainer: OpenRLHFTrainer) -> None:
    """Setting it up is what is tested."""


def _t5(path: Path) -> Path:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
    T5ForConditionalGeneration(T5Config(**sizes)).save_pretrained(path)
    return path


def _of_other_shapes(path: Path) -> Path:
    path = tiny_qwen3(path)
    tensors = load_file(path / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


@STAGES
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (_t5, "T5Config"),
        (of_no_known_type, "qwen3000"),
        (without_a_tensor, "lacks 1 of its tensors, 'model.norm.weight' the first"),
        (_of_other_shapes, r"model\.norm\.weight.*31"),
    ],
    ids=["another class", "unknown type", "a tensor is missing", "a tensor has another shape"],
)
def test_what_cannot_be_trained_is_refused_by_name(make: Any, said: str, tmp_path: Path, stage: int) -> None:
    with pytest.raises(ModelError, match=said):
        on_ranks(1, load_only, make(tmp_path / "model"), tmp_path, backend="openrlhf", options={"zero_stage": stage})
