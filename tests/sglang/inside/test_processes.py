"""The processes of an engine: what becomes of them, and of those who wait for them."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import psutil
import pytest
import zmq

from rlbridge.errors import ConfigError, DeadlineError, ModelError, PeerLostError
from rlbridge.roles.batch import Sampling
from rlbridge.roles.generator import GeneratorContext
from rlbridge.sync.messages import Nothing, pack
from rlbridge_sglang.generator import SglangGenerator
from rlbridge_sglang.launch import Launch
from rlbridge_sglang.options import SglangGeneratorOptions
from tests.sglang.inside import models
from tests.sglang.inside.bridge import started

_END_SECONDS = 10.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "llama"
    models.make(path, "llama")
    return path


@pytest.fixture
def engine(model: Path) -> Iterator[SglangGenerator]:
    generator = started(model, rank_seconds=3.0)
    yield generator
    generator.close()


def test_a_rank_that_is_killed_is_named_to_all_who_wait(engine: SglangGenerator) -> None:
    directory, children = Path(engine._launch.directory), processes_of(engine)
    assert directory.stat().st_mode & 0o777 == 0o700
    rank = engine._launch.ranks[0]
    rank_process = psutil.Process(rank.pid)
    rank_process.suspend()
    with pytest.raises(DeadlineError, match=r"generator\[0\]\.rank\[0\] did not answer 'live_digests' within 3 s"):
        engine.on_each_rank("live_digests", msgspec.msgpack.encode([pack(Nothing())]))
    with ThreadPoolExecutor(1) as pool:
        begun = pool.submit(engine.generate, [[5, 6, 7]], Sampling(max_tokens=500))
        time.sleep(0.2)
        os.kill(rank.pid, signal.SIGKILL)
        with pytest.raises(PeerLostError, match=r"generator\[0\]\.rank\[0\] is gone: .* ended with -9"):
            begun.result(_END_SECONDS)
    for call in (
        lambda: engine.generate([[5, 6, 7]], Sampling(max_tokens=5)),
        lambda: engine.on_each_rank("live_digests", msgspec.msgpack.encode([pack(Nothing())])),
        lambda: engine.on_each_rank("scramble", msgspec.msgpack.encode([pack(Nothing())])),
        engine.invalidate_caches,
        engine.resume,
    ):
        with pytest.raises(PeerLostError, match=r"generator\[0\]\.rank\[0\]"):
            call()
    engine.close()
    assert_ended(children)
    assert not directory.exists()


def test_no_process_outlives_an_owner_that_is_killed(model: Path) -> None:
    owner = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("owner.py")), str(model)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
    )
    try:
        assert owner.stdout is not None
        line = next(line for line in owner.stdout if line.startswith(b"["))
        children = [psutil.Process(pid) for pid in json.loads(line)]
        assert children
        everyone = psutil.Process(owner.pid).children(recursive=True)
    finally:
        owner.kill()
        owner.wait()
    assert_ended([*children, *everyone])


def test_a_directory_that_holds_no_model_is_refused(model: Path, tmp_path: Path) -> None:
    children = psutil.Process().children(recursive=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="empty"):
        started(tmp_path / "empty")
    bare = tmp_path / "without-weights"
    bare.mkdir()
    for file in model.glob("*.json"):
        (bare / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ModelError, match=r"without-weights.*Cannot find any model weights"):
        started(bare)
    assert_ended([p for p in psutil.Process().children(recursive=True) if p not in children and "sglang" in p.name()])


def test_an_argument_that_sglang_has_not_is_refused(model: Path) -> None:
    with pytest.raises(ConfigError, match="no_such_argument"):
        started(model, engine_args={"no_such_argument": 1})


def test_an_engine_that_takes_too_long_to_start_is_ended(model: Path) -> None:
    with pytest.raises(DeadlineError, match=r"has not loaded its model within 0\.5 s"):
        started(model, start_seconds=0.5)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and any(thread.name == "generator[0]-loop" for thread in threading.enumerate()):
        time.sleep(0.2)
    assert [p for p in psutil.Process().children(recursive=True) if "sglang" in p.name()] == []
    assert [thread.name for thread in threading.enumerate() if thread.name == "generator[0]-loop"] == []


def test_sockets_of_an_engine_are_closed_though_they_lie_where_older_ones_lay() -> None:
    with zmq.Context() as context:
        kept, gone = context.socket(zmq.PUSH), [context.socket(zmq.PUSH) for _ in range(50)]
        for socket in gone:
            socket.close()
        places = {id(socket) for socket in gone}
        launch = Launch(GeneratorContext(0, 1, "cpu", "a-model", 0, False, {}), SglangGeneratorOptions(backend="sglang"))
        del socket, gone
        gc.collect()
        made = [context.socket(zmq.PUSH) for _ in range(50)]
        assert places & {id(socket) for socket in made}
        launch.close_sockets()
        launch.close()
        assert [kept.closed, *(socket.closed for socket in made)] == [False, *[True] * 50]
        kept.close()


def processes_of(engine: SglangGenerator) -> list[psutil.Process]:
    return [psutil.Process(process.pid) for process in (*engine._launch.ranks, *engine._launch.others)]


def assert_ended(children: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(children, timeout=_END_SECONDS)
    assert alive == []
