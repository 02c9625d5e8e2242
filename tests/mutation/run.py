"""How many mutants of the core does the conformance suite kill? A random sample, each in a copy of the tree.

    pip install cosmic-ray
    python tests/mutation/run.py --sample 200 --seed 1 --out mutants.json

A mutant is killed by the levels contract and sync between the suite's own backends, or else by the faults. Of those that
survive that, the project's own tests of the two packages may still find some: they are counted apart.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from cosmic_ray.commands import init
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator
from cosmic_ray.work_db import WorkDB, use_db

ROOT = Path(__file__).parents[2]
MODULES = ("rlbridge/weights", "rlbridge/sync")

_TRIPLE = [f"--rlbridge-{role}=reference" for role in ("trainer", "generator", "transport")]
_TIERS = (["--rlbridge-level=sync"], ["--rlbridge-from=faults", "--rlbridge-level=faults"])
_TESTS = ("tests/weights", "tests/sync", "-m", "not ray and not slow")
_TIMEOUT = 600.0
_ANNOTATIONS = "core/ReplaceBinaryOperator_BitOr_"
"""The `|` of types: annotations are never evaluated, and dictionaries are joined with it in a few places only."""


def mutants(seed: int, count: int) -> list[Any]:
    """A sample of everything that cosmic-ray can change in the modules."""
    with tempfile.TemporaryDirectory() as place, use_db(str(Path(place) / "work.sqlite"), WorkDB.Mode.create) as database:
        files = sorted(file for module in MODULES for file in (ROOT / module).glob("*.py"))
        init(files, database, {})
        found = sorted((m for item in database.work_items for m in item.mutations), key=repr)
        found = [m for m in found if not m.operator_name.startswith(_ANNOTATIONS)]
    return random.Random(seed).sample(found, min(count, len(found)))


def run(mutation: Any, tree: Path) -> dict[str, Any]:
    """What becomes of the suite in `tree` under one mutation."""
    relative = mutation.module_path.relative_to(ROOT)
    file = tree / relative
    before = file.read_text()
    operator = get_operator(mutation.operator_name)(**mutation.operator_args)
    after = mutate_code(before, operator, mutation.occurrence)
    row = {"file": str(relative), "line": mutation.start_pos[0], "operator": mutation.operator_name,
           "in": mutation.definition_name, "state": "unchanged", "check": ""}  # fmt: skip
    if after is None or after == before:
        return row
    file.write_text(after)
    try:
        for tier in _TIERS:
            killed, check = _suite(tree, tier)
            if killed:
                return row | {"state": "killed", "check": check}
        killed, check = _tests(tree)
        return row | {"state": "tests" if killed else "survived", "check": check, "diff": _difference(before, after)}
    finally:
        file.write_text(before)


def _suite(tree: Path, tier: list[str]) -> tuple[bool, str]:
    ini = tree / "conformance/rlbridge_conformance/pytest.ini"
    always = ["-c", str(ini), "--pyargs", "rlbridge_conformance", "-p", "no:unraisableexception"]
    return _pytest(tree, [*always, "--rlbridge-carrier=processes", *_TRIPLE, *tier], ("not-conformant", "error"))


def _tests(tree: Path) -> tuple[bool, str]:
    return _pytest(tree, _TESTS, ("FAILED", "ERROR"))


def _pytest(tree: Path, arguments: Sequence[str], tells: tuple[str, ...]) -> tuple[bool, str]:
    """Whether pytest fails there, and the first line that tells why."""
    path = os.pathsep.join(str(tree / part) for part in ("", "plugins", "conformance"))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", *arguments]
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=_TIMEOUT)
    except subprocess.TimeoutExpired:
        return True, "it hung"
    if done.returncode == 0:
        return False, ""
    lines = [line for line in done.stdout.splitlines() if line.startswith(tells)]
    return True, (lines or done.stdout.splitlines()[-1:] or [""])[0][:160]


def _difference(before: str, after: str) -> list[str]:
    pairs = zip(before.splitlines(), after.splitlines(), strict=False)
    return [f"{old.strip()}  ->  {new.strip()}" for old, new in pairs if old != new][:3]


def _trees(count: int, place: Path) -> Iterator[Path]:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for index in range(count):
        for name in tracked:
            target = place / str(index) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)
        yield place / str(index)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a sample, and print the score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=Path("mutants.json"))
    options = parser.parse_args(arguments)
    chosen = mutants(options.seed, options.sample)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(options.jobs) as pool:
        free: SimpleQueue[Path] = SimpleQueue()
        for tree in _trees(options.jobs, Path(place)):
            free.put(tree)

        def one(mutation: Any) -> dict[str, Any]:
            tree = free.get()
            try:
                return run(mutation, tree)
            finally:
                free.put(tree)

        for row in pool.map(one, chosen):
            rows.append(row)
            sys.stdout.write(f"{row['state']:<9} {row['file']}:{row['line']} {row['operator']} {row['check']}\n")
            sys.stdout.flush()
            options.out.write_text(json.dumps(rows, indent=1) + "\n")
    counts = collections.Counter(row["state"] for row in rows)
    tried = len(rows) - counts["unchanged"]
    words = (
        f"killed {counts['killed']}/{tried} of a sample with seed {options.seed}; of the rest the tests find {counts['tests']}"
    )
    sys.stdout.write(f"{words}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
