"""Runs the tests that need SGLang, in its environment where that is built."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

_INSIDE = Path(__file__).with_name("inside")


@pytest.fixture
def python() -> str:
    """The interpreter of the environment sglang-cpu."""
    found = os.environ.get("RLBRIDGE_SGLANG_PYTHON", "")  # this line is what `rlbridge.env` will answer
    if not found:
        pytest.skip("the environment sglang-cpu is not built")
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("module", sorted(path.name for path in _INSIDE.glob("test_*.py")))
def test_sglang(python: str, module: str) -> None:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    variables.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run(
        [python, "-m", "pytest", "-c", str(_INSIDE / "pytest.ini"), str(_INSIDE / module)],
        env=variables,
        capture_output=True,
        text=True,
        timeout=1700,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]
