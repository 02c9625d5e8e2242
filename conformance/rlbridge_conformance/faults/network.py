"""Two network namespaces on one machine, and a link between them that can be cut, narrowed and stalled.

A process in one end reaches the other end by the link alone, so what its counters say is proof of what crossed.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import itertools
import json
import os
import re
import select
import signal
import struct
import subprocess
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from rlbridge_conformance.faults import SuiteError
from rlbridge_conformance.faults.mounts import mount, own_mounts

INTERFACE = "wire0"
"""The link's interface, of the same name in both ends: the options of a transport are the same on both sides."""

_NETNS = Path("/run/netns")
_OURS = re.compile(r"rlb-(\d+)-\d+[ab]")  # the process that made it, the number of the link, the end
_TIMEOUT = 60.0
_BURST = 256 * 1024  # the offloads hand the queue packets of up to 64 KiB
_LARGEST = 65535  # bytes in a packet

_CLONE_NEWNET = 0x40000000
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000


@dataclass(frozen=True)
class End:
    """One end of a link: a network namespace with an interface of its own."""

    namespace: str
    interface: str
    address: str


@dataclass(frozen=True)
class Traffic:
    """Bytes that an end's interface has carried, with their headers, retransmissions and acknowledgements."""

    received: int
    sent: int


class Link:
    """Two network namespaces that are joined; a context manager. Links may be many, in as many processes.

    Whatever becomes of the body, everything is removed at its end, at the latest when the process ends. What a killed process
    left, the next link removes.

    Args:
        proxy: Join the ends by a process that carries each packet, and not by a veth pair: it can be stopped, and then
            nothing is lost and nothing arrives, as if a switch had hung.

    Attributes:
        ends: The two ends.
    """

    def __init__(self, *, proxy: bool = False) -> None:
        self._with_proxy = proxy
        self._proxy: subprocess.Popen[bytes] | None = None
        self._maker = os.getpid()
        name = f"rlb-{self._maker}-{next(_numbers)}"
        self.ends = (End(f"{name}a", INTERFACE, "10.77.0.1"), End(f"{name}b", INTERFACE, "10.77.0.2"))

    def __enter__(self) -> Link:
        _sweep()
        _links.add(self)
        try:
            self._make()
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()

    @property
    def alive(self) -> bool:
        """Whether the proxy, where there is one, still runs, stopped or not."""
        return self._proxy is None or self._proxy.poll() is None

    def bytes(self) -> tuple[Traffic, Traffic]:
        """What each end's interface has carried since the link was made."""
        return self._traffic(self.ends[0]), self._traffic(self.ends[1])

    def cut(self) -> None:
        """Take the link down. Packets are lost, addresses stay, and connections are not told."""
        self._set("down")

    def mend(self) -> None:
        """Take it up again. Connections go on by themselves, when TCP tries again: the later, the longer the cut was."""
        self._set("up")

    def narrow(self, mbit_per_s: float) -> None:
        """Let through so much and no more, in each direction; after that much more than before, if it is narrow already."""
        rate = f"{int(mbit_per_s * 1000)}kbit"
        for end in self.ends:
            place = ("dev", end.interface, "root")
            _run(
                "tc",
                "-n",
                end.namespace,
                "qdisc",
                "replace",
                *place,
                "tbf",
                "rate",
                rate,
                "burst",
                f"{_BURST}",
                "latency",
                "100ms",
            )

    def widen(self) -> None:
        """Take the limit of `narrow` away, if there is one."""
        for end in (end for end in self.ends if self._limit(end) is not None):
            _run("tc", "-n", end.namespace, "qdisc", "del", "dev", end.interface, "root")

    def limits(self) -> tuple[float | None, float | None]:
        """The Mbit/s that the kernel says each end is limited to; None: to nothing."""
        return self._limit(self.ends[0]), self._limit(self.ends[1])

    def stall(self) -> None:
        """Stop the proxy, and return when it has stopped.

        Raises:
            SuiteError: the link has no proxy, or it is gone.
        """
        pid = self._signal(signal.SIGSTOP)
        os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def go_on(self) -> None:
        """Let the proxy go on.

        Raises:
            SuiteError: the link has no proxy, or it is gone.
        """
        self._signal(signal.SIGCONT)

    def remove(self) -> None:
        """Remove all of it. To call it twice does no harm; a forked child's call does nothing."""
        if os.getpid() != self._maker:
            return
        _links.discard(self)
        if self._proxy is not None:
            self._proxy.kill()
            self._proxy.wait(_TIMEOUT)
            for pipe in (self._proxy.stdin, self._proxy.stdout, self._proxy.stderr):
                if pipe is not None:
                    pipe.close()
            self._proxy = None
        for end in self.ends:
            _remove(end.namespace)

    def _make(self) -> None:
        for end in self.ends:
            _run("ip", "netns", "add", end.namespace)
            # IPv6 greets its neighbours unasked; the counters are to count what the test sends.
            quiet = "/proc/sys/net/ipv6/conf/all/disable_ipv6"
            _run("ip", "netns", "exec", end.namespace, "sh", "-c", f"[ ! -e {quiet} ] || echo 1 > {quiet}")
        here, there = (end.namespace for end in self.ends)
        if self._with_proxy:
            self._proxy = _start_proxy(here, there)
        else:
            _run("ip", "-n", here, "link", "add", INTERFACE, "type", "veth", "peer", "name", INTERFACE, "netns", there)
        for end, other in (self.ends, self.ends[::-1]):
            ip = ("ip", "-n", end.namespace)
            if self._with_proxy:
                _run(*ip, "link", "set", INTERFACE, "mtu", f"{_LARGEST}")
            _run(*ip, "addr", "add", f"{end.address}/32", "peer", other.address, "dev", INTERFACE)
            _run(*ip, "link", "set", "lo", "up")
            _run(*ip, "link", "set", INTERFACE, "up")

    def _set(self, state: str) -> None:
        for end in self.ends:
            _run("ip", "-n", end.namespace, "link", "set", end.interface, state)

    def _traffic(self, end: End) -> Traffic:
        shown = json.loads(_run("ip", "-n", end.namespace, "-j", "-s", "link", "show", "dev", end.interface))
        counted = shown[0]["stats64"]
        return Traffic(counted["rx"]["bytes"], counted["tx"]["bytes"])

    def _limit(self, end: End) -> float | None:
        shown = json.loads(_run("tc", "-n", end.namespace, "-j", "qdisc", "show", "dev", end.interface))
        rates: list[int] = [q["options"]["rate"] for q in shown if q["kind"] == "tbf"]
        return rates[0] * 8 / 1e6 if rates else None

    def _signal(self, number: signal.Signals) -> int:
        if self._proxy is None:
            raise SuiteError("the link has no proxy", todo="Link(proxy=True) has one")
        if self._proxy.poll() is not None:
            raise SuiteError(f"the link's proxy ended with {self._proxy.returncode}")
        self._proxy.send_signal(number)
        return self._proxy.pid


def enter(namespace: str) -> None:
    """Move the calling thread into a network namespace that has a name, with a /sys that shows its interfaces.

    The threads and processes that it starts afterwards are there too; those that exist already stay, as do open sockets: call
    it in the main thread of a fresh child. /sys is mounted anew, in a mount namespace of its own, since libraries find
    interfaces there (UCX does): what is mounted below it, such as the control groups, is not to be seen any more.

    Raises:
        SuiteError: there is no such namespace, or the kernel refuses; it takes CAP_SYS_ADMIN.
    """
    _set_namespace(namespace)
    own_mounts()
    mount("rlbridge", "/sys", "sysfs")


def _set_namespace(namespace: str) -> None:
    try:
        descriptor = os.open(_NETNS / namespace, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise SuiteError(f"there is no network namespace {namespace!r}") from error
    try:
        libc = ctypes.CDLL(None, use_errno=True)  # os.setns is of Python 3.12
        if libc.setns(descriptor, _CLONE_NEWNET) != 0:
            raise SuiteError(f"setns to {namespace} failed: {os.strerror(ctypes.get_errno())}", todo="it takes CAP_SYS_ADMIN")
    finally:
        os.close(descriptor)


def _start_proxy(here: str, there: str) -> subprocess.Popen[bytes]:
    """The proxy, when it has made the interfaces. It ends with its stdin, which ends with this process."""
    code = f"from {__name__} import _carry; _carry({here!r}, {there!r})"
    command = [sys.executable, "-c", code]
    proxy = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert proxy.stdout is not None
    ready, _, _ = select.select([proxy.stdout], [], [], _TIMEOUT)
    if ready and proxy.stdout.readline() == b"ready\n":
        return proxy
    proxy.kill()
    _, trace = proxy.communicate(timeout=_TIMEOUT)
    raise SuiteError(f"the link's proxy did not start: {trace.decode(errors='replace').strip() or 'it said nothing'}")


def _carry(here: str, there: str) -> None:
    """The proxy: every packet that one end sends is read and handed to the other one, until stdin ends.

    By tun devices and not by packet sockets: what they hand out is checksummed and cut into packets already, and they count a
    byte as sent when it is read here, so that the counters stand still when the proxy does.
    """
    first, second = _tun(here), _tun(there)
    across = {first: second, second: first}
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    poll = select.poll()
    for descriptor in (sys.stdin.fileno(), first, second):
        poll.register(descriptor, select.POLLIN)
    while True:
        for descriptor, _ in poll.poll():
            if descriptor not in across:
                return
            packet = os.read(descriptor, _LARGEST)
            with contextlib.suppress(OSError):  # the other end is down: the packet is lost, as on a cable
                os.write(across[descriptor], packet)


def _tun(namespace: str) -> int:
    """A tun device in the namespace, which ends with the descriptor."""
    _set_namespace(namespace)
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", INTERFACE.encode(), _IFF_TUN | _IFF_NO_PI))
    return descriptor


def _sweep() -> None:
    """Remove what is left of processes that are gone, their children in it included."""
    for path in _NETNS.glob("rlb-*"):
        match = _OURS.fullmatch(path.name)
        if match and not Path("/proc", match[1]).exists():
            with contextlib.suppress(SuiteError, ProcessLookupError):  # another process may be sweeping too
                for pid in _run("ip", "netns", "pids", path.name).split():
                    os.kill(int(pid), signal.SIGKILL)
            _remove(path.name)


def _remove(namespace: str) -> None:
    """Its interface first: a process that is in it still would keep that alive."""
    if (_NETNS / namespace).exists():
        with contextlib.suppress(SuiteError):  # it was never made, or went with the other end
            _run("ip", "-n", namespace, "link", "del", INTERFACE)
        with contextlib.suppress(SuiteError):
            _run("ip", "netns", "del", namespace)


def _run(*command: str) -> str:
    """What a command says.

    Raises:
        SuiteError: it is not there, failed, or did not end.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, stdin=subprocess.DEVNULL)
    except FileNotFoundError as error:
        raise SuiteError(f"there is no command {command[0]}", todo="ip and tc are in the package iproute2") from error
    except subprocess.TimeoutExpired as error:
        raise SuiteError(f"`{' '.join(command)}` did not end within {_TIMEOUT:.0f} s: {_text(error.stderr)}") from error
    if done.returncode != 0:
        raise SuiteError(f"`{' '.join(command)}` failed ({done.returncode}): {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def _text(said: Any) -> str:
    return (said or b"").decode(errors="replace").strip()


_numbers = itertools.count()
_links: weakref.WeakSet[Link] = weakref.WeakSet()


@atexit.register
def _remove_all() -> None:
    for link in list(_links):
        with contextlib.suppress(SuiteError, OSError, subprocess.TimeoutExpired):
            link.remove()
