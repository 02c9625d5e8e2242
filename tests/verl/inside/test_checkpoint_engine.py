"""rlbridge as the wire of a verl job: verl's own trainer ranks, rollout workers and manager, in Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")

from rlbridge.errors import ConfigError, DeadlineError, DigestError, PluginError, RlbridgeError, StaleVersionError
from tests.models import tiny_qwen3
from tests.verl.inside.verl_job import Job, new_engine

_PATIENCE = 60.0


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    """Its embedding, which is tied to the head, is larger than a bucket of 1 MiB."""
    model = tiny_qwen3(tmp_path_factory.mktemp("job") / "model", tied=True, vocab_size=16384)
    job = Job(model, deadline_seconds=_PATIENCE)
    yield job
    job.end()


def assert_served(job: Job, version: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Every replica serves that version, and every tensor of it is the trainer's, rounded to `dtype` on its way."""
    wanted = job.trainers.weights()[0]
    for served, tensors in job.served():
        assert served == version
        assert tensors.keys() == wanted.keys()
        differing = [name for name, tensor in tensors.items() if not torch.equal(tensor, wanted[name].to(dtype).float())]
        assert differing == []
    return dict(wanted)


def test_every_replica_has_every_tensor_after_each_sync(job: Job) -> None:
    before: dict[str, torch.Tensor] = {}
    for version in (1, 2, 3):
        job.trainers.train()
        metrics = job.sync(version)
        weights = assert_served(job, version)
        assert any(not torch.equal(weights[name], before[name]) for name in before) or version == 1
        before = weights
        total = sum(tensor.numel() * 4 for tensor in weights.values())
        assert metrics["rlbridge/bytes"] >= 2 * total  # for two replicas, and the gaps of alignment
        assert metrics["rlbridge/version"] == version


def test_nothing_is_registered_after_the_first_sync(job: Job) -> None:
    job.sync(4)
    before = job.trainers.memory()
    job.sync(5)
    assert job.trainers.memory() == before
    assert {epoch for epoch, _ in before} == {before[0][0]}
    assert len({pointer for _, pointer in before}) == 2  # both ranks hold a share


def test_an_older_version_is_refused_and_the_next_one_is_not(job: Job) -> None:
    with pytest.raises(StaleVersionError, match="version 2 is older than version 5"):
        job.sync(2)
    job.trainers.train()
    job.sync(6)
    assert_served(job, 6)


def test_bytes_that_changed_on_their_way_are_refused(job: Job) -> None:
    job.trainers.disturb("flip", 1)
    with pytest.raises(DigestError, match=r"what came from trainer\[1\] is not what it published"):
        job.sync(7)
    job.trainers.disturb("", 1)
    job.sync(8)
    assert_served(job, 8)


def test_tensors_are_rounded_where_they_are_sent(job: Job) -> None:
    job.use("rlbridge", 1, dtype="bfloat16", deadline_seconds=_PATIENCE)
    job.trainers.train()
    metrics = job.sync(9)
    weights = assert_served(job, 9, torch.bfloat16)
    total = sum(tensor.numel() * 2 for tensor in weights.values())
    assert 2 * total <= metrics["rlbridge/bytes"] < 2 * total + 2 * 64 * len(weights)


def test_a_version_that_is_not_given_is_the_next_one(job: Job) -> None:
    assert job.sync(None)["rlbridge/version"] == 10


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"transprot": "nixl"}, "transprot: Extra inputs are not permitted"),
        ({"transport": "object_store"}, "'object_store' is not one-sided"),
        ({"transport_options": {"operation": "write"}}, "operation=write is not for them"),
        ({"dtype": "float8"}, "dtype"),
    ],
)
def test_options_that_cannot_be_are_refused_by_name(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        new_engine("rlbridge", 1, options)
    assert "checkpoint_engine.engine_kwargs.rlbridge" in str(caught.value)


def test_replicas_come_and_go_between_syncs(job: Job) -> None:
    (epoch, _), _ = job.trainers.memory()
    one = job.replicas[1]
    job.manager.remove_replicas([one])
    job.sync(11)
    assert_served(job, 11, torch.bfloat16)
    job.manager.add_replicas([one])
    job.trainers.train()
    job.sync(12)
    assert_served(job, 12, torch.bfloat16)
    assert len({epoch, *(name for name, _ in job.trainers.memory())}) == 2


def test_a_rollout_that_does_not_take_its_weights_fails_the_sync_at_once(job: Job) -> None:
    job.use("rlbridge", 1, deadline_seconds=_PATIENCE)
    job.sync(13)
    job.disturb(1, "raise")
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="the server does not take it"):
        job.sync(14)
    job.sync(15)
    assert time.monotonic() - start < _PATIENCE / 2
    assert_served(job, 15)


def test_a_rollout_that_is_stopped_is_named_and_goes_on_later(job: Job) -> None:
    job.use("rlbridge", 1, deadline_seconds=3)
    job.sync(16)
    process = job.disturb(1, "stop")
    try:
        with pytest.raises(DeadlineError, match=r"rollout\[1\] did not get through receive in time"):
            job.sync(17)
    finally:
        os.kill(process, signal.SIGCONT)
    job.trainers.train()
    job.sync(18)
    assert_served(job, 18)


def test_a_rollout_that_dies_in_a_sync_fails_it_and_the_others_go_on_without_it(job: Job) -> None:
    import ray

    patience = 8
    job.use("rlbridge", 1, deadline_seconds=patience)
    job.sync(20)
    job.disturb(1, "die")
    with pytest.raises((DeadlineError, ray.exceptions.RayActorError)):
        job.sync(21)
    job.manager.remove_replicas([job.replicas[1]])
    job.trainers.train()
    job.sync(22)  # though the trainer ranks still wait for the one that is gone
    assert_served(job, 22)
    before = job.trainers.memory()
    time.sleep(patience)  # they have given up, and it is nothing to the epoch that has begun since
    job.sync(23)
    assert job.trainers.memory() == before
    assert_served(job, 23)


def test_a_trainer_rank_that_dies_fails_the_sync(job: Job) -> None:
    import ray

    job.trainers.disturb("die", 1)
    with pytest.raises((RlbridgeError, ray.exceptions.RayActorError)):
        job.sync(24)
    (version, _), *_ = job.served()
    assert version == 23


def test_the_engine_is_registered_by_verls_own_hook(tmp_path: Path) -> None:
    from verl.checkpoint_engine.base import CheckpointEngineRegistry

    assert CheckpointEngineRegistry.get("rlbridge").__module__ == "rlbridge_verl.wire.checkpoint_engine"


def test_a_verl_that_calls_an_engine_otherwise_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from verl.checkpoint_engine.base import CheckpointEngine

    monkeypatch.setattr(CheckpointEngine, "send_weights", lambda self, weights, version: None)
    with pytest.raises(
        PluginError, match=r"verl 0\.9\.1 is not what its plugin was written for: CheckpointEngine\.send_weights takes"
    ):
        new_engine("rlbridge", 1, {})


def test_an_engine_that_cannot_be_imported_is_known_to_verl_with_the_reason() -> None:
    code = """
import sys
sys.modules["xxhash"] = None
from verl.checkpoint_engine import CheckpointEngineRegistry
try:
    CheckpointEngineRegistry.get("rlbridge")
except ValueError as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120).stdout
    assert "rlbridge_verl.wire.checkpoint_engine: import of xxhash halted" in said
