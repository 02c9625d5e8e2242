"""Whole runs with real actors: every pair of backends, one config."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlbridge.config import RunConfig
from rlbridge.errors import CheckpointError, ResourceError, RewardError, RlbridgeError
from rlbridge.rl.checkpoints import latest_checkpoint
from tests.models import tiny_qwen3, tiny_qwen3_moe
from tests.run import rewards
from tests.run.conftest import metrics

pytestmark = pytest.mark.ray

RunIt = Callable[..., dict[str, Any]]


@pytest.mark.parametrize(
    ("overrides", "wire"),
    [
        ([], "nixl over cma"),
        (["trainer.workers=2", "generator.workers=2", "transport.operation=write"], "nixl over cma"),
        (["transport.wire=tcp", "generator.dtype=bfloat16"], "nixl over tcp"),
        (["sync.publish=barrier", "trainer.workers=2"], "nixl over cma"),
        (["transport.backend=rdt"], "rdt over nixl"),
        (
            ["transport.backend=rdt", "transport.tensor_transport=gloo", "trainer.workers=2", "generator.workers=2"],
            "rdt over gloo",
        ),
        (["transport.backend=object_store", "trainer.workers=2"], "object_store over plasma"),
    ],
    ids=lambda v: "+".join(o.partition(".")[2] for o in v) if isinstance(v, list) else None,
)
def test_backends_are_swapped_by_their_names(run_it: RunIt, tmp_path: Path, overrides: list[str], wire: str) -> None:
    summary = run_it(tmp_path / "run", *overrides)
    assert summary["verified"]
    assert summary["versions"] == [1, 2, 3]
    assert summary["wire"].startswith(wire)
    assert summary["bytes_per_sync"] > 0
    assert [m["version"] for m in metrics(tmp_path / "run")] == [2, 3]
    # Behaviour log-probs are those of the weights being trained: the first pass has a ratio of one.
    tolerance = 1e-5 if "generator.dtype=bfloat16" not in overrides else 5e-2
    assert all(abs(m["ratio_mean"] - 1) < tolerance for m in metrics(tmp_path / "run"))


def test_a_mixture_of_experts_is_published_tensor_by_tensor(run_it: RunIt, tmp_path: Path) -> None:
    model = tiny_qwen3_moe(tmp_path / "moe")
    summary = run_it(tmp_path / "run", f"model.path={model}", "trainer.workers=2")
    assert summary["verified"]
    assert all(abs(m["ratio_mean"] - 1) < 1e-5 for m in metrics(tmp_path / "run"))


def test_a_run_that_is_resumed_goes_on_exactly(run_it: RunIt, tmp_path: Path) -> None:
    whole, half = tmp_path / "whole", tmp_path / "half"
    overrides = ["algorithm.steps=4", "checkpoint.every=2", "evaluation.every=2", "checkpoint.keep=5", "trainer.workers=2"]
    run_it(whole, *overrides)
    shutil.copytree(whole, half)
    shutil.rmtree(half / "checkpoints" / "step-000004")
    run_it(half, *overrides, resumed_step=2)
    exact = [[{k: v for k, v in m.items() if "second" not in k} for m in metrics(directory)] for directory in (whole, half)]
    assert [m["step"] for m in exact[0]] == [1, 2, 3, 4]
    assert exact[0] == exact[1]
    for name in ("model.safetensors",):
        final = [(d / "checkpoints" / "step-000004" / "model" / name).read_bytes() for d in (whole, half)]
        assert final[0] == final[1]


def test_a_checkpoint_of_another_model_is_refused(run_it: RunIt, tmp_path: Path) -> None:
    run_it(tmp_path / "run", "algorithm.steps=1")
    other = tiny_qwen3(tmp_path / "other", hidden_size=64)
    with pytest.raises(CheckpointError, match=r"embed_tokens"):
        run_it(tmp_path / "run", "algorithm.steps=2", f"model.path={other}", resumed_step=1)


def test_a_reward_that_fails_costs_no_finished_step(run_it: RunIt, tmp_path: Path) -> None:
    rewards.calls = 0
    with pytest.raises(RewardError, match=r"prompt"):
        run_it(tmp_path / "run", "reward.fn=tests.run.rewards:fails_later", "algorithm.steps=3")
    saved = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert saved is not None
    assert saved.name == "step-000001"


@pytest.mark.parametrize("fn", ["raises", "not_a_number"])
def test_a_bad_reward_is_named_with_its_prompt(run_it: RunIt, tmp_path: Path, fn: str) -> None:
    with pytest.raises(RewardError, match=r"prompts\.jsonl:\d+"):
        run_it(tmp_path / "run", f"reward.fn=tests.run.rewards:{fn}")


def test_more_workers_than_the_cluster_has_is_said_at_once(run_it: RunIt, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"asks for 65 CPU .* has 8 CPU"):
        run_it(tmp_path / "run", "trainer.workers=64", "algorithm.prompts_per_step=64")


def test_a_generator_killed_in_a_sync_is_named_and_the_work_is_kept(
    ray_cluster: None, config_of: Callable[..., RunConfig], tmp_path: Path
) -> None:
    import ray

    from rlbridge.rl.loop import Loop
    from rlbridge.rl.run import Run
    from rlbridge.rl.start import load_task
    from rlbridge.rl.workers import workers

    config = config_of("algorithm.steps=4", "generator.workers=2")
    with workers(config, config.transport) as started:
        run = Run("run", tmp_path / "run", config, 4)
        loop = Loop(run, load_task(config), started)
        victim = started.generator.parties[1]
        call = victim.call

        def killing(method: str, payload: bytes, tensors: dict[str, Any] | None = None) -> Any:
            if method == "start_pull" and loop.progress.step == 2:
                ray.kill(victim.actor)
            return call(method, payload, tensors)

        victim.call = killing  # type: ignore[method-assign]
        with pytest.raises(RlbridgeError, match=r"generator\[1\]") as caught:
            loop.run()
        assert caught.value.where["version"] == "3"
        survivor = started.generator.parties[0]
        state = survivor.call("state", b"").result(30)
    saved = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert saved is not None
    assert saved.name == "step-000002"
    from rlbridge.sync.messages import State, result

    assert result(state[0], State) in (State("ready", 2), State("ready", 3))


def test_trainer_and_generator_give_the_same_log_probs_after_a_sync(
    ray_cluster: None, config_of: Callable[..., RunConfig]
) -> None:
    from rlbridge.rl.workers import workers
    from rlbridge.roles.batch import Sampling, pad_sequences

    config = config_of("trainer.workers=2", "generator.workers=2")
    prompts = [[3 + i % 9, 4, 5 + i % 3] for i in range(8)]
    with workers(config, config.transport) as started:
        started.session.sync(1)
        completions = started.generator.generate(prompts, Sampling(max_tokens=5, seed=1), 60)
        sequences = pad_sequences(prompts, [c.token_ids for c in completions])
        trained = started.trainer.score(sequences, 60)
        served = started.generator.score(sequences, 60)
        behaviour = np.zeros_like(trained)
        behaviour[sequences.completion_mask_BT()] = [p for c in completions for p in c.logprobs]
    for engine in served:
        np.testing.assert_allclose(engine, trained, atol=1e-5, rtol=0)
    np.testing.assert_allclose(behaviour, trained, atol=1e-5, rtol=0)


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(b"x" * 4096)


def test_a_full_disk_leaves_the_checkpoint_before(run_it: RunIt, tmp_path: Path) -> None:
    import subprocess

    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        run_it(disk / "run", "algorithm.steps=1")
        kept = latest_checkpoint(disk / "run" / "checkpoints")
        fill(disk / "filler")
        with pytest.raises(CheckpointError, match=r"step 2 could not be written"):
            run_it(disk / "run", "algorithm.steps=2", resumed_step=1)
        assert latest_checkpoint(disk / "run" / "checkpoints") == kept
        assert [p.name for p in (disk / "run" / "checkpoints").iterdir()] == ["step-000001"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)
