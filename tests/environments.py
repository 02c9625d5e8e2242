"""Tests that need what only an environment has are run in it, where it is built."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest

from rlbridge.env import State, directory, python_of, state_of
from rlbridge.plugins import registry

MUST_BE_BUILT = "RLBRIDGE_TEST_ENVIRONMENTS"
"""With this variable set to 1 an environment that is not built fails its tests, and does not skip them."""

_SECONDS = 600
_END_SECONDS = 20


def is_built(name: str) -> bool:
    """Whether an environment can be used."""
    return state_of(registry().environment(name)) is State.BUILT


def python_in(name: str) -> Path:
    """The interpreter of a built environment."""
    environment = registry().environment(name)
    if not is_built(name):
        (pytest.fail if os.environ.get(MUST_BE_BUILT) == "1" else pytest.skip)(f"needs: rlbridge env build {name}")
    return python_of(directory(environment))


def run_inside(name: str, module: Path) -> None:
    """Run the tests of a file in an environment, under the pytest.ini beside it."""
    python = python_in(name)
    variables = {n: v for n, v in os.environ.items() if not n.startswith("PYTEST")}
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [python, "-m", "pytest", "-c", str(module.with_name("pytest.ini")), str(module)],
            env={**variables, **registry().environment(name).variables, "PYTHONFAULTHANDLER": "1"},
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
        try:
            code: int | str = process.wait(_SECONDS)
        except subprocess.TimeoutExpired:
            code = f"it did not end within {_SECONDS} s; where its threads were stands below"
            process.send_signal(signal.SIGABRT)
            process.wait(_END_SECONDS)
        if code:
            with contextlib.suppress(ProcessLookupError):  # its children have ended too
                os.killpg(process.pid, signal.SIGKILL)
        said.seek(0)
        assert code == 0, f"{code}\n{said.read()[-25_000:]}"
