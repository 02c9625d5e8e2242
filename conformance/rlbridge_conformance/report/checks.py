"""All checks of the suite on a page of the documentation: what each holds, and the broken backends that it has to fail.

python -m rlbridge_conformance.report.checks docs/conformance_checks.md
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlbridge_conformance import suite
from rlbridge_conformance.broken.catalogue import catalogue
from rlbridge_conformance.checks import MARK, Check
from rlbridge_conformance.levels import LEVELS, ROLES
from rlbridge_conformance.report.words import in_words

_HEAD = """# The checks

Every check of the [conformance suite](conformance.md), by level, and by whose contract it holds. Its cases are its parameters.
It is skipped where the backend does not claim what it needs, and not run where the machine lacks it. *Has to fail* names the
[broken backends](conformance.md) that were made for it. This page is generated:
`python -m rlbridge_conformance.report.checks docs/conformance_checks.md`.
"""
_TITLES = {"trainer": "Trainers", "generator": "Generators", "transport": "Transports", None: "The three together"}


@dataclass(frozen=True)
class Described:
    """A check: its name without "test_", what it said of itself, how many cases it has, and what it holds, in a line."""

    name: str
    check: Check
    cases: int
    holds: str

    @property
    def ident(self) -> str:
        """What it is called in a report, without the brackets of its cases."""
        return f"{self.check.level}.{self.name}"


def all_checks() -> list[Described]:
    """Every check, by level and role, in the order of the suite's files."""
    found = [described(name, getattr(suite, name)) for name in suite.__all__]
    roles = [*ROLES, None]
    return sorted(found, key=lambda each: (LEVELS.index(each.check.level), roles.index(each.check.role)))


def described(name: str, function: Callable[..., None]) -> Described:
    """A check by its function."""
    marks: list[Any] = getattr(function, "pytestmark", [])
    (check,) = (mark.args[0] for mark in marks if mark.name == MARK)
    cases = math.prod(len(list(mark.args[1])) for mark in marks if mark.name == "parametrize")
    return Described(name.removeprefix("test_"), check, cases, sentence(name, function))


def sentence(name: str, function: Callable[..., None]) -> str:
    """The first line of its docstring, or its name in words."""
    said = (function.__doc__ or "").strip().splitlines()
    words = in_words(name)
    return said[0] if said else f"{words[:1].upper()}{words[1:]}."


def page() -> str:
    """The page, in Markdown."""
    kills: dict[str, list[str]] = {}
    for broken in catalogue():
        kills.setdefault(broken.check, []).append(broken.name)
    lines = [_HEAD]
    checks = all_checks()
    for level in LEVELS:
        lines += [f"## {level}\n"]
        for role, title in _TITLES.items():
            chosen = [each for each in checks if (each.check.level, each.check.role) == (level, role)]
            if chosen:
                lines += [f"### {title}: {level}\n", "| check | cases | holds | needs | has to fail |", "|---|---|---|---|---|"]
                lines += [_row(each, kills.get(each.ident, [])) for each in chosen] + [""]
    return "\n".join(lines).rstrip() + "\n"


def _row(each: Described, killed: Sequence[str]) -> str:
    needs = ", ".join(f"`{need}`" for need in (*each.check.needs, *each.check.machine))
    cells = [f"`{each.name}`", str(each.cases), each.holds, needs, ", ".join(f"`{name}`" for name in killed)]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path, help="the file to write")
    parser.parse_args(arguments).page.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
