"""A shared-memory mount that is small, or full, for one process alone or for those that join it.

A mount namespace belongs to a thread. What calls into it here changes the calling thread, and the threads and processes that
it starts afterwards; threads that exist already keep what they had. So it is for the main thread of a fresh child, before
that has started any.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from rlbridge_conformance.faults import SuiteError

SHARED_MEMORY = "/dev/shm"

_SOURCE = "rlbridge-small"
"""What /proc/mounts calls a mount of ours."""

_CLONE_NEWNS = 0x00020000
_MS_REMOUNT, _MS_REC, _MS_PRIVATE = 0x20, 0x4000, 0x40000


def small_shared_memory(nbytes: int) -> None:
    """Put an empty tmpfs of `nbytes`, in whole pages, over /dev/shm. Segments that are mapped already stay as they are.

    Raises:
        SuiteError: the kernel refuses; it takes CAP_SYS_ADMIN.
    """
    own_mounts()
    mount(_SOURCE, SHARED_MEMORY, "tmpfs", 0, f"size={nbytes}")


def fill_shared_memory(leave: int = 0) -> Path:
    """Take up what is free with one file, but for `leave` bytes, and return it: without it, the memory is free again.

    Raises:
        SuiteError: /dev/shm is the machine's own here.
    """
    _must_be_small("fill")
    free = os.statvfs(SHARED_MEMORY)
    path = Path(SHARED_MEMORY, "rlbridge-filler")
    with path.open("ab") as file:
        taken = path.stat().st_size
        more = free.f_bavail * free.f_frsize - leave
        if more > 0:
            os.posix_fallocate(file.fileno(), taken, more)
    return path


@contextlib.contextmanager
def private_shared_memory(nbytes: int, *, full: bool = False) -> Iterator[int]:
    """A process that holds a /dev/shm of `nbytes`, empty or full, while the context lasts. Yields its pid, for `join`.

    Raises:
        SuiteError: the kernel refuses.
    """
    fill = "fill_shared_memory(); " if full else ""
    code = f"import sys; from {__name__} import *; small_shared_memory({nbytes}); {fill}print(); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        if not holder.stdout.readline():
            raise SuiteError("no small /dev/shm can be made", todo="it takes root, or CAP_SYS_ADMIN")
        yield holder.pid
        holder.stdin.write("\n")


def join(pid: int) -> None:
    """See the mounts of another process, which then are both's.

    Raises:
        SuiteError: the kernel refuses.
    """
    descriptor = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY)
    try:
        if _libc.setns(descriptor, _CLONE_NEWNS) != 0:  # os.setns is of Python 3.12
            raise _refused(f"setns to the mounts of {pid}")
    finally:
        os.close(descriptor)


def enlarge(nbytes: int) -> None:
    """Give the small mount `nbytes` in all; what it holds stays.

    Raises:
        SuiteError: /dev/shm is the machine's own here, or holds more than `nbytes`.
    """
    _must_be_small("resize")
    mount(_SOURCE, SHARED_MEMORY, "tmpfs", _MS_REMOUNT, f"size={nbytes}")


def own_mounts() -> None:
    """Give the calling thread a mount namespace of its own: no mount in it or outside it crosses.

    Raises:
        SuiteError: the kernel refuses; it takes CAP_SYS_ADMIN.
    """
    if _libc.unshare(_CLONE_NEWNS) != 0:
        raise _refused("unshare(CLONE_NEWNS)")
    mount("none", "/", None, _MS_REC | _MS_PRIVATE)


def mount(source: str, target: str, kind: str | None, flags: int = 0, options: str = "") -> None:
    """mount(2).

    Raises:
        SuiteError: the kernel refuses.
    """
    words = [None if word is None else word.encode() for word in (source, target, kind)]
    if _libc.mount(*words, ctypes.c_ulong(flags), options.encode()) != 0:
        raise _refused(f"mount({source!r}, {target!r}, {kind!r}, {flags:#x}, {options!r})")


def is_private() -> bool:
    """Whether /dev/shm is a mount of ours here, and not the machine's own, which is other people's too."""
    place = os.path.realpath(SHARED_MEMORY)
    # A line: id, parent, device, root, mount point, options ... - type, source, options.
    lines = [line.split() for line in Path("/proc/thread-self/mountinfo").read_text().splitlines()]
    sources = [words[words.index("-") + 2] for words in lines if words[4] == place]
    return sources[-1:] == [_SOURCE]


def _must_be_small(verb: str) -> None:
    if not is_private():
        raise SuiteError(f"will not {verb} the machine's own {SHARED_MEMORY}", todo="call small_shared_memory first")


def _refused(call: str) -> SuiteError:
    number = ctypes.get_errno()
    return SuiteError(f"{call} failed: {os.strerror(number)}", errno=number, todo="it takes root, or CAP_SYS_ADMIN")


_libc = ctypes.CDLL(None, use_errno=True)
