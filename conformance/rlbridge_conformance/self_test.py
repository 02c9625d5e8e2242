"""Can the suite fail? Every broken backend has to be failed by the check that is meant for it, and every twin has to pass."""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import io
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console
from rich.markup import escape

from rlbridge.plugins import MODULES_VARIABLE
from rlbridge_conformance.broken.catalogue import Broken, catalogue
from rlbridge_conformance.faults.machine import lacks
from rlbridge_conformance.levels import LEVELS, Level
from rlbridge_conformance.places import keep_nurseries
from rlbridge_conformance.report import Result, read_result

_INI = Path(__file__).with_name("pytest.ini")
_BROKEN_MODULE = "rlbridge_conformance.broken"
_TWINS = ("--rlbridge-trainer=reference", "--rlbridge-generator=reference", "--rlbridge-transport=reference")

_QUICK = ("-p", "no:unraisableexception", "-p", "no:threadexception")
"""Each collects the garbage of a whole torch after every run."""

_NOTHING_RUN = 3
_WITHOUT_RAY = ("--rlbridge-carrier=processes",)


@dataclass(frozen=True)
class Outcome:
    """What became of a broken backend: which checks failed it, of how many that ran."""

    broken: Broken
    failed: tuple[str, ...]
    ran: int

    @property
    def killed(self) -> bool:
        """Whether the check that is meant for it failed it."""
        return self.broken.check in {_name(ident) for ident in self.failed}

    @property
    def alone(self) -> bool:
        """Whether no other check of its level failed it."""
        return {_name(i) for i in self.failed if i.startswith(self.broken.level)} == {self.broken.check}


def run_broken(broken: Broken, *, whole_level: bool) -> Outcome:
    """Run the check that is meant for a broken backend, or the whole of that check's level."""
    only = [] if whole_level else ["-x", "-k", f"test_{broken.check.partition('.')[2]}"]
    level = [f"--rlbridge-from={broken.level}", f"--rlbridge-level={broken.level}"]
    result = _suite([*_named(broken), *level, *([] if broken.ray else _WITHOUT_RAY), *only])
    own = [check for check in result.checks if check.level == broken.level]
    return Outcome(broken, tuple(c.id for c in own if c.state == "fail"), sum(c.state in ("pass", "fail") for c in own))


def run_twins(level: Level) -> Result:
    """The suite's own backends through every level up to `level`."""
    return _suite([*_TWINS, *_WITHOUT_RAY, f"--rlbridge-level={level}"])


def _named(broken: Broken) -> list[str]:
    """The roles that the suite is to hold to their contracts."""
    if broken.role in ("publisher", "engine"):
        return [*_TWINS, f"--rlbridge-protocol={broken.role}={broken.target}"]
    return [f"--rlbridge-{broken.role}={broken.name}"]


def _suite(arguments: Sequence[str]) -> Result:
    """One run of the suite in this process, so that what it has imported need not be imported again."""
    with tempfile.TemporaryDirectory() as directory, _quiet() as printed:
        always = ["-c", str(_INI), *_QUICK, "--pyargs", "rlbridge_conformance", "-q", f"--rlbridge-report={directory}"]
        code = pytest.main([*always, *arguments])
        file = Path(directory) / "result.json"
        if not file.exists():
            raise RuntimeError(f"the suite broke with {code}:\n{printed.getvalue()}")
        return read_result(file)


@contextlib.contextmanager
def _quiet() -> Iterator[io.StringIO]:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        yield printed


def _name(ident: str) -> str:
    return ident.partition("[")[0]


def unshared(outcomes: Iterable[Outcome], checks: Iterable[str]) -> list[str]:
    """The checks that no broken backend needs: each has another that fails it too."""
    alone = {outcome.broken.check for outcome in outcomes if outcome.alone}
    return sorted({_name(check) for check in checks} - alone)


def _run(chosen: Sequence[Broken], jobs: int, console: Console, *, whole_level: bool) -> list[Outcome]:
    outcomes = []
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _begin) as pool:
        for outcome in pool.map(functools.partial(run_broken, whole_level=whole_level), chosen):
            outcomes.append(outcome)
            broken = outcome.broken
            word = "[green]killed[/]" if outcome.killed else "[red]SURVIVED[/]"
            console.print(f"{word}  {broken.role:<9} {broken.name:<42} {broken.check}")
    return outcomes


def _begin() -> None:
    """What makes many runs in one process quick."""
    gc.freeze()
    keep_nurseries()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run them, and print killed/total. Returns 0 if all were killed and the twins passed, 1 if not, 3 if none could be run."""
    parser = argparse.ArgumentParser(prog="rlbridge conform --self-test", description=__doc__)
    parser.add_argument("--level", choices=LEVELS, default="faults", help="leave out the broken backends of later levels")
    parser.add_argument("--matrix", type=Path, help="run whole levels, and write what failed what to this file")
    parser.add_argument("-k", dest="only", default="", help="only the broken backends whose name holds this")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="how many at once")
    options = parser.parse_args(arguments)
    modules = filter(None, [os.environ.get(MODULES_VARIABLE, ""), _BROKEN_MODULE])
    os.environ[MODULES_VARIABLE] = ",".join(modules)
    console = Console(highlight=False, soft_wrap=True)
    chosen = [b for b in catalogue() if LEVELS.index(b.level) <= LEVELS.index(options.level) and options.only in b.name]
    if not chosen:
        parser.error(f"no broken backend fits -k {options.only!r}")
    absent = {b.name: reason for b in chosen for reason in map(lacks, b.machine) if reason}
    for b in chosen:
        if b.name in absent:
            console.print(f"[yellow]not run[/]  {b.role:<9} {b.name:<41} {b.check}: {escape(absent[b.name])}")
    chosen = [b for b in chosen if b.name not in absent]
    outcomes = _run(chosen, options.jobs, console, whole_level=options.matrix is not None)
    if survivors := [outcome.broken for outcome in outcomes if not outcome.killed]:
        console.print("once more, one after the other: a fault of timing may not show while others run")
        again = iter(_run(survivors, 1, console, whole_level=options.matrix is not None))
        outcomes = [outcome if outcome.killed else next(again) for outcome in outcomes]
    killed = sum(outcome.killed for outcome in outcomes)
    good = killed == len(outcomes)
    if not options.only:
        twins = run_twins(options.level)
        failed = [check for check in twins.checks if check.state in ("fail", "error")]
        good = good and not failed
        console.print(f"the correct twins: {sum(c.state == 'pass' for c in twins.checks)} checks passed, {len(failed)} failed")
        for check in failed:
            console.print(f"  [red]failed[/]  {escape(check.id)}: {escape(check.detail)}")
    if options.matrix is not None:
        rows = [{"name": o.broken.name, "role": o.broken.role, "rule": o.broken.rule, "check": o.broken.check,
                 "alone": o.alone, "failed": list(o.failed), "ran": o.ran} for o in outcomes]  # fmt: skip
        options.matrix.write_text(json.dumps(rows, indent=1) + "\n")
        if not options.only:
            for name in unshared(outcomes, (c.id for c in twins.checks if c.state == "pass")):
                console.print(f"  no broken backend that only {name} kills")
    console.print(f"killed {killed}/{len(outcomes)}" + (f", {len(absent)} not run" if absent else ""))
    return _NOTHING_RUN if not outcomes else 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
