"""Where the processes of a role run: under the driver's own interpreter, or in an environment that is built."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlbridge.backend import Backend
from rlbridge.env import driver
from rlbridge.env.building import site_folder
from rlbridge.env.location import directory, python_of
from rlbridge.env.stamp import read_stamp
from rlbridge.env.state import WHY, State, state_of
from rlbridge.environment import Environment
from rlbridge.errors import PluginError
from rlbridge.importing import distribution_version, install_hint, missing_module
from rlbridge.plugins import Role, registry


@dataclass(frozen=True)
class Place:
    """Where processes run.

    Attributes:
        name: The environment's name; None: they run where the driver does.
        python: The environment's interpreter; None: the driver's.
        prefix: The environment's directory.
        variables: What their environment variables have to be, for `{**os.environ, **variables}`.
        note: What a person should be told, where the place was not the config's choice.
    """

    name: str | None = None
    python: Path | None = None
    prefix: Path | None = None
    variables: Mapping[str, str] = field(default_factory=dict)
    note: str = ""

    def runtime_env(self, variables: Mapping[str, str], defaults: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Ray's, for an actor that runs here: `variables` win over the environment's, and those over `defaults`."""
        below = {**(defaults or {}), **self.variables}
        if self.python is None:
            return {"env_vars": {**below, **variables}}
        # Each node has a PATH of its own, which Ray puts in there. It hands the interpreter to a shell as it is (Ray 2.60).
        path = {"PATH": f"{self.python.parent}{os.pathsep}${{PATH}}"}
        return {"py_executable": shlex.quote(str(self.python)), "env_vars": {**below, **path, **variables}}


HERE = Place()
"""Where the driver runs."""


def place(role: Role, backend: str, env: str | None) -> Place:
    """Where a backend's processes run, with `<role>.env` being `env`. Reads files, and starts nothing.

    Without `env` it is the driver's own environment where that has what the backend needs, and else the first of the backend's
    environments that is built.

    Raises:
        PluginError: the backend or the environment is unknown, not installed, not built, or not equal to the driver in what has
            to be equal; the error says what to do.
        BuildError: rlbridge was not installed by an installer that lists files.
    """
    declared = registry().backend(role, backend)
    if env is not None:
        return _within(role, declared, registry().environment(env))
    reason = registry().missing(role, backend)
    if reason is None:
        return HERE
    environments = list(_environments(declared))
    for environment in environments:
        if state_of(environment) is State.BUILT:
            return _within(role, declared, environment, f"{role} {backend}: it runs in the environment {environment.name}")
    todo = [install_hint(declared.extra), *(_build_hint(environment) for environment in environments)]
    raise PluginError(f"the {role} {backend!r} is not installed here: {reason}", todo="\n  or ".join(filter(None, todo)))


def absent(place: Place, backend: Backend) -> str | None:
    """The first module that the backend requires and the place's environment lacks; None for the driver's own place."""
    if place.prefix is None or place.name is None:
        return None
    return _absent(backend, registry().environment(place.name), place.prefix)


def version_at(place: Place, distribution: str) -> str:
    """The version of a distribution where processes of that place run; empty where it is not installed."""
    if place.prefix is None:
        return distribution_version(distribution)
    return driver.versions(driver.site_packages(place.prefix)).get(driver.normalised(distribution), "")


def differences(prefix: Path) -> list[str]:
    """In what a built environment is not equal to the driver, though it has to be: a line each."""
    stamp, there = read_stamp(prefix), driver.versions(driver.site_packages(prefix))
    if stamp is None:
        return ["it has no stamp"]
    found = [
        ("Python", driver.minor(stamp.python), driver.minor(driver.python_version())),
        ("rlbridge", there.get("rlbridge", ""), driver.rlbridge_version()),
    ]
    if "ray" in there or stamp.ray:
        found.append(("Ray", there.get("ray", ""), driver.ray_version()))
    lines = [
        f"its {what} is {mine or 'not there'}, and the driver's {drivers}" for what, mine, drivers in found if mine != drivers
    ]
    python = python_of(prefix)
    return lines + ([] if python.exists() else [f"its interpreter is gone: {python} -> {python.resolve()}"])


def _within(role: Role, backend: Backend, environment: Environment, note: str = "") -> Place:
    name = environment.name
    state = state_of(environment)
    if state is not State.BUILT:
        raise PluginError(f"the environment {name!r} {WHY[state]}", role=role, todo=_build_hint(environment))
    prefix = directory(environment)
    if wrong := differences(prefix):
        raise PluginError(f"the environment {name!r} has been changed: {'; '.join(wrong)}", role=role, todo=_again(name))
    if "ray" not in driver.versions(driver.site_packages(prefix)):
        raise PluginError(f"no role can run in the environment {name!r}: it has no Ray", role=role)
    if module := _absent(backend, environment, prefix):
        others = [other for other in backend.environments if other != name]
        todo = f"{role}.env={others[0]}" if others else "name another, or none"
        raise PluginError(
            f"the {role} {backend.name!r} cannot run in the environment {name!r}: it has no module {module!r}", todo=todo
        )
    return Place(name, python_of(prefix), prefix, variables_of(environment, prefix), note)


def _environments(backend: Backend) -> Iterator[Environment]:
    """Those that the backend names, without those whose plugin is broken or not there."""
    known = {environment.name: environment for environment in registry().environments()}
    return (known[name] for name in backend.environments if name in known)


def _build_hint(environment: Environment) -> str:
    try:
        directory(environment)
    except PluginError as error:
        return error.todo
    return f"rlbridge env build {environment.name}"


def _again(name: str) -> str:
    return f"rlbridge env remove {name} && rlbridge env build {name}"


def variables_of(environment: Environment, prefix: Path) -> dict[str, str]:
    """Besides the environment's own, what makes its processes find its programs, and nothing of the driver's packages."""
    site = driver.site_packages(prefix)
    paths = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry and not _shadows(entry, site)]
    return {
        "VIRTUAL_ENV": str(prefix),
        "PATH": os.pathsep.join([str(python_of(prefix).parent), os.environ.get("PATH", os.defpath)]),
        "PYTHONHOME": "",  # Python takes an empty one for none
        "PYTHONPATH": os.pathsep.join(paths),
        **environment.variables,
    }


def _shadows(entry: str, site: Path) -> bool:
    """Whether a folder of PYTHONPATH holds a distribution that the environment has too; a folder of sources holds none."""
    return not driver.versions(Path(entry)).keys().isdisjoint(driver.versions(site))


def _absent(backend: Backend, environment: Environment, prefix: Path) -> str | None:
    paths = [str(driver.site_packages(prefix))]
    if environment.site:
        paths.append(str(site_folder(environment, prefix)))
    return next((module for module in backend.requires if missing_module(module, paths)), None)
