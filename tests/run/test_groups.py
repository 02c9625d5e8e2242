"""The actors of a role end with the run: those that can close do, those that are stuck are ended all the same."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from rlbridge.cluster import groups
from rlbridge.roles.generator import GeneratorOptions

pytestmark = pytest.mark.ray


class Closing:
    """An actor whose close leaves a trace; the backend's name is the file to leave it in, or "stuck"."""

    def __init__(self, backend: str) -> None:
        self._backend = backend

    def pid(self) -> int:
        return os.getpid()

    def close(self) -> bytes:
        if self._backend == "stuck":
            time.sleep(600)
        Path(self._backend).write_text("closed")
        return b""


@pytest.mark.parametrize("stuck", [False, True])
def test_actors_are_let_to_close_and_are_gone(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stuck: bool
) -> None:
    import ray

    monkeypatch.setattr(groups, "_CLOSE_SECONDS", 1.0 if stuck else 30.0)
    trace = tmp_path / "trace"
    options = GeneratorOptions(backend="stuck" if stuck else str(trace))
    group = groups._Group("trainer", Closing, options, 1, {})
    pid = ray.get(group.parties[0].actor.pid.remote(), timeout=60)
    group.end()
    assert trace.exists() is not stuck
    limit = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists() and time.monotonic() < limit:
        time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists()
