"""A driver whose rlbridge was installed from a wheel gives its environments a copy that needs neither it nor a source tree."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from uv import find_uv_bin

import rlbridge
from rlbridge.env import driver
from tests.env.conftest import Declare
from tests.env.test_build import inside

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
LIST = "from rlbridge.env import found; print(*(f.path for f in found() if f.name == 'acme-tiny'))"


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """The interpreter of an environment with rlbridge's wheel, and all that it needs from the one of these tests."""
    source, prefix = tmp_path / "source", tmp_path / "driver"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "rlbridge", "plugins", "conformance"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(source)], check=True)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source)]
    subprocess.run(build, check=True, timeout=200)
    (wheel,) = tmp_path.glob("rlbridge-*.whl")
    made = prefix / "bin/python"
    subprocess.run([find_uv_bin(), "venv", "-q", "--python", sys.executable, str(prefix)], check=True)
    subprocess.run([find_uv_bin(), "pip", "install", "-q", "--no-deps", "--python", str(made), str(wheel)], check=True)
    # A path alone: what is editable there is not found through it.
    (driver.site_packages(prefix) / "others.pth").write_text(f"{Path(pytest.__file__).parents[1]}\n")
    return made


def test_the_copy_is_the_environments_own(declare: Declare, python: Path, tmp_path: Path) -> None:
    declare("acme-tiny", "pebble==1.0\npluggy==1.6\n", modules=["rlbridge_native"])
    for command in ("build", "check"):
        ran = subprocess.run([python, "-m", "rlbridge", "env", command, "acme-tiny"], capture_output=True, text=True, cwd="/")
        assert ran.returncode == 0, ran.stdout + ran.stderr
    listed = subprocess.run([python, "-c", LIST], capture_output=True, text=True, cwd="/", check=True)
    prefix = Path(listed.stdout.strip())
    where = inside(prefix, "import rlbridge; print(rlbridge.__version__, rlbridge.__file__)").split()
    assert where == [rlbridge.__version__, str(driver.site_packages(prefix) / "rlbridge/__init__.py")]
    assert list((driver.site_packages(prefix) / "rlbridge/__pycache__").glob("backend.*.pyc"))
