"""The checks that a run would try, one line each, without running any: `rlbridge conform --list`."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Sequence

import pytest

from rlbridge_conformance.checks import check_of
from rlbridge_conformance.levels import LEVELS
from rlbridge_conformance.report.checks import Described, described

_NO_CHECKS = 5


class _Kept:
    """Keeps what pytest collected."""

    def __init__(self) -> None:
        self.items: list[pytest.Item] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.items = list(session.items)


def would_run(arguments: Sequence[str]) -> list[tuple[Described, int]]:
    """The checks that pytest selects with these arguments, and how many cases of each.

    Raises:
        SystemExit: pytest refuses the arguments, and has said why.
    """
    kept, printed = _Kept(), io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = pytest.main(["--pyargs", "rlbridge_conformance.suite", "--collect-only", "-qq", *arguments], plugins=[kept])
    if code not in (0, _NO_CHECKS):
        if code != pytest.ExitCode.USAGE_ERROR:  # of which pytest has said more than what it collected until then
            sys.stderr.write(printed.getvalue())
        raise SystemExit(int(code))
    cases: dict[str, int] = {}
    functions = {}
    for item in kept.items:
        if check_of(item) is not None and isinstance(item, pytest.Function):
            cases[item.originalname] = cases.get(item.originalname, 0) + 1
            functions[item.originalname] = item.function
    return [(described(name, functions[name]), count) for name, count in cases.items()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print them by level, and how many there are."""
    checks = would_run(sys.argv[1:] if arguments is None else arguments)
    width = max((len(each.ident) for each, _ in checks), default=0)
    for level in LEVELS:
        for each, count in checks:
            if each.check.level == level:
                print(f"{each.ident:<{width}}  {count:>3}  {each.holds}")
    total = sum(count for _, count in checks)
    print(f"{len(checks)} checks, {total} cases")
    return 0


if __name__ == "__main__":
    sys.exit(main())
