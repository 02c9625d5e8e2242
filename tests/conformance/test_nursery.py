import os
import signal
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlbridge.errors import PeerLostError, ResourceError
from rlbridge_conformance.nursery import Nursery
from rlbridge_conformance.processes import ProcessParty

SERVE = "rlbridge_conformance.processes:serve"


class Told:
    def handle(self, method: str, payload: bytes) -> bytes:
        return method.encode() + payload

    def about(self) -> dict[str, object]:
        return {"prefix": sys.prefix, "modules": "tomllib" in sys.modules, "name": os.environ.get("NURSED"), "pid": os.getpid()}


@pytest.fixture
def nursery() -> Iterator[Nursery]:
    made = Nursery(SERVE, ["tomllib"], variables={"NURSED": "yes"})
    yield made
    made.close()


def test_children_have_what_the_nursery_has_imported_and_its_variables(nursery: Nursery) -> None:
    parties = [ProcessParty(f"trainer[{rank}]", Told, nursery) for rank in range(2)]
    told = [party.do("about") for party in parties]
    assert [t["modules"] for t in told] == [True, True]
    assert [t["name"] for t in told] == ["yes", "yes"]
    assert [t["pid"] for t in told] == [party.pid for party in parties]
    assert parties[0].call("hello ", b"there").result(10) == [b"hello there"]
    for party in parties:
        party.stop()
        assert not alive(party.pid)


def test_a_child_that_is_stopped_can_be_ended(nursery: Nursery) -> None:
    party = ProcessParty("trainer[0]", Told, nursery)
    party.signal(signal.SIGSTOP)
    waiting = party.begin("about")
    party.stop()
    with pytest.raises(PeerLostError, match=r"trainer\[0\]"):
        waiting.result(10)


def test_children_end_when_their_pipe_does(nursery: Nursery) -> None:
    child = nursery.child(Told)
    child.connection.close()
    limit = time.monotonic() + 10
    while alive(child.pid) and time.monotonic() < limit:
        time.sleep(0.02)
    assert not alive(child.pid)


def test_another_interpreter_has_its_own_packages(tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    venv.create(bare)
    site = next(bare.glob("lib/python*/site-packages"))
    (site / "packages.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    nursery = Nursery(SERVE, python=bare / "bin/python")
    try:
        party = ProcessParty("generator[0]", Told, nursery)
        assert party.do("about")["prefix"] == str(bare)
        party.stop()
    finally:
        nursery.close()


def test_it_ends_with_who_asked_for_it_also_while_it_imports(tmp_path: Path) -> None:
    (tmp_path / "endless.py").write_text("import time\ntime.sleep(60)")
    code = (
        f"import sys; sys.path.append({str(tmp_path)!r})\n"
        "from rlbridge_conformance.nursery import Nursery\n"
        f"Nursery({SERVE!r}, ['endless']).child(print)"
    )
    ours = subprocess.Popen([sys.executable, "-c", code])
    limit = time.monotonic() + 30
    while not (children := Path(f"/proc/{ours.pid}/task/{ours.pid}/children").read_text().split()) and time.monotonic() < limit:
        time.sleep(0.02)
    (nursery,) = map(int, children)
    while b"nursery" not in Path(f"/proc/{nursery}/cmdline").read_bytes():
        time.sleep(0.02)
    time.sleep(0.5)
    ours.kill()
    ours.wait()
    while alive(nursery) and time.monotonic() < limit:
        time.sleep(0.02)
    assert not alive(nursery)


def test_an_interpreter_that_does_not_start_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    nursery = Nursery(SERVE, ["nothing_of_that_name"])
    with pytest.raises(ResourceError, match="did not start"):
        nursery.child(Told)
    assert "nothing_of_that_name" in capfd.readouterr().err


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False
