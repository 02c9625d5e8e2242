"""`rlbridge conform`: what it prints, what it leaves, and its exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

from rlbridge.cli import conform_command
from rlbridge.cli import main as cli
from rlbridge_conformance.levels import LEVELS
from rlbridge_conformance.report import Check, Environment, Result, read_result
from rlbridge_conformance.report.environment import look
from rlbridge_conformance.report.junit import redact_junit
from rlbridge_conformance.report.terminal import closing_lines

ROOT = Path(__file__).parents[2]
TRANSPORT = "contract.a_single_changed_bit_arrives"

LOSSY = '''
"""A transport that brings nothing, and one that claims what no machine has."""
import os
from rlbridge import Backend, hookimpl
from rlbridge_conformance.reference.transport import ReferenceTransport

@hookimpl
def rlbridge_transports():
    return [Backend(name.lower(), f"lossy:{name}", "For a test.") for name in ("Lossy", "Absent", "Bomb", "Mistaken")]

class Lossy(ReferenceTransport):
    def receive(self, version, slot, tensors, deadline):
        print("api_key=abc123secret")
        return sum(copy.nbytes for copy in self.copies_of(slot))

class Absent(ReferenceTransport):
    @classmethod
    def unavailable(cls, options, device):
        return "there is no such wire here"

class Mistaken(ReferenceTransport):
    def receive(self, version, slot, tensors, deadline):
        return {}["a mistake"]

class Bomb(ReferenceTransport):
    @classmethod
    def unavailable(cls, options, device):
        os._exit(7)
'''


def conform(place: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """The command, run where `place` is the current directory."""
    code = "import sys; from rlbridge.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "conform", *arguments]
    return subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=120, env={**os.environ, **env})


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "lossy.py").write_text(LOSSY)
    return tmp_path


# Runs


def test_a_pass_ends_with_its_verdict_and_the_report(place: Path) -> None:
    # Settings of the place where one stands are not the suite's.
    (place / "pytest.ini").write_text("[pytest]\naddopts = --no-such-option\nrlbridge_level = nonsense\n")
    ran = conform(place, "--transport", "reference", "--level", "contract", "-k", "single_changed_bit", PYTEST_ADDOPTS="-v")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stderr == ""
    triple, progress, verdict, report = ran.stdout.splitlines()
    assert triple == "reference > reference > reference"
    assert re.fullmatch(r"\. +\[100%\]", progress)
    assert verdict == "conformant: reference > reference > reference, contract 1/1 (cma)"
    assert report == "report: conformance-report/report.html"
    assert sorted(p.name for p in (place / "conformance-report").iterdir()) == ["junit.xml", "report.html", "result.json"]
    assert [check.id for check in read_result(place / "conformance-report").checks] == [TRANSPORT]


def test_a_failure_is_told_in_short_and_nothing_follows_the_verdict(place: Path) -> None:
    (place / "out").mkdir()
    (place / "out/result.json").write_text("of an earlier run")
    given = ("--plugin", "lossy", "--transport", "lossy", "--level", "contract", "--report", "out")
    ran = conform(place, *given, "-k", "single_changed_bit or receive_counts")
    assert ran.returncode == 1, ran.stdout + ran.stderr
    lines = ran.stdout.splitlines()
    assert f"failed {TRANSPORT}" in lines
    assert "not what trainer[0] published" in lines[lines.index(f"failed {TRANSPORT}") + 1]
    assert lines[-2].startswith("not-conformant: reference > lossy > reference, 2 checks failed, the first contract.")
    assert lines[-1] == "report: out/report.html"
    assert len(lines) < 14
    assert "Traceback" not in ran.stdout
    (suite,) = ET.parse(place / "out/junit.xml").getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("2", "2")
    assert "not what trainer[0] published" in (place / "out/junit.xml").read_text()


def test_an_exception_of_the_backends_own_is_told_with_its_line(place: Path) -> None:
    ran = conform(place, "--plugin", "lossy", "--transport", "mistaken", "--level", "contract", "-k", TRANSPORT)
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "KeyError: 'a mistake' [" in ran.stdout
    assert 'return {}["a mistake"]' in ran.stdout
    (found,) = read_result(place / "conformance-report").checks
    assert re.search(r'lossy.py", line \d+, in receive', found.detail)


def test_what_this_machine_lacks_is_incomplete(place: Path) -> None:
    ran = conform(place, "--plugin", "lossy", "--transport", "absent", "--level", "contract", "-k", "single_changed_bit")
    assert ran.returncode == 3, ran.stdout + ran.stderr
    assert ran.stdout.splitlines()[-2] == (
        "incomplete: reference > absent > reference, contract 0/1; contract did not run: "
        "the transport absent cannot work here: there is no such wire here"
    )


@pytest.mark.slow
def test_a_suite_that_ends_without_a_result_broke(place: Path) -> None:
    (place / "conformance-report").mkdir()
    (place / "conformance-report/result.json").write_text("of an earlier run")
    ran = conform(place, "--plugin", "lossy", "--transport", "bomb", "--level", "contract", "-k", "single_changed_bit")
    assert ran.returncode == 2, ran.stdout + ran.stderr
    assert ran.stderr == "error: the suite broke: pytest ended with 7, and left no result\n"


def test_an_interrupt_ends_the_suite_and_its_children(place: Path) -> None:
    code = "import sys; from rlbridge.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "conform", "--transport", "reference", "--level", "contract"]
    ours = subprocess.Popen(command, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    limit = time.monotonic() + 120
    while len(family := descendants(ours.pid)) < 4 and time.monotonic() < limit:  # pytest, the forkserver, a rank or two
        time.sleep(0.05)
    assert len(family) >= 4
    ours.send_signal(signal.SIGINT)
    out, err = ours.communicate(timeout=60)
    assert ours.returncode == 130
    assert err == "interrupted\n"
    assert "conformant" not in out
    assert list((place / "conformance-report").iterdir()) == []
    limit = time.monotonic() + 10
    while (left := [pid for pid in family if is_running(pid)]) and time.monotonic() < limit:
        time.sleep(0.05)
    assert left == []


def descendants(pid: int) -> list[int]:
    """The processes below `pid`."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found = parents.get(pid, [])
    return [*found, *(below for child in found for below in descendants(child))]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


# Wrong command lines


def slow(*values: object) -> ParameterSet:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "which backend is to be held to its contract?\n  rlbridge conform --transport NAME"),
        (("--transport", "nixl", "--level", "most"), "there is no level 'most'\n  levels: contract, sync, rdma, faults, speed"),
        (("--transport", "nixl", "--matrix", "m.json"), "--matrix belongs to --self-test"),
        (("--self-test", "--transport", "nixl"), "--self-test is of the suite and its own backends"),
        (("--transport", "nixl", "--from", "faults", "--level", "sync"), "--from faults comes after --level sync"),
        (("--transport", "nixl", "--report", __file__), "no report can be written to "),
    ],
)
def test_a_wrong_command_line_says_what_to_type(
    arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["conform", *arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--transport", "nxil"), "ERROR: no transport is named 'nxil'; did you mean 'nixl'?"),
        slow(("--transport", "nixl", "transport.wire=tin"), "  transport.wire: input should be 'any', 'shm', 'tcp' or 'rdma'"),
        slow(("--transport", "nixl", "transport.wier=tcp"), "  transport.wier: unknown key; did you mean 'wire'?"),
        slow(("--transport", "nixl", "trainer.lr=1"), "'trainer.lr=1' is an option of a trainer, and none is named"),
        slow(("--transport", "nixl", "--from", "faults"), "the level faults comes after sync"),
        slow(("--transport", "nixl", "--plugin", "lossy.py"), "cannot be used: ModuleNotFoundError"),
        slow(("--transport", "nixl", "--requirements", "Mine"), "names no requirements class\n  write it as module:Class"),
        slow(("--transport", "nixl", "-k", "no_check"), "error: no check fits -k 'no_check'\n  rlbridge conform --list"),
    ],
)
def test_what_the_suite_refuses_is_exit_code_2(place: Path, arguments: tuple[str, ...], said: str) -> None:
    ran = conform(place, *arguments)
    assert (ran.returncode, ran.stdout.splitlines()[1:]) in [(2, []), (2, [""])], ran.stdout
    assert said in ran.stderr
    assert "Traceback" not in ran.stderr


def test_without_pytest_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(conform_command, "missing_module", lambda name: name if name == "pytest" else None)
    assert cli.main(["conform", "--transport", "nixl"]) == 2
    assert capsys.readouterr().err == (
        "error: the conformance suite is not installed: no module named 'pytest'\n  pip install 'rlbridge[conform]'\n"
    )


# Lists, and the suite's own test


_THREE = "single_changed_bit or every_byte or untied"


def test_list_names_each_check_once_and_runs_none(place: Path) -> None:
    ran = conform(
        place, "--transport", "reference", "--level", "sync", "--list", "-k", "single_changed_bit or every_byte or untied"
    )
    assert ran.returncode == 0, ran.stderr
    *lines, total = [line.split(maxsplit=2) for line in ran.stdout.splitlines()]
    assert lines[1][:2] == [TRANSPORT, "1"]
    assert [line[0] for line in lines] == ["contract.every_byte_arrives", TRANSPORT, "sync.an_untied_head_arrives"]
    assert [line[2] for line in lines][::2] == ["Every byte arrives.", "An untied head arrives."]
    assert total == ["3", "checks,", f"{sum(int(line[1]) for line in lines)} cases"]
    assert not (place / "conformance-report").exists()


@pytest.mark.slow
def test_settings_of_her_project_are_not_the_suites(place: Path) -> None:
    (place / "pytest.ini").write_text("[pytest]\naddopts = --no-such-option\nfilterwarnings = error\n")
    assert conform(place, "--transport", "reference", "--list").returncode == 0


@pytest.mark.slow
def test_list_without_a_backend_has_every_level(place: Path) -> None:
    ran = conform(place, "--list")
    assert ran.returncode == 0, ran.stderr
    levels = [line.partition(".")[0] for line in ran.stdout.splitlines()[:-1]]
    assert tuple(dict.fromkeys(levels)) == tuple(level for level in LEVELS if level in levels)
    assert {"contract", "sync", "faults"} <= set(levels)


@pytest.mark.slow
def test_self_test_ends_with_its_score(place: Path) -> None:
    ran = conform(place, "--self-test", "--level", "contract", "-k", "loses-the-last-byte", "--matrix", "m.json")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.splitlines()[-1] == "killed 1/1"
    (row,) = json.loads((place / "m.json").read_text())
    assert row["name"] == "loses-the-last-byte"


@pytest.mark.slow
def test_self_test_of_nothing_is_no_pass(place: Path) -> None:
    ran = conform(place, "--self-test", "-k", "no_broken_backend")
    assert ran.returncode == 2
    assert "no broken backend fits -k 'no_broken_backend'" in ran.stderr


# What is said at the end, and junit.xml


@pytest.fixture(scope="module")
def environment() -> Environment:
    return look()


def test_cases_of_a_check_are_told_once_and_the_rest_is_counted(environment: Environment) -> None:
    checks = [check(f"contract.one[{i}]", "fail", "what\n  expected: 1\n  got:      2") for i in range(3)]
    checks += [check(f"contract.other_{i}", "fail", "x") for i in range(9)]
    lines = closing_lines(Result.of(["contract"], checks, environment), Path("out"))
    assert lines[:5] == ["failed contract.one[0] and 2 more of its cases", "  what", "    expected: 1", "    got: 2", ""]
    assert "failed 2 other checks, which are in the report\n" in lines
    assert lines[-2].startswith("not-conformant: ")


def test_of_a_traceback_the_end_is_told(environment: Environment) -> None:
    detail = "\n".join(f"line {i}" for i in range(30))
    lines = closing_lines(Result.of(["contract"], [check("contract.one", "error", detail)], environment), Path("out"))
    assert (lines[0], lines[6]) == ("the suite broke in contract.one", "  line 29")


def check(ident: str, state: str, detail: str) -> Check:
    return Check.model_validate({"id": ident, "level": "contract", "state": state, "seconds": 0.1, "detail": detail})


def test_junit_holds_no_secret_and_stays_well_formed(tmp_path: Path) -> None:
    suites = ET.Element("testsuites")
    suite = ET.SubElement(suites, "testsuite", name="pytest", hostname="node7.example.org")
    case = ET.SubElement(suite, "testcase", name="test_a <b>", time="0.1")
    failure = ET.SubElement(case, "failure", message='hf_token="abcdefgh" & more')
    failure.text = "https://me:hunter2@models.example.org/m\n<tag> & password: hunter2"
    file = tmp_path / "junit.xml"
    ET.ElementTree(suites).write(file)
    redact_junit(file)
    text = file.read_text()
    assert not [secret for secret in ("abcdefgh", "hunter2", "node7") if secret in text]
    read = ET.parse(file).getroot()
    assert [element.tag for element in read.iter()] == ["testsuites", "testsuite", "testcase", "failure"]
    assert read[0][0].attrib == {"name": "test_a <b>", "time": "0.1"}
    assert (read[0][0][0].text or "").startswith("https://<redacted>@models.example.org/m\n<tag> & ")
    assert list(tmp_path.iterdir()) == [file]
