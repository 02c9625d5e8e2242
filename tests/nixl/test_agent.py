from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, wait
from multiprocessing import get_context

import pytest

from rlbridge_nixl.agent import _environment, _ucx_variables, make_agent, parse_report

HEADING = "[1795382647.227215] [vm:30990:0]   "

# Recorded with UCX 1.23: UCX_PROTO_INFO=y, two agents "aa" and "bb" in a process, UCX_TLS=tcp,self.
TCP = """\
+--------+-------------+-----------------------------------+
| aa self cfg#0                                            |
| remote memory write by ucp_put* from host memory to host |
+--------+-------------+-----------------------------------+
| Range  | Description |              Config               |
+--------+-------------+-----------------------------------+
| 0..inf | zero-copy   | self/memory                       |
+--------+-------------+-----------------------------------+
+--------+-------------+-----------------------------------+
| aa intra-node cfg#1                                      |
| remote memory write by ucp_put* from host memory to host |
+--------+-------------+-----------------------------------+
| Range  | Description |              Config               |
+--------+-------------+-----------------------------------+
| 0..inf | zero-copy   | 52% on tcp/lo and 48% on tcp/eth0 |
+--------+-------------+-----------------------------------+
+-------------+--------------------+---------------------+
| aa intra-node cfg#1                                    |
| active message by ucp_am_send*(multi) from host memory |
+-------------+--------------------+---------------------+
|    Range    |    Description     |       Config        |
+-------------+--------------------+---------------------+
|     0..8184 | short              | tcp/lo              |
| 8185..65528 | zero-copy          | tcp/lo              |
|  65529..inf | multi-frag copy-in | tcp/lo              |
+-------------+--------------------+---------------------+
+--------+--------------------+------------------------------------+
| aa intra-node cfg#1                                              |
| remote memory read by ucp_get*(multi) into host memory from host |
+--------+--------------------+------------------------------------+
| Range  |    Description     |               Config               |
+--------+--------------------+------------------------------------+
| 0..inf | software emulation | tcp/lo                             |
+--------+--------------------+------------------------------------+
"""

# The same with UCX_TLS=cma,tcp,self.
CMA = """\
+--------+-------------+-------------------------------------------+
| aa intra-node cfg#1                                              |
| remote memory read by ucp_get*(multi) into host memory from host |
+--------+-------------+-------------------------------------------+
| Range  | Description |                  Config                   |
+--------+-------------+-------------------------------------------+
| 0..inf | zero-copy   | cma/memory                                |
+--------+-------------+-------------------------------------------+
"""


def agents_at_once(count: int) -> tuple[dict[str, str], bool]:
    """What of UCX is in the environment when that many threads have each made an agent, and whether NIXL is as it was."""
    import nixl._api as nixl

    before = nixl.nixlBind.nixlAgentConfig
    with ThreadPoolExecutor(count) as pool:
        made = [pool.submit(make_agent, f"agent{n}", "shm", "", "cpu") for n in range(count)]
        wait(made)
    assert all(future.result() for future in made)
    left = {name: value for name, value in os.environ.items() if name.startswith("UCX_") and name != "UCX_MODULES"}
    return left, nixl.nixlBind.nixlAgentConfig is before


def test_agents_that_are_made_at_once_leave_the_environment_as_it_was() -> None:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        assert pool.submit(agents_at_once, 6).result(120) == ({}, True)


def test_a_report_that_another_process_had_is_not_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was started while an agent was being made has its variables: UCX would abort over a file that is not there."""
    monkeypatch.setenv("UCX_LOG_FILE", "/proc/self/fd/977")
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        assert pool.submit(agents_at_once, 1).result(120) == ({"UCX_LOG_FILE": "/proc/self/fd/977"}, True)


def report(*tables: str) -> str:
    return "".join(HEADING + line + "\n" for table in tables for line in table.splitlines())


@pytest.mark.parametrize(
    ("tables", "agent", "operation", "wires"),
    [
        ([TCP], "aa", "read", ["tcp/lo"]),
        ([TCP], "aa", "write", ["tcp/lo", "tcp/eth0"]),
        ([CMA], "aa", "read", ["cma"]),
        ([CMA], "aa", "write", []),
        ([TCP], "bb", "read", []),
        ([TCP], "a", "read", []),
        ([CMA.replace("aa ", "bb "), TCP], "aa", "read", ["tcp/lo"]),
        ([CMA, TCP], "aa", "read", ["cma", "tcp/lo"]),
        ([], "aa", "read", []),
    ],
)
def test_the_wires_of_an_agents_large_transfers_are_read_from_ucxs_report(
    tables: list[str], agent: str, operation: str, wires: list[str]
) -> None:
    assert parse_report(report(*tables), agent, operation) == wires


def test_a_table_that_is_cut_off_says_nothing() -> None:
    assert parse_report(report(*[CMA])[:250], "aa", "read") == []


def test_ucxs_variables_are_set_while_an_agent_is_made_and_not_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_TLS", "mine")
    monkeypatch.delenv("UCX_NET_DEVICES", raising=False)
    with _environment({"UCX_TLS": "tcp,self", "UCX_NET_DEVICES": "lo"}):
        assert (os.environ["UCX_TLS"], os.environ["UCX_NET_DEVICES"]) == ("tcp,self", "lo")
    assert os.environ["UCX_TLS"] == "mine"
    assert "UCX_NET_DEVICES" not in os.environ


def test_each_wire_has_its_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_LOG_FILE", "/var/log/mine")
    found = in_a_child(variables)
    common = {"UCX_LOG_FILE": "/var/log/mine", "UCX_PROTO_INFO": "y"}
    assert found["any", ""] == common
    assert found["tcp", "eth0"] == common | {"UCX_TLS": "tcp,self", "UCX_NET_DEVICES": "eth0"}
    assert found["shm", ""] == common | {"UCX_TLS": "cma,tcp,self", "UCX_NET_DEVICES": "lo"}


def test_ucxs_report_has_no_name_that_another_user_could_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UCX_LOG_FILE", raising=False)
    log = in_a_child(variables)["any", ""]["UCX_LOG_FILE"]
    assert log.startswith("/proc/self/fd/")


def test_the_module_is_imported_without_nixl_and_torch() -> None:
    code = "import sys, rlbridge_nixl, rlbridge_nixl.options; print({'nixl', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def variables() -> dict[tuple[str, str], Mapping[str, str]]:
    return {(w, d): _ucx_variables(w, d, "cpu") for w, d in (("any", ""), ("tcp", "eth0"), ("shm", ""))}


def in_a_child(function: object) -> dict[tuple[str, str], Mapping[str, str]]:
    """In a process of its own, since where the report goes is settled once a process."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function)  # type: ignore[arg-type]
