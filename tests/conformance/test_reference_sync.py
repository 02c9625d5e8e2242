"""Weights from reference trainers to a reference generator: every bit arrives, and what cannot fit is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rlbridge.errors import LayoutError
from rlbridge.roles.batch import Sampling
from rlbridge_conformance.reference.generator import ReferenceGenerator
from tests.conformance.reference_parties import VOCABULARY, Stage, make_generator, some_sequences
from tests.models import tiny_qwen3

pytestmark = pytest.mark.usefixtures("registered")


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("shards", ["rows", "flat", "gathered"])
@pytest.mark.parametrize("tp", [1, 2])
def test_sync_brings_every_bit(model: Path, tmp_path: Path, shards: str, ranks: int, tp: int) -> None:
    with Stage(model, tmp_path, ranks, tp, shards=shards) as stage:
        for version in (1, 2):
            stage.train()
            report = stage.session.sync(version)
        assert report.wire == "reference over cma"
        assert report.bytes > 2**20
        assert_served(stage, tmp_path / "saved")
        assert stage.engine.generate([[5]], Sampling(2))[0].versions == [2, 2]


@pytest.mark.parametrize("shards", ["rows", "flat", "gathered"])
def test_sync_brings_what_is_transposed_and_rounded(model: Path, tmp_path: Path, shards: str) -> None:
    with Stage(model, tmp_path, 2, 2, {"dtype": "bfloat16"}, shards=shards, contiguous=False) as stage:
        assert not stage.trainers[0].tensors["extra.large"].is_contiguous()
        stage.train()
        stage.session.sync(1)
        assert_served(stage, tmp_path / "saved", torch.bfloat16)


def test_sync_brings_every_dtype_of_the_files(model: Path, tmp_path: Path) -> None:
    with Stage(model, tmp_path, 2, 2, {"keep_dtypes": True}, shards="rows", keep_dtypes=True) as stage:
        stage.train()
        stage.session.sync(1)
        assert_served(stage, tmp_path / "saved")
        held = stage.generator.ranks[1].parameters
        assert (held["extra.half"].dtype, held["extra.bytes"].dtype) == (torch.float16, torch.int8)


def test_barrier_reads_the_replica_in_place(model: Path, tmp_path: Path) -> None:
    with Stage(model, tmp_path, 2, 1, publish="barrier", shards="rows") as stage:
        for version in (1, 2):
            stage.train()
            stage.session.sync(version)
        assert_served(stage, tmp_path / "saved")
        for trainer, publisher in zip(stage.trainers, stage.publishers, strict=True):
            storages = {tensor.untyped_storage().data_ptr() for tensor in trainer.tensors.values()}
            assert {view.untyped_storage().data_ptr() for view in publisher._slots[0].segments} <= storages


def test_ranks_that_share_a_key_value_head_are_synced(model: Path, tmp_path: Path) -> None:
    with Stage(model, tmp_path, 2, 4) as stage:
        stage.train()
        stage.session.sync(1)
        stage.trainers[0].save(tmp_path / "saved")
        for rank, loaded in zip(stage.generator.ranks, make_generator(tmp_path / "saved", tp=4).ranks, strict=True):
            assert all(torch.equal(tensor, loaded.parameters[name]) for name, tensor in rank.parameters.items())


def test_sync_names_a_tensor_that_the_engine_has_not(model: Path, untied: Path, tmp_path: Path) -> None:
    with Stage(model, tmp_path, 1, 1, served=untied) as stage, pytest.raises(LayoutError, match="no such tensor") as error:
        stage.session.sync(1)
    assert error.value.where["tensor"] == "extra.bytes"


def test_sync_refuses_a_head_of_its_own_where_the_engine_ties_it(untied: Path, tmp_path: Path) -> None:
    tied = tiny_qwen3(tmp_path / "tied", tied=True, vocab_size=VOCABULARY)
    with Stage(untied, tmp_path, 1, 1, served=tied) as stage, pytest.raises(LayoutError, match="written twice") as error:
        stage.session.sync(1)
    assert error.value.where["tensor"] in ("lm_head.weight", "model.embed_tokens.weight")


def test_barrier_refuses_transposed_storage(model: Path, tmp_path: Path) -> None:
    with (
        Stage(model, tmp_path, 1, 1, publish="barrier", contiguous=False) as stage,
        pytest.raises(LayoutError, match="not contiguous"),
    ):
        stage.session.sync(1)


def assert_served(stage: Stage, saved: Path, dtype: torch.dtype | None = None) -> None:
    """The engine holds what `save` writes, bit for bit, wherever it keeps it; and so does its scoring."""
    stage.trainers[0].save(saved)
    expected = load_file(saved / "model.safetensors")
    found = reassembled(stage.generator)
    assert found.keys() - expected.keys() == {"lm_head.weight"}
    for name, tensor in expected.items():
        rounded = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
        assert torch.equal(found[name], rounded), name
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    if dtype is None:
        sequences = some_sequences(temperature=1.0)
        np.testing.assert_allclose(stage.generator.score(sequences), stage.trainers[0].score(sequences), atol=1e-4)


def reassembled(generator: ReferenceGenerator) -> dict[str, torch.Tensor]:
    """The checkpoint tensors, put together again out of the ranks' parameters by hand: 4 query and 2 key-value heads of 8."""
    parts = [rank.parameters for rank in generator.ranks]
    tp = len(parts)
    found: dict[str, torch.Tensor] = {}
    for name in parts[0]:
        if "qkv_proj" in name:
            cuts = [torch.split(part[name], [32 // tp, 16 // tp, 16 // tp]) for part in parts]
            found |= {name.replace("qkv", kind): torch.cat([cut[i] for cut in cuts]) for i, kind in enumerate("qkv")}
        elif "gate_up_proj" in name:
            found[name.replace("gate_up", "gate")] = torch.cat([part[name][: 48 // tp] for part in parts])
            found[name.replace("gate_up", "up")] = torch.cat([part[name][48 // tp :] for part in parts])
        elif "o_proj" in name or "down_proj" in name:
            found[name] = torch.cat([part[name] for part in parts], dim=1)
        elif "embed_tokens" in name or "lm_head" in name:
            found[name] = torch.cat([part[name] for part in parts])
        else:
            assert all(torch.equal(part[name], parts[0][name]) for part in parts)
            found[name] = parts[0][name]
    return found
