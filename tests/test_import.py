"""`import rlbridge` is cheap, and so is everything that only lists or explains."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

FRAMEWORKS = {"torch", "ray", "transformers", "datasets", "vllm", "nixl"}
TIMED = "import time; start = time.perf_counter(); import rlbridge; print(time.perf_counter() - start)"


def python(code: str) -> str:
    # Without bytecode every import compiles, and the measurement would be of that.
    env = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout


@pytest.mark.parametrize(
    "code",
    [
        "import rlbridge",
        "import rlbridge.hookspecs, rlbridge.roles.trainer, rlbridge.roles.generator, rlbridge.roles.transport",
        "import rlbridge.plugins; rlbridge.plugins.registry().listing()",
        "import rlbridge.config",
        "from rlbridge.cli.main import main; main(['--help'])",
        "from rlbridge.cli.main import main; main(['plugins'])",
        "from rlbridge.cli.main import main; main(['config', 'schema'])",
    ],
)
def test_import_brings_in_no_framework(code: str) -> None:
    loaded = python(f"{code}\nimport sys; print(); print(*sys.modules)").splitlines()[-1].split()
    assert not FRAMEWORKS & set(loaded)


def test_import_takes_less_than_300_milliseconds() -> None:
    assert min(float(python(TIMED)) for _ in range(5)) < 0.3
