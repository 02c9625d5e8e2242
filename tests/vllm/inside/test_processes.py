"""The processes of an engine: which of them is lost is told, and none is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlbridge.errors import ConfigError, DeadlineError, ModelError, PeerLostError, SyncError
from rlbridge.roles.batch import Sampling
from rlbridge.sync.messages import Nothing, result
from rlbridge_vllm.generator import VllmGenerator
from tests.vllm.inside import models
from tests.vllm.inside.bridge import started

_ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("models") / "qwen3"
    models.make(made, "qwen3")
    return made


@pytest.fixture
def start(path: Path) -> Iterator[Callable[..., VllmGenerator]]:
    made: list[VllmGenerator] = []

    def begin(**options: Any) -> VllmGenerator:
        made.append(started(path, **options))
        return made[-1]

    yield begin
    for generator in made:
        generator.close()


@pytest.mark.parametrize("engine", ["async", "in_process"])
def test_a_killed_rank_is_named(start: Callable[..., VllmGenerator], engine: str) -> None:
    generator = start(tensor_parallel=2, engine=engine, answer_seconds=60.0)
    pids = _pids(generator)
    threading.Timer(0.5, os.kill, (pids["generator[0].rank[1]"], signal.SIGKILL)).start()
    with pytest.raises(PeerLostError, match=r"generator\[0\]\.rank\[1\]"):
        _generate_on(generator)
    with pytest.raises(PeerLostError, match=r"generator\[0\]\.rank\[1\]"):
        generator.on_each_rank("state", b"")
    generator.close()
    assert _left(pids.values()) == []


def test_an_answer_of_another_drivers_call_is_an_error_of_every_rank(start: Callable[..., VllmGenerator]) -> None:
    """And is not raised in the ranks: vLLM stops reading at the first that raises, and the next call gets what is left."""
    generator = start(tensor_parallel=2)
    for reply in generator._rpc("rlbridge_poll", 1 << 60):
        with pytest.raises(SyncError, match="opened anew"):
            result(reply, Nothing)
    assert generator._rpc("rlbridge_score_at", None) == [None, None]


def test_a_killed_core_is_named(start: Callable[..., VllmGenerator]) -> None:
    generator = start()
    pids = _pids(generator)
    os.kill(pids["the core of generator[0]"], signal.SIGKILL)
    with pytest.raises(PeerLostError, match=r"the core of generator\[0\]"):
        _generate_on(generator)
    generator.close()
    assert _left(pids.values()) == []


def test_a_stopped_rank_is_a_deadline_that_names_it(start: Callable[..., VllmGenerator]) -> None:
    generator = start(tensor_parallel=2, answer_seconds=5.0)
    pids = _pids(generator)
    os.kill(pids["generator[0].rank[1]"], signal.SIGSTOP)
    with pytest.raises(DeadlineError, match=r"generator\[0\]\.rank\[1\] is stopped"):
        generator.on_each_rank("verify", b"")
    generator.close()  # stopped as it is
    assert _left(pids.values()) == []


@pytest.mark.parametrize(("ranks", "engine"), [(1, "async"), (2, "async"), (2, "in_process")])
def test_nothing_is_left_of_an_engine_whose_owner_is_killed(path: Path, ranks: int, engine: str) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-m", "tests.vllm.inside.owner", str(path), str(ranks), engine],
        stdout=subprocess.PIPE,
        text=True,
        cwd=_ROOT,
    )
    assert owner.stdout is not None
    pids = next([int(pid) for pid in line.split()[1:]] for line in owner.stdout if line.startswith("pids"))
    assert len(pids) == ranks + (engine == "async")
    os.kill(pids[0], signal.SIGSTOP)  # one that could not look whether its owner still is
    owner.kill()
    owner.wait(10)
    assert _left(pids) == []


def test_a_model_that_vllm_does_not_know_is_an_error_with_its_reason(path: Path, tmp_path: Path) -> None:
    for file in path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["AcmeForCausalLM"], "model_type": "acme"}))
    with pytest.raises(ModelError, match="acme"):
        started(tmp_path)


@pytest.mark.parametrize("engine", ["async", "in_process"])
def test_an_engine_that_dies_while_it_loads_tells_its_last_words(path: Path, tmp_path: Path, engine: str) -> None:
    for file in path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ModelError, match=r"(?s)could not load .*Safetensor"):
        started(tmp_path, engine=engine)


def test_what_vllm_does_not_know_is_an_error_of_the_config(path: Path) -> None:
    with pytest.raises(ConfigError, match="acme"):
        started(path, engine_args={"acme": 1})
    with pytest.raises(ModelError, match="max_model_len"):
        started(path, max_model_len=10 * models.LENGTH)


def _generate_on(generator: VllmGenerator) -> None:
    for _ in range(100):
        generator.generate([[5, 6, 7]] * 4, Sampling(400, 1.0))


def _pids(generator: VllmGenerator) -> dict[str, int]:
    assert generator._watch is not None
    return generator._watch.pids


def _left(pids: Any) -> list[int]:
    """Those that do not end."""
    limit = time.monotonic() + 30
    while (left := [pid for pid in pids if _lives(pid)]) and time.monotonic() < limit:
        time.sleep(0.05)
    return left


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
