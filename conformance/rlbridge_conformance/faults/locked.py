"""A process that may lock next to no memory, as one does that a container or a service has started with its defaults."""

from __future__ import annotations

import ctypes
import os
import resource

_LOCK = 14  # CAP_IPC_LOCK of capabilities(7): whoever has it is held to no limit
_VERSION = 0x20080522  # _LINUX_CAPABILITY_VERSION_3: two sets of 32 bits each
_KIB = 64


class _Header(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class _Data(ctypes.Structure):
    _fields_ = [("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32)]


def lock_little() -> None:
    """Let this process lock 64 KiB, whoever it runs as.

    Raises:
        OSError: the kernel refuses.
    """
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (_KIB << 10, _KIB << 10))
    libc = ctypes.CDLL(None, use_errno=True)
    header, data = _Header(_VERSION, 0), (_Data * 2)()
    if libc.capget(ctypes.byref(header), data) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    data[0].effective &= ~(1 << _LOCK)
    data[0].permitted &= ~(1 << _LOCK)
    if libc.capset(ctypes.byref(header), data) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
