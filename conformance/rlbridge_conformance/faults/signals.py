"""Signals whose effect is there when the call returns."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

from rlbridge_conformance.faults import SuiteError

_STATES = {signal.SIGSTOP: "Tt", signal.SIGKILL: "ZX"}
"""Of every thread of the process, as proc(5) names them."""

_SECONDS = 10.0


def send(pid: int, number: signal.Signals) -> None:
    """Send a process a signal. One that stops or ends it has done so: on a busy machine the kernel takes its time.

    Raises:
        ProcessLookupError: there is no such process.
        SuiteError: the process still ran after 10 s.
    """
    os.kill(pid, number)
    wanted = _STATES.get(number)
    limit = time.monotonic() + _SECONDS
    while wanted is not None and any(state not in wanted for state in _states(pid)):
        if time.monotonic() > limit:
            raise SuiteError(f"process {pid} still ran {_SECONDS:.0f} s after {number.name}")
        time.sleep(0.001)


def _states(pid: int) -> list[str]:
    """Of the threads that are left: none of a process that is gone."""
    found = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for thread in os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                found.append(Path(f"/proc/{pid}/task/{thread}/stat").read_text().rpartition(")")[2].split()[0])
    return found
