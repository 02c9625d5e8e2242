"""What the guest is made of on this machine: programs of the distribution, installed where they are missing."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlbridge_conformance.faults import SuiteError

_PACKAGES = {
    "qemu-system-x86_64": "qemu-system-x86",
    "busybox": "busybox-static",
    "modprobe": "kmod",
    "depmod": "kmod",
    "cpio": "cpio",
    "patchelf": "patchelf",
    "rdma": "iproute2",
    "dpkg-deb": "dpkg",
    "/etc/libibverbs.d/rxe.driver": "ibverbs-providers",
}
"""Packages by what is looked for: a program of the path, or a file."""

_OF_A_DEVICE = ("ibverbs-providers", "iproute2", "kmod", "patchelf")
_SECONDS = 600.0
_PATH = os.pathsep.join(filter(None, (os.environ.get("PATH"), "/usr/sbin", "/sbin")))


def ensure(*, guest: bool = True) -> list[str]:
    """Install the packages that are missing, and give their names; without a guest, of those that a device of software needs.

    Raises:
        SuiteError: there is no apt-get here, or it needs root and this is another user, or it fails.
    """
    needed = {what: package for what, package in _PACKAGES.items() if guest or package in _OF_A_DEVICE}
    missing = sorted({package for what, package in needed.items() if not _is_there(what)})
    if not missing:
        return []
    by_hand = f"apt-get install --no-install-recommends {' '.join(missing)}"
    if shutil.which("apt-get") is None:
        raise SuiteError(
            f"an RDMA device of software needs {', '.join(missing)}, and there is no apt-get here",
            todo="the harness is for Debian and Ubuntu; install what these packages have by other means",
        )
    if os.geteuid() != 0:
        raise SuiteError(
            f"an RDMA device of software needs {', '.join(missing)}, which only root can install", todo=f"run: sudo {by_hand}"
        )
    env = {"DEBIAN_FRONTEND": "noninteractive"}
    call(["apt-get", "update", "-qq"], env=env)
    call([*by_hand.split(), "--yes", "-qq"], env=env)
    still = [what for what in needed if not _is_there(what)]
    if still:
        raise SuiteError(f"apt-get has installed {', '.join(missing)}, and {', '.join(still)} is missing still")
    return missing


def call(command: Sequence[str], *, env: Mapping[str, str] = {}, cwd: str | None = None, seconds: float = _SECONDS) -> str:
    """What a program prints.

    Raises:
        SuiteError: it fails, or does not end in time; with the end of what it said.
    """
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, cwd=cwd, env={**os.environ, "PATH": _PATH, **env}
        )
    except subprocess.TimeoutExpired:
        raise SuiteError(f"{' '.join(command)} did not end within {seconds:.0f} s") from None
    except OSError as error:
        raise SuiteError(f"{command[0]} cannot be run: {error.strerror}") from error
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip())[-1000:]
        raise SuiteError(f"{' '.join(command)} failed with {done.returncode}: {said}")
    return done.stdout


def _is_there(what: str) -> bool:
    return Path(what).exists() if what.startswith("/") else shutil.which(what, path=_PATH) is not None
