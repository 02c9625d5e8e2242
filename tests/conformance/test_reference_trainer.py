"""The reference trainer: its steps, its state, the models that it saves, and its ranks that meet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rlbridge.errors import CheckpointError, DeadlineError
from tests.conformance.reference_parties import make_trainer, make_trainers, some_batch, some_sequences, transformers_logprobs


def test_ranks_take_the_same_steps(untied: Path) -> None:
    trainers = [make_trainer(untied, rank=rank, ranks=2) for rank in range(2)]
    before = {name: tensor.clone() for name, tensor in trainers[0].tensors.items()}
    metrics = [trainer.train_step(some_batch().shard(trainer.context.rank, 2)) for trainer in trainers]
    for name, tensor in trainers[0].tensors.items():
        assert torch.equal(tensor, trainers[1].tensors[name])
        assert not torch.equal(tensor, before[name])
    change = torch.cat([(trainers[0].tensors[name] - before[name]).flatten() for name in before])
    assert metrics[0]["grad_norm"] == metrics[1]["grad_norm"] == pytest.approx(float(change.norm()), rel=1e-3)
    assert metrics[0]["loss"] > 1


def test_state_goes_on_exactly(model: Path, tmp_path: Path) -> None:
    trainer = make_trainer(model, contiguous=False)
    trainer.train_step(some_batch())
    trainer.save_state(tmp_path)
    trainer.train_step(some_batch())
    resumed = make_trainer(model)
    addresses = {name: tensor.data_ptr() for name, tensor in resumed.tensors.items()}
    resumed.load_state(tmp_path)
    resumed.train_step(some_batch())
    for name, tensor in trainer.tensors.items():
        assert torch.equal(tensor, resumed.tensors[name])
        assert resumed.tensors[name].data_ptr() == addresses[name]


def test_state_of_another_model_is_refused(model: Path, untied: Path, tmp_path: Path) -> None:
    make_trainer(model).save_state(tmp_path)
    with pytest.raises(CheckpointError, match=r"'extra.bytes' is int8\[127\] there, absent here"):
        make_trainer(untied).load_state(tmp_path)
    with pytest.raises(CheckpointError, match="rank 1 of 2"):
        make_trainer(model, rank=1, ranks=2).load_state(tmp_path)
    file = tmp_path / "rank-0-of-1.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="cannot be read"):
        make_trainer(model).load_state(tmp_path)


def test_saved_model_is_one_that_transformers_loads(untied: Path, tmp_path: Path) -> None:
    trainer = make_trainer(untied, dtype="bfloat16")
    trainer.train_step(some_batch())
    trainer.save(tmp_path / "saved")
    make_trainer(untied, rank=1, ranks=2).save(tmp_path / "not")
    assert not (tmp_path / "not").exists()
    sequences = some_sequences(temperature=1.0)
    np.testing.assert_allclose(trainer.score(sequences), transformers_logprobs(tmp_path / "saved", sequences), atol=1e-4)
    assert {file.name for file in (tmp_path / "saved").iterdir()} == {file.name for file in untied.iterdir()}


def test_gathering_without_a_rank_ends_at_its_deadline(model: Path, tmp_path: Path) -> None:
    trainers = make_trainers(model, tmp_path, 2, shards="gathered", timeout=3.0)
    with pytest.raises(DeadlineError, match=r"did not gather 'extra\.bytes' within 3 s"):
        list(trainers[0].export())
