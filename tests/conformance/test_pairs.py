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

_NIXL = ["--transport", "nixl"]
_GLOO, _RDT_NIXL = (["--transport", "rdt", f"transport.tensor_transport={wire}"] for wire in ("gloo", "nixl"))
_SYNC = ["--from", "sync", "--level", "sync"]
_CONTRACT = ["--level", "contract"]
RUNS = {
    "nixl": [*_NATIVE, *_NIXL, "--level", "faults"],
    # What the native backends and nixl are held to by themselves is checked above, and below of each backend once.
    "object_store": ["--transport", "object_store", *_CONTRACT],
    "nixl write over tcp": [*_NIXL, "transport.operation=write", "transport.wire=tcp", "--level", "rdma"],
    "native over object_store": [*_NATIVE, "--transport", "object_store", *_SYNC],
    "rdt, gloo": [*_GLOO, *_CONTRACT],
    "native over rdt, gloo": [*_NATIVE, *_GLOO, *_SYNC],
    "native over rdt, nixl": [*_NATIVE, *_RDT_NIXL, *_SYNC],
    "vllm": ["--generator", "vllm", *_CONTRACT],
    "native to vllm, two ranks": [*_NATIVE[:2], "--generator", "vllm", *_NIXL, "generator.tensor_parallel=2", *_SYNC],
    "sglang": ["--generator", "sglang", *_CONTRACT],
    "verl": ["--trainer", "verl", *_CONTRACT],
    "verl to native": ["--trainer", "verl", *_NATIVE[2:], *_NIXL, *_SYNC],
    "verl to vllm": ["--trainer", "verl", "--generator", "vllm", *_NIXL, *_SYNC],
    "openrlhf": ["--trainer", "openrlhf", *_CONTRACT],
    "openrlhf to native": ["--trainer", "openrlhf", *_NATIVE[2:], *_NIXL, *_SYNC],
    "openrlhf to sglang": ["--trainer", "openrlhf", "--generator", "sglang", *_NIXL, *_SYNC],
}
SELF_TEST = "self-test"
_ENVIRONMENTS = {"vllm": "vllm-cpu", "sglang": "sglang-cpu", "verl": "verl", "openrlhf": "openrlhf"}
ENVIRONMENTS = {name: [_ENVIRONMENTS[word] for word in run if word in _ENVIRONMENTS] for name, run in RUNS.items()}
WIRES = {
    **dict.fromkeys(RUNS, "cma"),
    "object_store": "plasma",
    "nixl write over tcp": "tcp/lo",
    "native over object_store": "plasma",
    "rdt, gloo": "gloo",
    "native over rdt, gloo": "gloo",
    "native over rdt, nixl": "nixl",
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
        report = place / "reports" / name.replace(" ", "-")
        return report, *conform(place, *RUNS[name], "--report", str(report))

    with ThreadPoolExecutor(2) as pool:
        yield {
            **{name: pool.submit(run, name) for name in RUNS if all(map(is_built, ENVIRONMENTS[name]))},
            SELF_TEST: pool.submit(lambda: (place, *conform(place, "--self-test"))),
        }


@pytest.mark.parametrize("name", RUNS)
def test_a_pair_passes_what_this_machine_can_run(runs: dict[str, Future[tuple[Path, int, str]]], name: str) -> None:
    for environment in ENVIRONMENTS[name]:
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
    killed, _, total = said.splitlines()[-1].removeprefix("killed ").partition(",")[0].partition("/")
    assert killed == total
    assert int(total) >= 30


def test_junit_tells_the_same_as_the_result(runs: dict[str, Future[tuple[Path, int, str]]]) -> None:
    report, _, _ = runs["nixl"].result()
    result: Result = read_result(report)
    written = json.loads((report / "result.json").read_text())
    assert len(written["checks"]) == len(result.checks) == (report / "junit.xml").read_text().count("<testcase ")
