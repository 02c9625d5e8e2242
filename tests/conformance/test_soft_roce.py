"""The level rdma over real verbs, in a guest. It runs where RLBRIDGE_TEST_SOFT_ROCE is 1, as in CI."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlbridge_conformance.faults import SuiteError
from rlbridge_conformance.report import read_result
from rlbridge_conformance.soft_roce import guest, tools

_asked_for = os.environ.get("RLBRIDGE_TEST_SOFT_ROCE") == "1"
in_a_guest = pytest.mark.skipif(not _asked_for, reason="not run: RLBRIDGE_TEST_SOFT_ROCE is not 1")


def conform(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command, with everything that it says."""
    command = [sys.executable, "-m", "rlbridge", "conform", *arguments]
    env = {name: value for name, value in os.environ.items() if name != "RLBRIDGE_SOFT_ROCE"}
    return subprocess.run(command, capture_output=True, text=True, timeout=880, env={**env, "COLUMNS": "200"})


@in_a_guest
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nixl_conforms_over_real_verbs(tmp_path: Path) -> None:
    done = conform("--transport", "nixl", "--level", "rdma", "--soft-roce", "--report", str(tmp_path / "out"))
    assert done.returncode == 0, done.stdout + done.stderr
    result = read_result(tmp_path / "out")
    assert {check.level for check in result.checks} == {"rdma"}
    assert {check.state for check in result.checks} == {"pass"}
    assert (result.verdict, result.wire.name) == ("conformant", "rc_verbs/rxe0:1")
    steps = re.findall(r"^soft-roce: ([a-z ]+) [0-9.]+ s", done.stdout, re.MULTILINE)
    assert steps == ["packages", "kernel", "boot", "command", "in all"]
    assert f"report: {tmp_path / 'out' / 'report.html'}" in done.stdout
    assert (tmp_path / "out" / "guest.log").is_file()


@in_a_guest
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_transports_that_cheat_over_rdma_are_failed() -> None:
    """One goes by TCP in secret, one reports success before the last completion."""
    done = conform("--self-test", "--level", "rdma", "--soft-roce", "-k", "secretly")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "killed 2/2" in done.stdout


def test_without_the_guest_what_needs_a_device_is_not_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rlbridge", "conform", "--transport", "nixl", "--soft-roce"]
    command += ["-k", "wrong_key", "--report", str(tmp_path)]
    env = {**os.environ, "RLBRIDGE_SOFT_ROCE": "0"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 3, done.stdout + done.stderr
    (check,) = read_result(tmp_path).checks
    assert (check.id, check.state) == ("rdma.a_wrong_key_is_refused", "not_run")
    assert "no RDMA device" in check.detail


def test_who_may_not_install_packages_is_told_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "_PACKAGES", {"no-such-program": "some-package", "/nowhere/file": "other-package", "sh": "dash"})
    monkeypatch.setattr(tools.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(tools.shutil, "which", lambda name, **_: None if name == "no-such-program" else f"/bin/{name}")
    with pytest.raises(SuiteError) as caught:
        tools.ensure()
    assert caught.value.what == "an RDMA device of software needs other-package, some-package, which only root can install"
    assert caught.value.todo == "run: sudo apt-get install --no-install-recommends other-package some-package"


def test_a_distribution_without_apt_is_told_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "_PACKAGES", {"no-such-program": "some-package"})
    monkeypatch.setattr(tools.shutil, "which", lambda *_, **__: None)
    with pytest.raises(SuiteError, match="needs some-package, and there is no apt-get here"):
        tools.ensure()


def test_what_is_there_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "_PACKAGES", {"sh": "no-such-package", "/etc/hostname": "no-such-package"})
    assert tools.ensure() == []


def test_a_program_that_fails_says_what_it_said() -> None:
    with pytest.raises(SuiteError, match=r"sh -c .* failed with 3: no luck"):
        tools.call(["sh", "-c", "echo no luck >&2; exit 3"])
    with pytest.raises(SuiteError, match="sleep 9 did not end within 0 s"):
        tools.call(["sleep", "9"], seconds=0.2)
    with pytest.raises(SuiteError, match="no-such-program cannot be run"):
        tools.call(["no-such-program"])


def test_lines_of_the_console_come_whole_and_as_they_come() -> None:
    with subprocess.Popen(
        ["sh", "-c", "printf 'one\\r\\ntw'; sleep 0.2; printf 'o\\nrest'"], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert list(guest._lines(process.stdout, time.monotonic() + 30)) == ["one", "two", "rest"]


def test_a_console_that_says_nothing_more_is_waited_for_until_the_deadline() -> None:
    with subprocess.Popen(["sh", "-c", "echo one; exec sleep 60"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        lines = guest._lines(process.stdout, time.monotonic() + 1)
        assert next(lines) == "one"
        with pytest.raises(TimeoutError):
            next(lines)
        process.kill()
