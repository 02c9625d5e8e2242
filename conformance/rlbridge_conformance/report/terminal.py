"""A result on a terminal: what failed, in short, then the verdict in one line and where the report is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from rlbridge_conformance.report.files import PAGE
from rlbridge_conformance.report.result import Check, Result, State
from rlbridge_conformance.report.words import first_line, verdict_line

_MOST_CHECKS = 8
_MOST_LINES = 6
_WIDTH = 400
_WORDS: Mapping[State, str] = {"fail": "failed", "error": "the suite broke in"}


def closing_lines(result: Result, directory: Path) -> list[str]:
    """What is left to say when a run has ended; the verdict and the place of the report are the last two."""
    shown = [line for state in _WORDS for line in _shown(result, state)]
    return [*shown, verdict_line(result), f"report: {directory / PAGE}"]


def _shown(result: Result, state: State) -> Iterator[str]:
    """The checks that ended so, one case of each."""
    cases: dict[str, list[Check]] = {}
    for check in result.in_state(state):
        cases.setdefault(check.id.partition("[")[0], []).append(check)
    for first, *others in list(cases.values())[:_MOST_CHECKS]:
        more = f" and {len(others)} more of its cases" if others else ""
        yield f"{_WORDS[state]} {first.id}{more}"
        for line in _most(first):
            indent = line[: len(line) - len(line.lstrip())]
            yield f"  {indent}{first_line(line, _WIDTH)}"
        yield ""
    if len(cases) > _MOST_CHECKS:
        yield f"{_WORDS[state]} {len(cases) - _MOST_CHECKS} other checks, which are in the report\n"


def _most(check: Check) -> list[str]:
    """The lines that say most: of a traceback the end, of anything else the beginning."""
    lines = [line for line in check.detail.splitlines() if line.strip()]
    if check.state == "error":
        return lines[-_MOST_LINES:]
    begins = next((index for index, line in enumerate(lines) if line.startswith("Traceback (")), len(lines))
    told = lines[: min(begins, _MOST_LINES)]
    left = _MOST_LINES - len(told)
    return told + (lines[begins + 1 :][-left:] if left else [])
