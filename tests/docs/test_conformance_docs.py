"""The pages of the conformance suite say what it does, and their transport is conformant."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from rlbridge.errors import DeadlineError, TransportError
from rlbridge.roles.transport import Copy, TransportContext, TransportOptions
from rlbridge_conformance import plugin
from rlbridge_conformance.faults.machine import lacks
from rlbridge_conformance.levels import LEVELS
from rlbridge_conformance.report import exit_code
from rlbridge_conformance.report.checks import all_checks, page
from rlbridge_conformance.suite import test_faults as faults
from tests.docs.pages import DOCS, EXAMPLES, blocks
from tests.docs.test_hooks import example

CONFORMANCE = (DOCS / "conformance.md").read_text()
SLOTS = "return [copy for copy in self._copies if (copy.source, copy.sink, copy.slot) == (source, sink, slot)]"


def rows(first: str) -> dict[str, str]:
    """The table whose head begins so, by its first column."""
    table = CONFORMANCE.partition(f"\n| {first} |")[2].partition("\n\n")[0]
    lines = [line.strip("|").split("|") for line in table.splitlines()[2:]]
    return {cells[0].strip(): cells[1] for cells in lines}


def conform(place: Path, *arguments: str) -> tuple[int, list[str]]:
    """Exit code and output of the command, where `place` is the current directory."""
    code = "import sys; from rlbridge.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "conform", "--plugin", "shm_transport", "--transport", "shm", *arguments]
    ran = subprocess.run(command, cwd=place, capture_output=True, text=True, env=dict(os.environ))
    assert ran.stderr == ""
    return ran.returncode, ran.stdout.splitlines()


# What the pages say


def test_page_of_the_checks_is_the_one_that_is_generated() -> None:
    again = "python -m rlbridge_conformance.report.checks docs/conformance_checks.md"
    assert (DOCS / "conformance_checks.md").read_text() == page(), again


def test_every_check_is_on_the_page_in_its_level() -> None:
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", page(), re.MULTILINE | re.DOTALL))
    assert tuple(sections) == LEVELS
    assert all(f"| `{each.name}` |" in sections[each.check.level] for each in all_checks())


def test_levels_and_exit_codes_are_those_of_the_suite() -> None:
    assert tuple(name.strip("`") for name in rows("level")) == LEVELS
    codes = {exit_code(verdict): verdict for verdict in ("conformant", "not-conformant", "error", "incomplete")}
    assert {int(code) for code in rows("exit code")} == set(codes)
    for code, words in rows("exit code").items():
        told = {"error": "the suite broke", "not-conformant": "not conformant"}.get(codes[int(code)], codes[int(code)])
        assert told in words


def test_fault_cases_are_those_of_the_suite() -> None:
    found = {name: re.findall(r"`(\w+)`", words) for name, words in rows("of a case").items()}
    assert found == {
        "victim": list(faults.VICTIMS),
        "signal": list(faults.SIGNALS),
        "moment": list(faults.MOMENTS),
        "phase": list(faults.PHASES),
    }
    last = list(faults.PHASES)[-1]
    cases = {case.id for case in faults._matrix()}
    assert cases == {
        f"{how}-{moment}-{phase}"
        for how in faults.SIGNALS
        for phase in faults.PHASES
        for moment in faults.MOMENTS
        if moment != "after" or phase == last
    }


def test_every_option_of_the_ini_file_is_named() -> None:
    options = {*plugin._OPTIONS, *plugin._LISTS} - {"protocol"}
    assert [name for name in options if f"rlbridge_{name}" not in CONFORMANCE] == []


# The transport


@pytest.fixture
def place(tmp_path: Path) -> Path:
    shutil.copy(EXAMPLES / "shm_transport.py", tmp_path)
    return tmp_path


def test_a_rule_that_is_forgotten_fails_as_the_page_shows(place: Path) -> None:
    file = place / "shm_transport.py"
    (block,) = [b for b in blocks("python") if "def _between" in b.text]
    broken = block.text.strip().splitlines()[-1].strip()
    assert broken != SLOTS
    assert file.read_text().count(SLOTS) == 1
    file.write_text(file.read_text().replace(SLOTS, broken))
    code, said = conform(place, "--level", "contract", "-k", "each_of_six_versions")
    (shown,) = [b for b in blocks("text") if b.page == "make_a_transport_conformant.md" and "not-conformant" in b.text]
    assert code == 1
    assert [re.sub(r"\d+", "N", line) for line in said] == [re.sub(r"\d+", "N", line) for line in shown.text.splitlines()]


@pytest.mark.slow
def test_the_rule_put_back_passes_as_the_page_shows(place: Path) -> None:
    code, said = conform(place, "--level", "contract", "-k", "each_of_six_versions")
    (shown,) = [b for b in blocks("text") if b.page == "make_a_transport_conformant.md" and "contract 1/1" in b.text]
    assert code == 0
    assert said[-2] == shown.text.strip()


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.skipif(lacks("mount_namespaces") is not None, reason="a full /dev/shm takes mounts of one's own")
def test_transport_of_the_docs_conforms_up_to_the_faults(place: Path) -> None:
    code, said = conform(place, "--level", "faults")
    assert code == 0, said
    (shown,) = [b for b in blocks("text") if b.page == "make_a_transport_conformant.md" and "N/N" in b.text]
    assert re.sub(r"\d+/\d+", "N/N", said[-2]) == shown.text.strip()


def end(name: str, side: Any) -> Any:
    """One end of the transport, in this process."""
    module: Any = example("shm_transport")
    return module.ShmTransport(TransportContext(name, side, 1, "cpu", {}), TransportOptions())


_COPY = Copy("trainer[0]", "generator[0].rank[0]", 0, 0, 10, 0, 20, 100)


@pytest.mark.parametrize("order", [("source", "sink"), ("sink", "source"), ("sink",), ("source",)])
def test_files_are_gone_once_either_end_has_closed(order: tuple[str, ...]) -> None:
    ends = {"source": end(_COPY.source, "source"), "sink": end(_COPY.sink, "sink")}
    blocks = {side: torch.zeros(200, dtype=torch.uint8) for side in ends}
    blocks["source"][10:110] = 7
    addresses = {side: ends[side].open([blocks[side]]) for side in ends}
    ends["source"].connect({_COPY.sink: addresses["sink"]}, [_COPY])
    ends["sink"].connect({_COPY.source: addresses["source"]}, [_COPY])
    ends["source"].send(1, 0, time.monotonic() + 10)
    assert ends["sink"].receive(1, 0, {}, time.monotonic() + 10) == 100
    assert int(blocks["sink"].sum()) == 700
    with pytest.raises(DeadlineError, match=r"not done in time .*trainer\[0\]"):
        ends["sink"].receive(2, 0, {}, time.monotonic())
    ends["source"].send(3, 0, time.monotonic() + 10)
    assert len(list(Path("/dev/shm").glob(f"{addresses['source'].decode()}*"))) == 1
    for side in order:
        ends[side].close()
    assert not list(Path("/dev/shm").glob(f"{addresses['source'].decode()}*"))


def test_memory_that_cannot_be_had_is_an_error_and_leaves_nothing() -> None:
    source = end(_COPY.source, "source")
    address = source.open([torch.zeros(200, dtype=torch.uint8)]).decode()
    source.connect({_COPY.sink: b"somewhere"}, [_COPY])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))  # the copy has a hundred bytes
    try:
        with pytest.raises(TransportError, match=r"/dev/shm: File too large .*generator\[0\]\.rank\[0\]"):
            source.send(1, 0, time.monotonic() + 10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    source.close()
    assert not list(Path("/dev/shm").glob(f"{address}*"))
