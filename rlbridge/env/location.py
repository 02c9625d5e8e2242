"""Where environments lie: one directory each, named after the environment and a key of all that goes into it."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from rlbridge.env import driver
from rlbridge.env.brought import source
from rlbridge.environment import Environment
from rlbridge.errors import PluginError

ROOT_VARIABLE = "RLBRIDGE_ENVS"

_KEY_LENGTH = 12
_DIRECTORY = re.compile(rf"(?P<name>[a-z0-9][a-z0-9._-]*)-(?P<key>[0-9a-f]{{{_KEY_LENGTH}}})")


def root() -> Path:
    """The directory of all environments: `RLBRIDGE_ENVS`, or `rlbridge/envs` in the user's cache."""
    given = os.environ.get(ROOT_VARIABLE)
    if given:
        return Path(given).expanduser().absolute()
    import platformdirs  # environments themselves need not have it

    return platformdirs.user_cache_path("rlbridge") / "envs"


def key(environment: Environment) -> str:
    """Differs where an environment has to be another one: another lock, another Python, Ray, rlbridge or source of it."""
    parts = [
        lock_text(environment),
        *environment.no_deps,
        *environment.resolved,
        environment.site,
        driver.minor(driver.python_version()),
        driver.ray_version(),
        driver.rlbridge_version(),
        *(source(name) for name in sorted({"rlbridge", environment.distribution})),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:_KEY_LENGTH]


def directory(environment: Environment) -> Path:
    """Where the environment is, or would be, for this driver."""
    return root() / f"{environment.name}-{key(environment)}"


def directories() -> Iterator[tuple[str, Path]]:
    """Every environment that is there, finished or not, of this driver or another: its name and its directory."""
    if not root().is_dir():
        return
    for path in sorted(root().iterdir()):
        found = _DIRECTORY.fullmatch(path.name)
        if found and path.is_dir():
            yield found["name"], path


def python_of(prefix: Path) -> Path:
    """The interpreter of the environment in a directory."""
    return prefix / "bin" / "python"


def lock_text(environment: Environment) -> str:
    """The lock that the environment's plugin ships.

    Raises:
        PluginError: it ships none.
    """
    path = located(environment.lock)
    try:
        return path.read_text()
    except OSError as error:
        raise PluginError(
            f"the environment {environment.name!r} has no lock: {path}: {error.strerror}",
            todo=f"the plugin's author makes one: rlbridge env lock {environment.name}",
        ) from error


def located(target: str) -> Path:
    """The path that "package:file" names, whether or not there is something. Imports no package.

    Raises:
        PluginError: there is no such package.
    """
    package, _, name = target.partition(":")
    top, *rest = package.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None or not spec.submodule_search_locations:
        raise PluginError(f"{target!r} names the package {top!r}, and there is none")
    return Path(next(iter(spec.submodule_search_locations)), *rest, name)
