import json
from dataclasses import dataclass, field, replace

import pytest

from rlbridge.rl.summary import PHASES, summarise


@dataclass(frozen=True)
class Report:
    version: int
    seconds: float
    bytes: int
    phases: dict = field(default_factory=lambda: dict.fromkeys(PHASES, 0.5))
    verified: bool = True
    wire: str = "cma"


REPORTS = [Report(version, version / 10, 100 * version) for version in range(1, 4)]


def summary(**changes):
    made = {"steps": 3, "rewards": [0.25, 1.0, 0.5], "reports": REPORTS, "wall_seconds": 9.0}
    return summarise(**(made | changes), trainer="native", generator="vllm", transport="nixl")


def test_a_summary_holds_exactly_this():
    assert summary() == {
        "steps": 3,
        "reward": {"first": 0.25, "last": 0.5, "best": 1.0},
        "syncs": 3,
        "versions": [1, 2, 3],
        "verified": True,
        "trainer": "native",
        "generator": "vllm",
        "transport": "nixl",
        "wire": "cma",
        "sync_seconds": {"p50": pytest.approx(0.2), "p95": pytest.approx(0.29), "max": pytest.approx(0.3)},
        "bytes_per_sync": 200,
        "phases": {"snapshot": 0.5, "wire": 0.5, "verify": 0.5, "install": 0.5, "pause": 0.5},
        "wall_seconds": 9.0,
    }


def test_one_sync_that_was_not_verified_shows():
    assert not summary(reports=[*REPORTS, replace(REPORTS[0], verified=False)])["verified"]


def test_a_run_without_syncs_is_not_verified():
    empty = summary(steps=0, rewards=[], reports=[])
    assert empty["verified"] is False
    assert empty["reward"] == {"first": None, "last": None, "best": None}
    assert empty["phases"] == dict.fromkeys(PHASES)
    assert json.loads(json.dumps(empty)) == empty


def test_a_wire_that_changed_shows():
    assert summary(reports=[*REPORTS, replace(REPORTS[0], wire="tcp")])["wire"] == "cma, tcp"


def test_a_phase_is_the_median_of_the_syncs_that_had_it():
    reports = [replace(REPORTS[0], phases=phases) for phases in ({"wire": 1.0}, {"wire": 9.0, "pause": 2.0}, {"wire": 3.0})]
    assert summary(reports=reports)["phases"] == dict.fromkeys(PHASES) | {"wire": 3.0, "pause": 2.0}
