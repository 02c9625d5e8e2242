"""What the driver is: an environment has to equal it in Python's minor version, in Ray and in rlbridge."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
import sysconfig
from pathlib import Path

from rlbridge.importing import distribution_version


def interpreter() -> Path:
    """The interpreter that the driver's own environment was made from."""
    return Path(getattr(sys, "_base_executable", "") or sys.executable)


def python_version() -> str:
    """For example "3.11.9"."""
    return platform.python_version()


def minor(version: str) -> str:
    """ "3.11" of "3.11.9"."""
    return ".".join(version.split(".")[:2])


def ray_version() -> str:
    """The driver's Ray; empty where there is none."""
    return distribution_version("ray")


def rlbridge_version() -> str:
    """The driver's rlbridge."""
    return distribution_version("rlbridge")


def site_packages(prefix: Path) -> Path:
    """Where a virtual environment at `prefix`, of the driver's Python, keeps its packages."""
    return Path(sysconfig.get_path("purelib", "venv", vars={"base": str(prefix), "platbase": str(prefix)}))


def versions(site: Path) -> dict[str, str]:
    """The distributions in a folder of packages, by their normalised names, and their versions. Only reads metadata."""
    found = importlib.metadata.distributions(path=[str(site)])
    return {normalised(d.name): d.version for d in found if d.name}


def normalised(name: str) -> str:
    """A distribution's name as indexes compare it."""
    return name.lower().replace("_", "-").replace(".", "-")
