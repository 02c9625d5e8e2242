"""`rlbridge env build`: an environment in the user's cache, made once, from its lock."""

from __future__ import annotations

import errno
import hashlib
import subprocess
from collections.abc import Sequence
from pathlib import Path

from rlbridge.env import driver
from rlbridge.env.brought import bring, place_of, source, wanted
from rlbridge.env.driver import normalised
from rlbridge.env.location import directory, located, lock_text, python_of
from rlbridge.env.lockfile import pins, to_install
from rlbridge.env.stamp import Stamp, now, read_stamp, take_stamp, write_stamp
from rlbridge.env.turn import turn
from rlbridge.env.uv import NO_SPACE, Tell, run_uv, uv_variables
from rlbridge.environment import Environment
from rlbridge.errors import BuildError, PluginError

_REQUIREMENTS = "requirements.txt"
_SITE = "rlbridge-site.pth"


def build(environment: Environment, tell: Tell) -> Path:
    """Make the environment, unless it is there, and return its directory.

    An unfinished one is made anew: uv's cache has what was downloaded, and what a killed uv had half unpacked is not trusted.

    Raises:
        BuildError: it could not be made. It does not count as built.
        PluginError: its lock is missing or cannot be used, it is for another Python, or there is no uv.
    """
    _check_python(environment)
    lock, prefix = lock_text(environment), directory(environment)
    brought = wanted(environment.distribution)
    _check_lock(environment, lock, set(brought))
    if environment.site:
        site_folder(environment, prefix)  # raises where it is not there, before anything is installed

    def wait() -> None:
        tell(f"waiting: another process is at work on {environment.name}", "")

    if _has(prefix, brought):  # also where the directory may only be read
        return prefix
    try:
        with turn(prefix, wait) as held:
            if _has(prefix, brought):  # by the one that was waited for
                return prefix
            if read_stamp(prefix) is None:
                _install(environment, lock, prefix, tell, held)
            take_stamp(prefix)
            _bring(sorted(brought), prefix, tell)
            write_stamp(prefix, _stamped(environment, lock, prefix, brought))
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        todo = NO_SPACE if full else "RLBRIDGE_ENVS names another place"
        raise BuildError(f"the environment {environment.name!r} cannot be written: {error}", todo=todo) from error
    return prefix


def _has(prefix: Path, brought: dict[str, str]) -> bool:
    stamp = read_stamp(prefix)
    return stamp is not None and brought.items() <= stamp.brought.items()


def _check_python(environment: Environment) -> None:
    here = driver.minor(driver.python_version())
    if environment.python not in ("", here):
        raise PluginError(
            f"the environment {environment.name!r} is for Python {environment.python} alone, and this is {here}",
            todo=f"install rlbridge in a Python {environment.python}: all processes of a Ray session share its minor version",
        )


def _check_lock(environment: Environment, lock: str, brought: set[str]) -> None:
    foreign = sorted(brought & pins(lock).keys())
    if foreign:
        raise PluginError(
            f"the lock of the environment {environment.name!r} names {', '.join(foreign)}, which is copied from here",
            todo="take it out of the requirements, and make the lock anew",
        )
    absent = sorted(set(map(normalised, environment.resolved)) - pins(lock).keys())
    if absent:
        raise PluginError(
            f"the lock of the environment {environment.name!r} has no {', '.join(absent)}, which is resolved on each machine",
            todo=f"the plugin's author makes it anew: rlbridge env lock {environment.name}",
        )


def _install(environment: Environment, lock: str, prefix: Path, tell: Tell, held: int) -> None:
    """An empty environment of the driver's Python, and into it what the lock lists, never resolved anew."""
    root = prefix.parent
    fresh = ["venv", "--clear", "--no-project", "--prompt", environment.name, "--python", str(driver.interpreter())]
    run_uv([*fresh, str(prefix)], f"making an environment of Python {driver.python_version()}", tell, cwd=root, held=[held])
    requirements = prefix / _REQUIREMENTS
    requirements.write_text(to_install(lock, environment.no_deps, driver.ray_version()))
    sync = ["pip", "sync", "--python", str(python_of(prefix)), "--compile-bytecode", "--allow-empty-requirements"]
    run_uv([*sync, str(requirements)], f"installing {environment.name}", tell, cwd=root, held=[held])
    if environment.resolved:
        pinned = pins(lock)
        exact = [f"{name}=={pinned[normalised(name)]}" for name in environment.resolved]
        install = ["pip", "install", "--python", str(python_of(prefix)), "--compile-bytecode", *exact]
        run_uv(install, f"installing what {', '.join(exact)} needs on this machine", tell, cwd=root, held=[held])
    if environment.site:
        folder = site_folder(environment, prefix)
        # A path alone in a .pth would not make the folder's own .pth files count.
        (driver.site_packages(prefix) / _SITE).write_text(f"import site; site.addsitedir({str(folder)!r})\n")


def site_folder(environment: Environment, prefix: Path) -> Path:
    """The folder `Environment.site` as the environment has it: beside the copy of its plugin, or in an editable one's source.

    Raises:
        PluginError: there is no such folder.
    """
    folder = located(environment.site)
    if not folder.is_dir():
        raise PluginError(f"the environment {environment.name!r} names the folder {environment.site!r}, and there is none")
    home = place_of(environment.distribution)
    if not source(environment.distribution) and folder.is_relative_to(home):
        return driver.site_packages(prefix) / folder.relative_to(home)
    return folder


def _bring(names: Sequence[str], prefix: Path, tell: Tell) -> None:
    phase = f"copying {', '.join(names)} from here"
    tell(phase, "")
    copies = [copy for name in names for copy in bring(name, driver.site_packages(prefix))]
    modules = "".join(f"{copy}\n" for copy in copies if copy.suffix == ".py")
    compile_all = [str(python_of(prefix)), "-I", "-m", "compileall", "-q", "-i", "-"]
    subprocess.run(compile_all, input=modules, text=True, env=uv_variables({}), check=False, capture_output=True)


def _stamped(environment: Environment, lock: str, prefix: Path, brought: dict[str, str]) -> Stamp:
    there = driver.versions(driver.site_packages(prefix))
    return Stamp(
        name=environment.name,
        key=prefix.name.rpartition("-")[2],
        lock=hashlib.sha256(lock.encode()).hexdigest(),
        python=driver.python_version(),
        ray=there.get("ray", ""),
        rlbridge=there.get("rlbridge", ""),
        brought=brought,
        built=now(),
    )
