"""`rlbridge conform --soft-roce`: the suite in a guest that has an RDMA device, or here, where the kernel can make one."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rlbridge.plugins import MODULES_VARIABLE
from rlbridge_conformance.faults import SuiteError
from rlbridge_conformance.soft_roce import guest, kernel, provider, tools

LEFT_OUT_VARIABLE = "RLBRIDGE_SOFT_ROCE"
"""Where it is 0, no guest is started, and what needs an RDMA device is not run."""

_INTERFACE, _DEVICE = "roce0", "rxe0"
_ADDRESS = "10.78.0.1/24"
_SECONDS = 1500.0
_CROSS = ("LANG", "HOME", "PYTHONPATH", MODULES_VARIABLE)
"""Variables that mean the same in the guest. Those of UCX do not: they name this machine's interfaces."""


def left_out() -> bool:
    """Whether whoever runs this wants no guest."""
    return os.environ.get(LEFT_OUT_VARIABLE) == "0"


def run(arguments: Sequence[str], report: Path) -> int:
    """`python -m rlbridge` with those arguments, where there is an RDMA device; its exit code. What it writes to `OUT` comes
    to `report`, and the console of the guest as guest.log.

    Raises:
        SuiteError: the guest cannot be made, or did not end; a step that has succeeded is kept for the next time.
    """
    clock = _Clock()
    command = [sys.executable, "-m", "rlbridge", *arguments]
    with tempfile.TemporaryDirectory(prefix="rlbridge-soft-roce-") as directory:
        out = Path(directory)
        if own_module():
            clock.step("packages", ", ".join(tools.ensure(guest=False)) or "all there")
            with device():
                clock.step("device")
                environment = {**os.environ, **provider.make(out), "UCX_NET_DEVICES": f"{_DEVICE}:1"}
                code = subprocess.run(_placed(command, report), env=environment, timeout=_SECONDS).returncode
                clock.step("command")
        else:
            clock.step("packages", ", ".join(tools.ensure()) or "all there")
            booted = kernel.kernel()
            clock.step("kernel", booted.version)
            made = {name: _inside(value, out) for name, value in provider.make(out).items()}
            crossing = {name: os.environ[name] for name in _CROSS if name in os.environ}
            path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
            environment = {**crossing, **made, "PATH": path, "UCX_NET_DEVICES": f"{_DEVICE}:1"}
            environment |= {"PYTHONUNBUFFERED": "1", "COLUMNS": str(shutil.get_terminal_size().columns)}
            code = guest.run(
                booted,
                _placed(command, Path(guest.OUT, "report")),
                out,
                environment=environment,
                cwd=Path.cwd(),
                seconds=_SECONDS,
                say=lambda line: print(line.replace(f"{guest.OUT}/report", str(report)), flush=True),
                step=clock.step,
            )
        report.mkdir(parents=True, exist_ok=True)
        for file in sorted((out / "report").glob("*")):
            shutil.copy(file, report)
        if (out / "guest.log").is_file():
            shutil.copy(out / "guest.log", report)
    clock.end()
    return code


def own_module() -> bool:
    """Whether this machine's own kernel has rdma_rxe, and this process may use it."""
    if os.geteuid() != 0 or shutil.which("modprobe") is None:
        return False
    return subprocess.run(["modprobe", "--dry-run", "rdma_rxe"], capture_output=True, timeout=60).returncode == 0


@contextlib.contextmanager
def device() -> Iterator[None]:
    """An RDMA device of software on an interface of its own, for as long as the context lasts.

    Raises:
        SuiteError: the kernel refuses.
    """
    tools.call(["modprobe", "rdma_rxe"])
    tools.call(["ip", "link", "add", _INTERFACE, "type", "dummy"])
    try:
        tools.call(["ip", "addr", "add", _ADDRESS, "dev", _INTERFACE])
        tools.call(["ip", "link", "set", _INTERFACE, "mtu", "9000", "up"])
        tools.call(["rdma", "link", "add", _DEVICE, "type", "rxe", "netdev", _INTERFACE])
        yield
    finally:
        with contextlib.suppress(SuiteError):  # it goes with its interface
            tools.call(["rdma", "link", "delete", _DEVICE])
        tools.call(["ip", "link", "delete", _INTERFACE])


def _placed(command: Sequence[str], report: Path) -> list[str]:
    return list(command) if "--self-test" in command else [*command, "--report", str(report)]


def _inside(value: str, out: Path) -> str:
    return value.replace(str(out), guest.OUT)


class _Clock:
    """Tells how long each step took."""

    def __init__(self) -> None:
        self._start = self._last = time.monotonic()

    def step(self, name: str, more: str = "") -> None:
        now = time.monotonic()
        print(f"soft-roce: {name} {now - self._last:.1f} s{f' ({more})' if more else ''}", flush=True)
        self._last = now

    def end(self) -> None:
        print(f"soft-roce: in all {time.monotonic() - self._start:.1f} s", flush=True)
