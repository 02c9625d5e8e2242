"""The processes of an engine: they end with their actor, and one that is lost is known by name."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path

ACTOR_VARIABLE = "RLBRIDGE_VLLM_ACTOR"
"""The pid of the actor whose engine a process belongs to."""

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Let the kernel end this process when the thread that started it ends, however that comes about."""
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the kernel was told
        os.kill(os.getpid(), signal.SIGKILL)


class Watch:
    """Watches processes, which need not be children: when several end one after the other, the first is known.

    Args:
        pids: By name.
    """

    def __init__(self, pids: Mapping[str, int]) -> None:
        self.pids = dict(pids)
        self._lost: list[str] = []
        self._poll = select.poll()
        self._names: dict[int, str] = {}
        for name, pid in self.pids.items():
            try:
                descriptor = os.pidfd_open(pid)
            except ProcessLookupError:
                self._lost.append(name)
                continue
            self._names[descriptor] = name
            self._poll.register(descriptor, select.POLLIN)
        self._end, self._ended = os.pipe()
        self._poll.register(self._end, select.POLLIN)
        self._thread = threading.Thread(target=self._watch, name="rlbridge-vllm-watch", daemon=True)
        self._thread.start()

    def lost(self) -> list[str]:
        """The names of those that have ended, the first to end first."""
        return list(self._lost)

    def stopped(self) -> list[str]:
        """The names of those that are stopped by a signal, and so answer nothing."""
        return [name for name, pid in self.pids.items() if _state(pid) in ("T", "t")]

    def wait_for_the_end(self, seconds: float) -> bool:
        """Whether all of them ended within `seconds`."""
        limit = time.monotonic() + seconds
        while len(self._lost) < len(self.pids) and time.monotonic() < limit:
            time.sleep(0.01)
        return len(self._lost) >= len(self.pids)

    def kill(self) -> None:
        """End those that are left."""
        for name, pid in self.pids.items():
            if name not in self._lost:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        """Stop watching."""
        os.write(self._ended, b".")
        self._thread.join(5)
        for descriptor in (*self._names, self._end, self._ended):
            os.close(descriptor)

    def _watch(self) -> None:
        while True:
            for descriptor, _ in self._poll.poll():
                if descriptor == self._end:
                    return
                self._poll.unregister(descriptor)
                self._lost.append(self._names[descriptor])


def _state(pid: int) -> str:
    """The letter that the kernel gives the state of a process, or ""."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""
