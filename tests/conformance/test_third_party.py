"""A backend of somebody else, in a project of her own: one star import, and a class that says what it claims."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlbridge.errors import ConfigError
from rlbridge_conformance import suite
from rlbridge_conformance.checks import MARK
from rlbridge_conformance.requirements import GeneratorRequirements, TransportRequirements, check_claims

FILES = {
    "mine.py": '''
"""Counts one byte less than it brings."""
from rlbridge import Backend, Capability, hookimpl
from rlbridge_conformance.reference.transport import ReferenceTransport
from rlbridge_conformance.requirements import TransportRequirements

@hookimpl
def rlbridge_transports():
    capabilities = frozenset({Capability.ONE_SIDED, Capability.LIVE_STORAGE})
    options = "rlbridge_conformance.reference.options:ReferenceTransportOptions"
    return [Backend("mine", "mine:Mine", "For a test.", options, capabilities=capabilities)]

class Mine(ReferenceTransport):
    def receive(self, version, slot, tensors, deadline):
        received = super().receive(version, slot, tensors, deadline)
        return received - 1

class MineRequirements(TransportRequirements):
    """The claims of mine."""

    known_failures = {
        "receive_counts_what_arrived": "it leaves out the last byte",
        "a_single_changed_bit_arrives": "it was so once",
    }

    @property
    def live_storage(self) -> bool:
        """Not yet: it is declared for what is to come."""
        return False
''',
    "test_conformance.py": "from rlbridge_conformance.suite import *\n",
    "pytest.ini": """[pytest]
addopts = --strict-markers --strict-config --import-mode=importlib -p no:cacheprovider
filterwarnings = error
pythonpath = .
rlbridge_transport = mine
rlbridge_plugin = mine
rlbridge_requirements = mine:MineRequirements
rlbridge_level = contract
rlbridge_report = out
""",
}
CHECKS = (
    "receive_counts_what_arrived",
    "a_single_changed_bit_arrives",
    "weights_that_are_read_in_place_arrive",
    "memory_is_registered_once_an_epoch",
    "twenty_epochs_leave_nothing_behind",
)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def run_pytest(place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", *arguments]
    return subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=200, env=dict(os.environ))


def states(directory: Path) -> tuple[str, dict[str, str]]:
    result: dict[str, Any] = json.loads((directory / "result.json").read_text())
    return result["verdict"], {check["id"]: check["state"] for check in result["checks"]}


class Inherited(TransportRequirements):
    _cache: dict[str, int] = {}  # noqa: RUF012

    def registrations(self, transport: Any) -> int | None:
        return 1


class Right(Inherited):
    known_failures = {"every_byte_arrives[3-2-1]": "of that case", "receive_counts_what_arrived": "of all"}  # noqa: RUF012


class MisspeltClaim(Inherited):
    live_storge = True


class ClaimOfAnotherRole(GeneratorRequirements):
    cross_host = True


class WithALevel(Inherited):
    known_failures = {"contract.every_byte_arrives": "why"}  # noqa: RUF012


class WithoutAReason(Inherited):
    known_failures = ["every_byte_arrives"]  # type: ignore[assignment]  # noqa: RUF012


@pytest.mark.parametrize(
    ("claims", "said"),
    [
        (MisspeltClaim, "MisspeltClaim claims 'live_storge', and there is no such claim; did you mean 'live_storage'?"),
        (ClaimOfAnotherRole, "ClaimOfAnotherRole claims 'cross_host', and there is no such claim"),
        (WithALevel, "there is no check 'contract.every_byte_arrives'; did you mean 'every_byte_arrives'?"),
        (WithoutAReason, "known_failures of WithoutAReason is no mapping"),
    ],
)
def test_claims_that_would_change_nothing_are_refused(claims: type[Any], said: str) -> None:
    names = [name.removeprefix("test_") for name in suite.__all__]
    check_claims(Right, names)
    with pytest.raises(ConfigError, match=re.escape(said)):
        check_claims(claims, names)


def test_star_import_gives_the_checks_and_nothing_else() -> None:
    namespace: dict[str, Any] = {}
    exec("from rlbridge_conformance.suite import *", namespace)
    del namespace["__builtins__"]
    files = Path(suite.__path__[0]).glob("test_*.py")
    written = [name for file in files for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)]
    assert sorted(namespace) == sorted(written)
    assert len(set(written)) == len(written), "-k and a star import need names that are unique over the whole suite"
    assert all([mark for mark in check.pytestmark if mark.name == MARK] for check in namespace.values())


@pytest.mark.parametrize("name", suite.__all__)
def test_check_asks_for_no_fixture_that_a_star_import_leaves_behind(name: str) -> None:
    check = getattr(suite, name)
    given = {"stages"}
    for mark in check.pytestmark:
        if mark.name == "parametrize":
            names = mark.args[0]
            given |= set(names.replace(" ", "").split(",") if isinstance(names, str) else names)
    assert set(inspect.signature(check).parameters) <= given


def test_her_own_project_holds_her_backend_to_its_contract(project: Path) -> None:
    ran = run_pytest(project, "-q", "-rsxf", "-k", " or ".join(CHECKS))
    assert ran.returncode == 1, ran.stdout + ran.stderr
    # Known to fail, and failed: pytest goes on, and the verdict does not. One that passes has to be taken out.
    assert "XFAIL test_conformance.py::test_receive_counts_what_arrived" in ran.stdout
    assert "FAILED test_conformance.py::test_a_single_changed_bit_arrives" in ran.stdout
    assert "it was expected to fail (it was so once), and passed: take it out of known_failures" in ran.stdout
    assert re.search(r"SKIPPED .* not claimed by the transport mine: live_storage", ran.stdout)
    assert "Traceback" not in ran.stdout
    assert "2 passed, 1 skipped" in ran.stdout
    verdict, found = states(project / "out")
    assert verdict == "not-conformant"
    assert [found[f"contract.{name}"] for name in CHECKS] == ["fail", "fail", "skip", "pass", "pass"]
    assert len(found) == len(CHECKS)


@pytest.mark.slow
def test_known_failures_leave_pytest_content_and_the_verdict_as_it_is(project: Path) -> None:
    ran = run_pytest(project, "-q", "-k", "receive_counts_what_arrived or memory_is_registered_once")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "1 passed" in ran.stdout
    assert "1 xfailed" in ran.stdout
    assert states(project / "out")[0] == "not-conformant"
    assert "not-conformant: reference > mine > reference, 1 check failed, contract.receive_counts_what_arrived" in ran.stdout


@pytest.mark.slow
def test_failure_reads_well_in_her_project(project: Path) -> None:
    ini = project / "pytest.ini"
    ini.write_text(ini.read_text().replace("rlbridge_requirements = mine:MineRequirements\n", ""))
    ran = run_pytest(project, "-q", "-k", "receive_counts_what_arrived")
    assert ran.returncode == 1, ran.stdout + ran.stderr
    failures = ran.stdout.partition("FAILURES")[2].splitlines()[1:5]
    assert re.fullmatch(r"_+ test_receive_counts_what_arrived _+", failures[0])
    assert failures[1] == "the bytes received are those of the copies"
    assert re.fullmatch(r"  expected: \d+", failures[2])
    assert re.fullmatch(r"  got:      \d+", failures[3])


@pytest.mark.slow
def test_suite_by_its_name_works_from_any_directory(project: Path) -> None:
    elsewhere = project / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine.py").write_text(FILES["mine.py"])
    arguments = ["--pyargs", "rlbridge_conformance", "--rlbridge-transport=mine", "--rlbridge-plugin=mine"]
    ran = run_pytest(elsewhere, *arguments, "-c", os.devnull, "-q", "--rlbridge-level=contract", "-k", "memory_is_registered")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "conformant: reference > mine > reference, contract 1/1" in ran.stdout
