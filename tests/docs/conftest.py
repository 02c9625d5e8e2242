"""The third-party distribution of the docs, installed beside rlbridge as pip leaves it."""

from __future__ import annotations

import shutil
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlbridge.plugins import registry

SPOOL = Path(__file__).parents[2] / "docs/examples/acme-spool"


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for sys.path that holds the distribution."""
    project = tomllib.loads((SPOOL / "pyproject.toml").read_text())
    made = tmp_path_factory.mktemp("site")
    for package in project["tool"]["setuptools"]["packages"]:
        shutil.copytree(SPOOL / package, made / package, ignore=shutil.ignore_patterns("__pycache__"))
    name, version = project["project"]["name"], project["project"]["version"]
    info = made / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    groups = project["project"]["entry-points"]
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in entries.items()) for group, entries in groups.items()]
    (info / "entry_points.txt").write_text("".join(lines))
    (info / "RECORD").touch()
    return made


@pytest.fixture
def spool(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The distribution is found in this process."""
    monkeypatch.syspath_prepend(site)
    registry.cache_clear()
    yield
    registry.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "acme_spool"]:
        del sys.modules[name]
