"""Wheels of a few lines, and a plugin that declares environments of them: what uv builds here needs no network."""

from __future__ import annotations

import hashlib
import io
import json
import sys
import tarfile
import zipfile
from base64 import urlsafe_b64encode
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from rlbridge import Environment
from rlbridge.env.location import ROOT_VARIABLE
from rlbridge.plugins import MODULES_VARIABLE, registry

SLOW_BACKEND = """
import os, pathlib, time

def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    place = pathlib.Path(os.environ["BRICK"])
    with (place / "begun").open("a") as file:
        file.write("begun\\n")
    while not (place / "go").exists():
        time.sleep(0.02)
    name = "brick-1.0-py3-none-any.whl"
    (pathlib.Path(wheel_directory) / name).write_bytes((pathlib.Path(__file__).parent / "wheel").read_bytes())
    return name
"""

# As much as `import rlbridge` needs.
STAND_IN_PLUGGY = """
class HookimplMarker:
    def __init__(self, name): ...
    def __call__(self, function): return function
"""

PLUGIN = """
import json, pathlib
from rlbridge import Backend, Environment, hookimpl

HERE = pathlib.Path(__file__).parent

@hookimpl
def rlbridge_environments():
    return [Environment(**each) for each in json.loads((HERE / "environments.json").read_text())]

@hookimpl
def rlbridge_rewards():
    return [Backend("acme", "acme_envs:gone", "For the list.", requires=("no_such_module",), environments=("acme-tiny",))]
"""

Declare = Callable[..., Environment]


def wheel(name: str, version: str, *requires: str, files: dict[str, str] | None = None) -> bytes:
    """A wheel with one module, `name.py`, that says its version."""
    info = f"{name}-{version}.dist-info"
    needs = "".join(f"Requires-Dist: {each}\n" for each in requires)
    content = {
        f"{name}.py": f"version = {version!r}\n",
        **(files or {}),
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    lines = []
    for path, text in content.items():
        digest = urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        lines.append(f"{path},sha256={digest},{len(text.encode())}\n")
    content[f"{info}/RECORD"] = "".join([*lines, f"{info}/RECORD,,\n"])
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for path, text in content.items():
            file.writestr(path, text)
    return archive.getvalue()


def _slow_source() -> bytes:
    """An sdist that is built when there is a file `go` in the directory that the variable BRICK names."""
    system = '[build-system]\nrequires = []\nbuild-backend = "slow"\nbackend-path = ["."]\n'
    project = f'{system}[project]\nname = "brick"\nversion = "1.0"\n'
    content = {
        "pyproject.toml": project.encode(),
        "slow.py": SLOW_BACKEND.encode(),
        "wheel": wheel("brick", "1.0"),
        "PKG-INFO": b"Metadata-Version: 2.2\nName: brick\nVersion: 1.0\n",
    }
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as file:
        for name, data in content.items():
            entry = tarfile.TarInfo(f"brick-1.0/{name}")
            entry.size = len(data)
            file.addfile(entry, io.BytesIO(data))
    return archive.getvalue()


@pytest.fixture(scope="session")
def links(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of distributions, for UV_FIND_LINKS."""
    made = tmp_path_factory.mktemp("links")
    for name, version, *requires in (
        ("pebble", "1.0"),
        ("pebble", "2.0"),
        ("quartz", "1.0", "pebble"),
        ("grit", "1.0", "nowhere_to_be_had"),
        *((name, "1.0") for name in ("torch", "transformers", "safetensors")),
        ("ray", "0.1"),
        ("ray", "0.2"),
    ):
        (made / f"{name}-{version}-py3-none-any.whl").write_bytes(wheel(name, version, *requires))
    (made / "pluggy-1.6-py3-none-any.whl").write_bytes(wheel("pluggy", "1.6", files={"pluggy.py": STAND_IN_PLUGGY}))
    (made / "brick-1.0.tar.gz").write_bytes(_slow_source())
    return made


@pytest.fixture
def uv_offline(links: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """uv finds what is in `links`, and asks no network."""
    monkeypatch.setenv("UV_FIND_LINKS", str(links))
    monkeypatch.setenv("UV_OFFLINE", "1")
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv-cache"))
    monkeypatch.setenv("BRICK", str(tmp_path))


@pytest.fixture
def declare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uv_offline: None) -> Iterator[Declare]:
    """Declare an environment by a plugin, here and in processes that are started from here; `text` is its lock.

    Environments lie in a directory of the test's own.
    """
    plugin = tmp_path / "plugins/acme_envs"
    plugin.mkdir(parents=True)
    (plugin / "__init__.py").write_text(PLUGIN)
    (plugin / "environments.json").write_text("[]")
    monkeypatch.setenv("PYTHONPATH", str(plugin.parent))
    monkeypatch.setenv(MODULES_VARIABLE, "acme_envs")
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path / "envs"))
    monkeypatch.syspath_prepend(str(plugin.parent))

    def make(name: str, text: str | None = None, **fields: object) -> Environment:
        given = {"summary": "For tests.", "requirements": (), "lock": f"acme_envs:{name}.lock", **fields}
        made = Environment(name=name, **given)  # type: ignore[arg-type]
        if text is not None:
            (plugin / f"{name}.lock").write_text(text)
        declared = json.loads((plugin / "environments.json").read_text())
        others = [each for each in declared if each["name"] != name]
        (plugin / "environments.json").write_text(json.dumps([*others, asdict(made)]))
        registry.cache_clear()
        return registry().environment(name)

    yield make
    registry.cache_clear()
    sys.modules.pop("acme_envs", None)
