"""One distribution: the core, the plugins and the conformance suite, and nothing else."""

from __future__ import annotations

import email
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from rlbridge.plugins import registry

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from a copy: setuptools leaves its build directory in the source tree."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE", "rlbridge", "plugins", "conformance"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(source)], check=True)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(out), str(source)]
    subprocess.run(build, check=True, timeout=200)
    return zipfile.ZipFile(next(out.glob("rlbridge-*.whl")))


@pytest.mark.slow
def test_the_wheel_holds_every_package_and_no_tests(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    packages = {name.partition("/")[0] for name in names if name.endswith("__init__.py")}
    assert packages == {"rlbridge", "rlbridge_conformance", *(p.name for p in (ROOT / "plugins").glob("rlbridge_*"))}
    assert "rlbridge/py.typed" in names
    for folder in ("rlbridge", "plugins", "conformance"):
        for path in (ROOT / folder).rglob("*.py"):
            assert str(path.relative_to(ROOT if folder == "rlbridge" else ROOT / folder)) in names
    for environment in (*(ROOT / "plugins").rglob("*.lock"), *(ROOT / "plugins").rglob("*.pth")):
        assert str(environment.relative_to(ROOT / "plugins")) in names


@pytest.mark.slow
def test_the_metadata_names_ranges_and_an_extra_for_each_backend_that_needs_one(wheel: zipfile.ZipFile) -> None:
    metadata = email.message_from_bytes(wheel.read(next(n for n in wheel.namelist() if n.endswith("METADATA"))))
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    required = metadata.get_all("Requires-Dist") or []
    assert not [line for line in required if "==" in line.partition(";")[0]]  # an exact pin would shut out frameworks
    assert not [line for line in required if line.startswith(("omegaconf", "hydra"))]
    extras = set(metadata.get_all("Provides-Extra") or [])
    roles = ("trainer", "generator", "transport")
    backends = [registry().backend(row.role, row.name) for row in registry().listing() if row.role in roles]  # type: ignore[arg-type]
    assert {b.extra for b in backends if b.extra} <= extras
