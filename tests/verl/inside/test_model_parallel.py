"""Engines whose ranks compute on the same rows, as Megatron's do. There is no Megatron on a CPU: a stand-in takes its place.

The stand-in is verl's FSDP2 engine, registered as "megatron": it takes Megatron's configs, calls all ranks one data-parallel
rank, and gives outputs on the first alone. What it shows is the trainer's part of the contract, not Megatron.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from tests.models import tiny_qwen3
from tests.native.ranks import on_ranks
from tests.native.training import assert_published_whole, publish, trained
from tests.verl.inside.tasks import score, stand_in

MEGATRON = {
    "strategy": "megatron",
    "dtype": "bfloat16",
    "tensor_model_parallel_size": 2,
    "workers": 2,
    "resources": {"gpus": 1},
    "engine_config": {"use_distributed_optimizer": True},
}


@pytest.fixture
def qwen3(tmp_path: Path) -> Path:
    return tiny_qwen3(tmp_path / "model", tied=True)


def test_a_group_of_ranks_is_given_the_rows_of_all(qwen3: Path, tmp_path: Path) -> None:
    settings = {"backend": "verl", "kl_coef": 0.1}
    alone = trained(qwen3, tmp_path, ranks=1, options={"dtype": "bfloat16"}, **settings)
    group = trained(qwen3, tmp_path, ranks=2, options=MEGATRON, first=stand_in, **settings)
    assert group[0][0] == group[0][1]
    for a, b in zip(group[0][0], alone[0][0], strict=True):
        assert a == pytest.approx(b, rel=0.02, abs=1e-3)  # bf16: 8 bits, and another order of additions


def test_scores_are_on_every_rank_of_the_group(qwen3: Path, tmp_path: Path) -> None:
    (alone,) = on_ranks(1, score, qwen3, tmp_path, backend="verl", options={"dtype": "bfloat16"})
    for scores in on_ranks(2, score, qwen3, tmp_path, backend="verl", options=MEGATRON, first=stand_in):
        assert np.abs(scores - alone).max() < 0.05


def test_what_verl_exports_is_published_and_saved(qwen3: Path, tmp_path: Path) -> None:
    arguments = {"path": tmp_path / "saved"}
    results = on_ranks(2, publish, qwen3, tmp_path, backend="verl", options=MEGATRON, arguments=arguments, first=stand_in)
    assert {kind for kind, _, _ in results} == {"GatheredSource"}
    assert all(layout.regions for _, layout, _ in results)
    assert_published_whole(results, load_file(tmp_path / "saved" / "model.safetensors"))
