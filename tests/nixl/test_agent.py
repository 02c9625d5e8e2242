from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Mapping

import pytest

from rlbridge_nixl.agent import _environment, _ucx_variables, parse_report

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
