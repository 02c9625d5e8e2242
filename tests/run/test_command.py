"""`rlbridge run` as a user calls it: a process of its own, a Ray of its own, and a plugin from somebody else's distribution."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.run.test_bad_input import CONFIG

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


def run_rlbridge(directory: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """The command line in `directory`, with Ray's directory under a short name."""
    return subprocess.run(
        [sys.executable, "-m", "rlbridge", *arguments],
        cwd=directory,
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.fixture
def workplace(model: Path, prompts: Path, tmp_path: Path) -> Path:
    """A directory with a config and a reward function, as a user has it."""
    data = {"model": {"path": str(model)}, "data": {"path": str(prompts), "held_out": 4}, "reward": {"fn": "mine:score"}}
    (tmp_path / "mine.yaml").write_text(json.dumps(CONFIG | data | {"cluster": {"start_seconds": 240}}))
    (tmp_path / "mine.py").write_text("def score(completion):\n    return float(len(completion))\n")
    return tmp_path


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    """The example of a third party's plugin, installed from its own distribution."""
    source, installed = tmp_path / "acme-spool", tmp_path / "site"
    shutil.copytree(ROOT / "docs" / "examples" / "acme-spool", source)
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", str(installed)]
    subprocess.run([*install, str(source)], check=True, timeout=120)
    return installed


def test_a_third_partys_transport_is_found_and_runs(workplace: Path, spool: Path) -> None:
    listed = run_rlbridge(workplace, "plugins", "--json", PYTHONPATH=str(spool))
    assert any(row["name"] == "spool" and row["distribution"] == "acme-spool" for row in json.loads(listed.stdout)["backends"])

    # Four actors on this machine's cores: a cluster of the run's own gives out what the run asks for.
    overrides = ["transport.backend=spool", "trainer.workers=2", "generator.workers=2"]
    ran = run_rlbridge(workplace, "run", "mine.yaml", *overrides, PYTHONPATH=str(spool))
    assert ran.returncode == 0, ran.stderr
    summary = json.loads((workplace / "runs" / "mine" / "summary.json").read_text())
    assert (summary["transport"], summary["wire"], summary["verified"]) == ("spool", "spool over file", True)
    assert summary["reward"]["last"] is not None


def test_auto_prints_what_it_chose_and_why_and_a_run_goes_on(workplace: Path) -> None:
    ran = run_rlbridge(workplace, "run", "mine.yaml", "transport.backend=auto", "name=first")
    assert ran.returncode == 0, ran.stderr
    assert "transport auto: nixl, the first that works here" in ran.stdout
    assert "every one verified" in ran.stdout

    more = run_rlbridge(workplace, "run", "--resume", "runs/first", "algorithm.steps=2")
    assert more.returncode == 0, more.stderr
    lines = (workplace / "runs" / "first" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_rays_own_pattern_works_with_our_backends(model: Path) -> None:
    example = ROOT / "docs" / "examples" / "ray_pattern.py"
    ran = subprocess.run([sys.executable, str(example), str(model), "--pretend"], capture_output=True, text=True, timeout=280)
    assert ran.returncode == 0, ran.stderr
    assert "version 2 is served and verified" in ran.stdout
