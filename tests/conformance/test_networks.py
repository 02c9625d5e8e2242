"""Links, small shared memory, and weights that cross a link while it breaks."""

from __future__ import annotations

import errno
import functools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from rlbridge.errors import DeadlineError
from rlbridge.sync.messages import TransportSpec
from rlbridge.sync.session import SyncOptions, SyncSession
from rlbridge_conformance.faults import SuiteError
from rlbridge_conformance.faults.machine import lacks
from rlbridge_conformance.faults.mounts import enlarge, fill_shared_memory, small_shared_memory
from rlbridge_conformance.faults.network import INTERFACE, Link, enter
from rlbridge_conformance.processes import ProcessParty
from rlbridge_conformance.toy import BULK, ToyEngine, ToySource
from tests.sync.warm import warm_up

MIB = 1 << 20
MIB_ROWS = MIB // 4 // BULK


def needs(*names: str) -> pytest.MarkDecorator:
    """Skips a test that this machine cannot run, and says why."""
    reasons = [reason for name in names if (reason := lacks(name)) is not None]
    return pytest.mark.skipif(bool(reasons), reason="; ".join(reasons))


both_kinds = pytest.mark.parametrize("proxy", [False, pytest.param(True, marks=needs("tun"))], ids=["veth", "proxy"])
networks = needs("network_namespaces")
traffic = needs("network_namespaces", "traffic_control")
mounts = needs("mount_namespaces")


class Guest:
    """What runs in an end, or over a small mount: sends and receives, and says what it sees."""

    def __init__(self) -> None:
        import socket

        self._socket = socket
        self.arrived = 0
        self._listener: socket.socket | None = None
        self._thread: threading.Thread | None = None

    def listen(self, address: str) -> int:
        self._listener = self._socket.create_server((address, 0))
        self._thread = threading.Thread(target=self._receive, daemon=True)
        self._thread.start()
        return int(self._listener.getsockname()[1])

    def send(self, address: str, port: int, nbytes: int) -> None:
        with self._socket.create_connection((address, port), timeout=30) as connection:
            connection.sendall(bytes(nbytes))

    def count(self) -> int:
        return self.arrived

    def interfaces(self) -> list[str]:
        return sorted(path.name for path in Path("/sys/class/net").iterdir())

    def fill(self, leave: int = 0) -> str:
        return str(fill_shared_memory(leave))

    def write(self, nbytes: int) -> str | None:
        """The name of the error that writing to /dev/shm gives."""
        path = Path("/dev/shm/rlbridge-test")
        try:
            path.write_bytes(bytes(nbytes))
        except OSError as error:
            path.unlink()
            return errno.errorcode[error.errno or 0]
        return None

    def enlarge(self, nbytes: int) -> None:
        enlarge(nbytes)

    def sees(self, path: str) -> bool:
        return Path(path).exists()

    def size(self) -> int:
        found = os.statvfs("/dev/shm")
        return found.f_blocks * found.f_frsize

    def size_for_a_child(self) -> int:
        return int(subprocess.run(["stat", "-fc", "%b", "/dev/shm"], capture_output=True, check=True).stdout) * 4096

    def _receive(self) -> None:
        assert self._listener is not None
        connection, _ = self._listener.accept()
        while chunk := connection.recv(MIB):
            self.arrived += len(chunk)


def inside(namespace: str, build: Callable[[], Any]) -> Any:
    enter(namespace)
    return build()


def over_small_memory(nbytes: int) -> Guest:
    small_shared_memory(nbytes)
    return Guest()


@pytest.fixture
def start() -> Iterator[Callable[..., ProcessParty]]:
    """Starts processes, and ends them after the test."""
    started: list[ProcessParty] = []

    def begin(build: Callable[[], Any], name: str = "guest") -> ProcessParty:
        started.append(ProcessParty(name, build))
        return started[-1]

    yield begin
    for party in started:
        party.stop()


class Crossing:
    """A transfer of `nbytes` over a link, from its first end to its second."""

    def __init__(self, link: Link, start: Callable[..., ProcessParty], nbytes: int) -> None:
        self.nbytes = nbytes
        here, there = link.ends
        self.sender = start(functools.partial(inside, here.namespace, Guest))
        self.receiver = start(functools.partial(inside, there.namespace, Guest))
        port = self.receiver.do("listen", there.address)
        self.sending = self.sender.begin("send", there.address, port, nbytes)

    def arrived(self) -> int:
        return int(self.receiver.do("count"))

    def ends(self) -> bool:
        self.sending.result(30)
        return eventually(lambda: self.arrived() == self.nbytes, 30)


@networks
@both_kinds
def test_what_crosses_the_link_is_what_it_counts(start: Callable[..., ProcessParty], proxy: bool) -> None:
    with Link(proxy=proxy) as link:
        crossing = Crossing(link, start, 32 * MIB)
        assert crossing.ends()
        here, there = link.bytes()
        assert here.sent >= crossing.nbytes
        assert there.received >= crossing.nbytes
        assert here.received < crossing.nbytes
        assert crossing.sender.do("interfaces") == ["lo", INTERFACE]


@networks
def test_a_process_reaches_itself_without_the_link(start: Callable[..., ProcessParty]) -> None:
    with Link() as link:
        guest = start(functools.partial(inside, link.ends[0].namespace, Guest))
        for address in ("127.0.0.1", link.ends[0].address):
            guest.do("send", address, guest.do("listen", address), MIB)
        assert eventually(lambda: guest.do("count") == 2 * MIB)
        assert max(link.bytes()[0].sent, link.bytes()[0].received) < MIB


@traffic
@both_kinds
def test_a_cut_link_carries_nothing_until_it_is_mended(start: Callable[..., ProcessParty], proxy: bool) -> None:
    with Link(proxy=proxy) as link:
        link.narrow(20)  # so that it is in the middle
        crossing = Crossing(link, start, 24 * MIB)
        assert eventually(lambda: crossing.arrived() > MIB)
        link.cut()
        assert stands_still(link, crossing)
        link.mend()
        link.widen()
        assert crossing.ends()


@networks
@needs("tun")
def test_a_stalled_link_carries_nothing_and_loses_nothing(start: Callable[..., ProcessParty]) -> None:
    with Link(proxy=True) as link:
        link.narrow(20)
        crossing = Crossing(link, start, 24 * MIB)
        assert eventually(lambda: crossing.arrived() > MIB)
        link.stall()
        assert stands_still(link, crossing)
        link.go_on()
        link.widen()
        assert crossing.ends()


@traffic
@both_kinds
def test_a_narrow_link_says_so_and_holds_back(start: Callable[..., ProcessParty], proxy: bool) -> None:
    with Link(proxy=proxy) as link:
        assert link.limits() == (None, None)
        link.narrow(8)
        link.narrow(4)
        assert link.limits() == (4.0, 4.0)
        began = time.monotonic()
        crossing = Crossing(link, start, 8 * MIB)
        assert eventually(lambda: crossing.arrived() > 0)
        time.sleep(0.5)
        carried = link.bytes()[1].received
        assert carried <= 0.5e6 * (time.monotonic() - began) + 2 * 256 * 1024  # what the rate allows, and the bucket
        link.widen()
        assert link.limits() == (None, None)
        assert crossing.ends()


@networks
def test_two_links_at_once_know_nothing_of_each_other(start: Callable[..., ProcessParty]) -> None:
    with Link() as one, Link() as other:
        assert not {e.namespace for e in one.ends} & {e.namespace for e in other.ends}
        crossings = [Crossing(link, start, (index + 1) * 4 * MIB) for index, link in enumerate((one, other))]
        assert all(c.ends() for c in crossings)
        assert [c.arrived() for c in crossings] == [4 * MIB, 8 * MIB]
        assert one.bytes()[1].received < 6 * MIB < other.bytes()[1].received


@networks
@both_kinds
def test_nothing_is_left_of_a_link_whose_body_fails(start: Callable[..., ProcessParty], proxy: bool) -> None:
    before = all_interfaces()
    link = Link(proxy=proxy)

    def fail() -> None:
        with link:
            start(functools.partial(inside, link.ends[0].namespace, Guest)).do("count")  # who is in it still
            assert {e.namespace for e in link.ends} <= namespaces()
            if proxy:
                link.stall()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not {e.namespace for e in link.ends} & namespaces()
    assert all_interfaces() == before
    assert link.alive
    link.remove()  # once more


MAKES_LINKS = """
import os, signal, sys
from rlbridge_conformance.faults.network import Link
links = [Link().__enter__(), Link(proxy=sys.argv[1] == "killed").__enter__()]
print(*(end.namespace for link in links for end in link.ends), *(l._proxy.pid for l in links if l._proxy))
sys.stdout.flush()
if sys.argv[1] == "killed":
    links[1].stall()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@networks
def test_a_process_that_ends_removes_its_links() -> None:
    made = subprocess.run([sys.executable, "-c", MAKES_LINKS, "ends"], capture_output=True, text=True, timeout=30)
    assert made.returncode == 0, made.stderr
    assert len(made.stdout.split()) == 4
    assert not set(made.stdout.split()) & namespaces()


@networks
@needs("tun")
def test_the_next_link_removes_what_a_killed_process_left() -> None:
    made = subprocess.run([sys.executable, "-c", MAKES_LINKS, "killed"], capture_output=True, text=True, timeout=30)
    assert made.returncode == -signal.SIGKILL, made.stderr
    *left, proxy = made.stdout.split()
    with Link() as link:
        assert not set(left) & namespaces()
        assert {e.namespace for e in link.ends} <= namespaces()
    assert eventually(lambda: not Path("/proc", proxy).exists() or "Z" in Path("/proc", proxy, "stat").read_text().split()[2])


@networks
def test_a_link_says_what_went_wrong() -> None:
    with Link() as link:
        with pytest.raises(SuiteError, match="no proxy"):
            link.stall()
        with pytest.raises(SuiteError, match=r"`tc -n rlb-\d+-\d+a qdisc replace dev wire0 .+` failed \(\d+\): .+"):
            link.narrow(0)
    with pytest.raises(SuiteError, match="no network namespace 'rlb-nowhere'"):
        enter("rlb-nowhere")


def test_a_machine_says_what_it_lacks() -> None:
    for need in ("network_namespaces", "traffic_control", "tun", "mount_namespaces", "rdma", "cuda", "ray"):
        reason = lacks(need)
        assert reason is None or len(reason) > 10
        assert lacks(need) is reason
    with pytest.raises(SuiteError, match="no need 'luck'"):
        lacks("luck")


@mounts
def test_small_shared_memory_is_the_childs_alone(start: Callable[..., ProcessParty]) -> None:
    before = os.statvfs("/dev/shm")
    child = start(functools.partial(over_small_memory, MIB))
    assert child.do("size") == MIB  # on a thread that was started later
    assert child.do("size_for_a_child") == MIB
    assert child.do("write", 2 * MIB) == "ENOSPC"
    assert child.do("write", MIB // 2) is None
    filler = child.do("fill")
    assert child.do("sees", filler)
    assert child.do("write", MIB // 2 + 4096) == "ENOSPC"
    assert not Path(filler).exists()
    assert os.statvfs("/dev/shm").f_blocks == before.f_blocks
    child.do("enlarge", 4 * MIB)
    assert child.do("write", MIB) is None
    child.do("fill", leave=MIB)
    assert child.do("write", 2 * MIB) is None  # the old MiB is free again
    assert child.do("write", 2 * MIB + 4096) == "ENOSPC"


@mounts
def test_the_machines_own_shared_memory_is_not_touched() -> None:
    for change in (fill_shared_memory, functools.partial(enlarge, 1 << 40)):
        with pytest.raises(SuiteError, match="machine's own /dev/shm"):
            change()


@mounts
def test_a_thread_that_was_there_before_keeps_the_old_mount() -> None:
    """Which is why it has to be called first."""
    seen: list[int] = []

    def change() -> None:
        small_shared_memory(MIB)
        seen.append(os.statvfs("/dev/shm").f_blocks)

    before = os.statvfs("/dev/shm").f_blocks
    thread = threading.Thread(target=change)
    thread.start()
    thread.join()
    assert seen == [MIB // 4096]
    assert os.statvfs("/dev/shm").f_blocks == before


# Weights over a link.


class Crew:
    """A trainer rank in the link's first end, an engine in its second, and a session over NIXL between them."""

    def __init__(self, link: Link, mib: int) -> None:
        self.link = link
        self.version = 0
        here, there = (end.namespace for end in link.ends)
        source = functools.partial(ToySource, 0, 1, bulk=mib * MIB_ROWS)
        engine = functools.partial(ToyEngine, 0, 1, bulk=mib * MIB_ROWS)
        self.trainer = ProcessParty("trainer[0]", functools.partial(inside, here, source))
        self.engine = ProcessParty("generator[0]", functools.partial(inside, there, engine))

    def meet(self, operation: str) -> None:
        """Begin a session."""
        spec = TransportSpec("nixl", {"wire": "tcp", "net_devices": INTERFACE, "operation": operation})
        self.session = SyncSession([self.trainer], [self.engine], spec, SyncOptions())

    def publish(self) -> int:
        self.version += 1
        self.trainer.do("load", self.version)
        self.session.publish(self.version)
        return self.version

    def sync(self) -> Any:
        self.version += 1
        self.trainer.do("load", self.version)
        return self.session.sync(self.version)

    def serves(self, version: int) -> bool:
        return bool(self.engine.do("served") == version and self.engine.do("matches", version))

    def carried(self) -> int:
        return self.link.bytes()[1].received

    def carries(self, nbytes: int) -> bool:
        """Whether so much has come over the link since it was made."""
        return self.carried() >= nbytes


@pytest.fixture(scope="module")
def crew() -> Iterator[Crew]:
    """One for all tests: UCX takes a second to load."""
    pytest.importorskip("nixl")
    warm_up()  # imports here what every forked process would otherwise import for itself
    with Link(proxy=True) as link:
        made = Crew(link, 16)
        yield made
        made.trainer.stop()
        made.engine.stop()


both_ways = pytest.mark.parametrize("operation", ["read", "write"])


@networks
@needs("tun")
@both_ways
def test_weights_cross_the_link(crew: Crew, operation: str) -> None:
    crew.meet(operation)
    attached = crew.session.attach()
    before = crew.carried()
    report = crew.sync()
    assert crew.carried() - before >= attached.bytes >= 16 * MIB
    assert crew.serves(crew.version)
    assert [e.wire for e in report.evidence] == [f"tcp/{INTERFACE}"]


def narrow_more(link: Link) -> None:
    link.narrow(1)


FAULTS: list[tuple[Callable[[Link], None], Callable[[Link], None]]] = [
    (Link.cut, Link.mend),
    (Link.stall, Link.go_on),
    (narrow_more, Link.widen),
]


@traffic
@needs("tun")
@both_ways
@pytest.mark.parametrize(("harm", "repair"), FAULTS, ids=["cut", "stall", "narrow"])
def test_a_link_that_breaks_in_the_middle_leaves_the_old_version_served(
    crew: Crew, operation: str, harm: Callable[[Link], None], repair: Callable[[Link], None]
) -> None:
    crew.meet(operation)
    crew.sync()
    served, version = crew.version, crew.publish()
    crew.session.options = SyncOptions(deadline_seconds=4.0)
    crew.link.narrow(20)  # 6.7 s for all: the fault comes in the middle
    before = crew.carried()
    try:
        with ThreadPoolExecutor(1) as pool:
            pull = pool.submit(crew.session.pull, version)
            assert eventually(lambda: crew.carries(before + MIB))
            harm(crew.link)
            assert not pull.done()
            began = time.monotonic()
            with pytest.raises(DeadlineError) as caught:
                pull.result(30)
        assert time.monotonic() - began < 20
        assert caught.value.where["phase"] == "wire"
        assert caught.value.where["version"] == str(version)
        assert caught.value.where["peer"] in ("trainer[0]", "generator[0].rank[0]")
        assert crew.carried() - before < 16 * MIB
        assert crew.serves(served)
    finally:
        repair(crew.link)
        crew.link.widen()
    assert eventually(lambda: crew.carries(before + 16 * MIB), 60)  # late, into an arena that nobody reads
    assert crew.serves(served)
    crew.session.options = SyncOptions()
    for _ in range(2):
        crew.sync()
        assert crew.serves(crew.version)
    assert crew.session.epoch == 2


def stands_still(link: Link, crossing: Crossing) -> bool:
    """Whether nothing is carried, and nothing arrives, for a while; what had arrived may take a moment to be read."""

    def still() -> bool:
        before = link.bytes(), crossing.arrived()
        time.sleep(0.2)
        return (link.bytes(), crossing.arrived()) == before

    return eventually(still) and crossing.arrived() < crossing.nbytes


def namespaces() -> set[str]:
    place = Path("/run/netns")
    return {path.name for path in place.iterdir()} if place.is_dir() else set()


def all_interfaces() -> set[str]:
    return {path.name for path in Path("/sys/class/net").iterdir()}


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    limit = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > limit:
            return False
        time.sleep(0.005)
    return True
