"""report.html: one page that needs nothing beside it, and that a person reads in a minute."""

from __future__ import annotations

import functools
import importlib.resources
import json

import jinja2

from rlbridge_conformance.levels import Level
from rlbridge_conformance.report.result import Check, Result, State, Verdict
from rlbridge_conformance.report.words import by_reason, first_line, in_words, sentence, triple_in_words

TEMPLATE = "report.html.jinja"

_LONGEST_DETAIL = 12_000
_LONGEST_VALUE = 2_000
_TITLES: dict[Verdict, str] = {
    "conformant": "Conformant",
    "not-conformant": "Not conformant",
    "error": "No verdict: the suite broke",
    "incomplete": "Incomplete",
}
# Said by a sign and a word, and only then by a colour: for those who do not see it, and for paper.
_SIGNS: dict[State, str] = {"pass": "✓", "fail": "✗", "error": "!", "not_run": "○", "skip": "–"}  # noqa: RUF001
_LEVELS: dict[Level, str] = {
    "contract": "each backend keeps its contract, without Ray if it can do without",
    "sync": "whole syncs between Ray actors, verified",
    "rdma": "the bytes went by RDMA, as the hardware counted them",
    "faults": "kills, stops, late writes, stale and torn updates",
    "speed": "against the limit of this machine",
}


def render(result: Result) -> str:
    """The page as HTML, without scripts and without a request to anywhere."""
    return _template().render(
        result=result,
        title=_TITLES[result.verdict],
        triple=triple_in_words(result),
        sentence=sentence(result),
        roles=[("trainer", result.trainer), ("transport", result.transport), ("generator", result.generator)],
        failures=result.in_state("fail"),
        errors=result.in_state("error"),
        reasons=[
            ("Not run", "not_run", by_reason(result.in_state("not_run"))),
            ("Skipped", "skip", by_reason(result.in_state("skip"))),
        ],
        by_level={level: [check for check in result.checks if check.level == level] for level in result.levels},
        seconds=sum(check.seconds for check in result.checks),
    )


def shortened(text: str, limit: int = _LONGEST_DETAIL) -> str:
    """`text`, or its beginning and its end with a note between them: where a traceback ends is what matters most."""
    if len(text) <= limit:
        return text
    head, tail = limit // 4, limit - limit // 4
    left_out = len(text) - head - tail
    return f"{text[:head]}\n[… {left_out:,} characters are left out here; result.json has them …]\n{text[-tail:]}"


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["words"] = in_words
    environment.filters["first_line"] = first_line
    environment.filters["short"] = shortened
    environment.filters["value"] = functools.partial(shortened, limit=_LONGEST_VALUE)
    environment.filters["json"] = functools.partial(json.dumps, indent=2, ensure_ascii=False, sort_keys=True)
    environment.filters["duration"] = _duration
    environment.filters["gib"] = lambda size: f"{size / 2**30:.1f} GiB"
    environment.filters["message"] = _message
    environment.globals.update(signs=_SIGNS, states={state: state.replace("_", " ") for state in _SIGNS}, abouts=_LEVELS)
    source = importlib.resources.files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8")
    return environment.from_string(source)


def _message(check: Check) -> str:
    """What is said of a check before its detail: what should be true, or else the line of its detail that names the error."""
    if check.what:
        return check.what
    errors = [line[2:] for line in check.detail.splitlines() if line.startswith("E ")]
    return first_line(errors[0] if errors else check.detail, limit=300)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"
