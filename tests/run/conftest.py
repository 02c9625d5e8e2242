"""One Ray cluster for all tests that need one, and a small model with prompts to run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlbridge.config import RunConfig, load_config, to_yaml
from rlbridge.observe.files import FileObserver
from rlbridge.plugins import registry
from rlbridge.rl.run import Run
from tests.models import tiny_qwen3

RunIt = Callable[..., dict[str, Any]]

BASE = {
    "sampling": {"max_tokens": 3},
    "algorithm": {"steps": 2, "prompts_per_step": 4, "samples_per_prompt": 4},
    "optimizer": {"lr": 1e-2},
    "data": {"held_out": 4},
    "cluster": {"start_seconds": 240},
    "reward": {"fn": "tests.run.rewards:more_digits"},
}


@pytest.fixture(scope="package")
def ray_cluster() -> Iterator[None]:
    """A cluster with room for eight actors."""
    import ray

    from rlbridge.cluster.ray_cluster import start_ray

    start_ray(8, None)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with random weights."""
    return tiny_qwen3(tmp_path_factory.mktemp("model") / "tiny", tied=True)


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen prompts."""
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}+{i}=", "answer": str(2 * i)}) + "\n" for i in range(16)))
    return path


@pytest.fixture
def config_of(model: Path, prompts: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """A config for the tiny model; arguments are overrides."""

    def make(*overrides: str) -> RunConfig:
        file = tmp_path / "run.yaml"
        data = BASE | {"model": {"path": str(model)}, "data": {"path": str(prompts), "held_out": 4}}
        file.write_text(json.dumps(data | {"runs_dir": str(tmp_path / "runs")}))
        return load_config(file, overrides)

    return make


@pytest.fixture
def run_it(ray_cluster: None, config_of: Callable[..., RunConfig], tmp_path: Path) -> RunIt:
    """Run to the end on the shared cluster, as the command does; returns the summary."""
    from rlbridge.rl.start import execute, prepare

    def run(directory: Path, *overrides: str, resumed_step: int = 0) -> dict[str, Any]:
        config = config_of(*overrides)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.yaml").write_text(to_yaml(config))
        observer = FileObserver()
        registry().manager.register(observer)
        try:
            started = Run(directory.name, directory, config, config.algorithm.steps, resumed_step)
            return execute(config, prepare(config, lambda line: None), lambda: started)
        finally:
            registry().manager.unregister(observer)

    return run


def metrics(directory: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
