"""What this machine can do for the suite, found out by trying."""

from __future__ import annotations

import functools
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from rlbridge.rdma.devices import has_rdma_device
from rlbridge_conformance.faults import SuiteError, mounts, network

_TIMEOUT = 120.0


@functools.cache
def lacks(need: str) -> str | None:
    """Why `need` cannot be had on this machine; None: it can. It is tried once in a process, and nothing is left of the try.

    The needs: network_namespaces, traffic_control, tun (what a link's proxy stands on), mount_namespaces, rdma, cuda, ray.

    Raises:
        SuiteError: there is no such need.
    """
    if need not in _TRIES:
        raise SuiteError(f"the suite knows no need {need!r}", todo=f"it knows {', '.join(_TRIES)}")
    try:
        return _TRIES[need]()
    except SuiteError as error:
        return error.what


def _network_namespaces() -> str | None:
    with network.Link() as link:
        return _fails(f"from {network.__name__} import enter; enter({link.ends[0].namespace!r})")


def _traffic_control() -> str | None:
    with network.Link() as link:
        link.narrow(100)
        return None if link.limits() == (100.0, 100.0) else f"tc was told 100 Mbit/s, and says {link.limits()}"


def _tun() -> str | None:
    with network.Link(proxy=True):
        return None


def _mount_namespaces() -> str | None:
    return _fails(f"from {mounts.__name__} import small_shared_memory; small_shared_memory(1 << 20)")


def _rdma() -> str | None:
    return None if has_rdma_device() else "no RDMA device: /sys/class/infiniband is empty"


def _cuda() -> str | None:
    if Path("/dev/nvidia0").exists():
        return None
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "no CUDA device: neither /dev/nvidia0 nor nvidia-smi"
    try:
        listed = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=_TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"no CUDA device: nvidia-smi failed: {error}"
    return None if "GPU" in listed.stdout else f"no CUDA device: nvidia-smi says {(listed.stdout + listed.stderr).strip()!r}"


def _ray() -> str | None:
    return None if importlib.util.find_spec("ray") else "ray is not installed"


def _fails(code: str) -> str | None:
    """Why the code fails, in a process of its own: its namespaces are not for this one."""
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=_TIMEOUT)
    except subprocess.TimeoutExpired:
        return f"a try did not end within {_TIMEOUT:.0f} s"
    if done.returncode == 0:
        return None
    said = [line for line in done.stderr.splitlines() if line.strip()]
    ours = [line.partition(f"{SuiteError.__name__}: ")[2] for line in said if f"{SuiteError.__name__}: " in line]
    return (ours or said or [f"a try ended with {done.returncode}"])[-1]


_TRIES: dict[str, Callable[[], str | None]] = {
    "network_namespaces": _network_namespaces,
    "traffic_control": _traffic_control,
    "tun": _tun,
    "mount_namespaces": _mount_namespaces,
    "rdma": _rdma,
    "cuda": _cuda,
    "ray": _ray,
}
