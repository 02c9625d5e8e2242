"""A result in words: one line for a terminal, a sentence for a page, reasons and names that a person can read."""

from __future__ import annotations

from collections.abc import Iterable

from rlbridge_conformance.levels import Level
from rlbridge_conformance.report.result import BackendInfo, Check, LevelCounts, Result

NO_REASON = "no reason given"


def verdict_line(result: Result) -> str:
    """The verdict in one line, such as "conformant: native > nixl > native, contract 41/41, sync 13/13 (cma)"."""
    triple, why = triple_in_words(result), _why(result)
    if result.verdict in ("not-conformant", "error"):
        return f"{result.verdict}: {triple}, {why}"
    told = [f"{level} {counts.passed}/{counts.claimed}" for level, counts in result.levels.items() if counts.claimed]
    wire = f" ({result.wire.name})" if told and result.wire.name else ""
    return f"{result.verdict}: {', '.join([triple, *told])}{wire}" + (f"; {why}" if why else "")


def sentence(result: Result) -> str:
    """Why the verdict is what it is."""
    if result.verdict == "conformant":
        skipped = len(result.in_state("skip"))
        left_out = f" {_checks(skipped)} of what it does not claim {_was(skipped)} skipped." if skipped else ""
        return f"All that the backends claim was tried, and held: {_checks(len(result.in_state('pass')))} passed.{left_out}"
    why = ("Nothing failed, but " if result.verdict == "incomplete" else "") + _why(result)
    return why + ("" if why.endswith((".", "…")) else ".")


def triple_in_words(result: Result) -> str:
    """Trainer, transport and generator, in the order in which the weights travel."""
    return " > ".join(name_of(backend) for backend in (result.trainer, result.transport, result.generator))


def name_of(backend: BackendInfo | None) -> str:
    """The backend's name; "none" where there was none."""
    return backend.name if backend else "none"


def in_words(check_id: str) -> str:
    """The id of a check as words, without its level, its parameters as they are: "every byte arrives [2-1]"."""
    name, bracket, parameters = check_id.partition("[")
    words = name.rpartition(".")[2].removeprefix("test_").replace("_", " ").strip()
    return f"{words} {bracket}{parameters}".strip()


def first_line(text: str, limit: int = 120) -> str:
    """The first line that is not blank, cut to `limit` characters."""
    line = " ".join(next((line for line in text.splitlines() if line.strip()), "").split())
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"


def by_reason(checks: Iterable[Check]) -> dict[str, list[Check]]:
    """The checks by the first line of their details, the reason that most share first."""
    found: dict[str, list[Check]] = {}
    for check in checks:
        found.setdefault(first_line(check.detail, limit=300) or NO_REASON, []).append(check)
    return dict(sorted(found.items(), key=lambda entry: -len(entry[1])))


def why_not_run(result: Result, level: Level, limit: int = 120) -> str:
    """Why checks of that level did not run: the reason that most of them share, and how many others there are."""
    reasons = list(by_reason(check for check in result.in_state("not_run") if check.level == level))
    others = len(reasons) - 1
    more = f" (and {others} other reason{'s' if others > 1 else ''})" if others else ""
    return first_line(reasons[0], limit) + more


def _why(result: Result) -> str:
    if result.verdict == "not-conformant":
        return _count_and_first(result.in_state("fail"), "failed")
    if result.verdict == "error":
        return _count_and_first(result.in_state("error"), "could not be judged, since the suite broke")
    if result.verdict == "incomplete":
        missing = [why for level, counts in result.levels.items() if (why := _why_incomplete(result, level, counts))]
        return "; ".join(missing) or "no level was asked for"
    return ""


def _why_incomplete(result: Result, level: Level, counts: LevelCounts) -> str:
    if counts.not_run:
        part = "" if counts.not_run == counts.claimed else f"{counts.not_run} of {counts.claimed} checks of "
        return f"{part}{level} did not run: {why_not_run(result, level)}"
    if counts.claimed or (counts.skip and any(other.passed for other in result.levels.values())):
        return ""
    return f"{level} shows nothing: " + ("all of it was skipped" if counts.skip else "it has no checks")


def _count_and_first(checks: list[Check], how: str) -> str:
    first = checks[0]
    said = first.what or first.detail
    told = f": {first_line(said)}" if said.strip() else ""
    which = "" if len(checks) == 1 else "the first "
    names = len({check.id.partition("[")[0] for check in checks})
    cases = "" if len(checks) == names else f" in {len(checks)} cases"
    return f"{_checks(names)} {how}{cases}, {which}{first.id}{told}"


def _checks(count: int) -> str:
    return f"{count} check{'' if count == 1 else 's'}"


def _was(count: int) -> str:
    return "was" if count == 1 else "were"
