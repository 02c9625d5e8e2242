"""The result of a conformance run: its verdict, the line that tells it, result.json and the documentation of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from rlbridge.errors import RlbridgeError
from rlbridge_conformance.levels import LEVELS, Level
from rlbridge_conformance.report import (
    STATES,
    BackendInfo,
    Check,
    Environment,
    LevelCounts,
    Result,
    ResultError,
    State,
    Verdict,
    Wire,
    exit_code,
    json_schema,
    read_result,
    verdict_line,
    verdict_of,
    write_report,
)
from rlbridge_conformance.report.words import first_line, in_words, sentence
from tests.conformance.results import NO_RDMA, backend, check, result


def counts(text: str) -> dict[Level, LevelCounts]:
    """ "contract: 2 pass, 1 fail; sync:" as counts."""
    found: dict[Level, LevelCounts] = {}
    for part in text.split(";"):
        level, _, states = part.strip().partition(":")
        pairs = (state.split() for state in states.split(",") if state.strip())
        found[level] = LevelCounts.model_validate({state: int(number) for number, state in pairs})  # type: ignore[index]
    return found


# Verdicts


@pytest.mark.parametrize(
    ("levels", "verdict"),
    [
        ("contract: 2 pass; sync: 1 pass", "conformant"),
        ("contract: 2 pass, 3 skip", "conformant"),
        ("contract: 2 pass; rdma: 4 skip", "conformant"),
        ("contract: 9 pass, 1 fail", "not-conformant"),
        ("contract: 9 pass; sync: 1 fail, 1 error, 1 not_run", "not-conformant"),
        ("contract: 1 error; sync: 1 fail", "not-conformant"),
        ("contract: 9 pass, 1 error", "error"),
        ("contract: 9 pass; sync: 1 error, 1 not_run", "error"),
        ("contract: 9 pass; rdma: 1 not_run", "incomplete"),
        ("contract: 9 pass, 1 not_run", "incomplete"),
        ("contract: 3 skip", "incomplete"),
        ("contract: 3 skip; sync: 2 skip", "incomplete"),
        ("contract: 2 pass; sync:", "incomplete"),
        ("contract:", "incomplete"),
    ],
)
def test_verdict_follows_from_the_counts(levels: str, verdict: Verdict) -> None:
    assert verdict_of(counts(levels)) == verdict


def test_no_level_at_all_is_not_conformant() -> None:
    assert verdict_of({}) == "incomplete"
    assert "no level was asked for" in verdict_line(result(levels=()))


@given(
    st.dictionaries(st.sampled_from(LEVELS), st.fixed_dictionaries({state: st.integers(0, 2) for state in STATES}), min_size=1)
)
def test_only_what_passed_and_nothing_else_but_skips_is_conformant(drawn: dict[Level, dict[str, int]]) -> None:
    levels = {level: LevelCounts.model_validate(number) for level, number in drawn.items()}
    verdict = verdict_of(levels)
    assert (verdict == "not-conformant") == any(number["fail"] for number in drawn.values())
    if verdict == "conformant":
        assert any(number["pass"] for number in drawn.values())
        assert not any(number["error"] or number["not_run"] for number in drawn.values())


def test_exit_codes_tell_the_verdicts_apart() -> None:
    assert [exit_code(verdict) for verdict in ("conformant", "not-conformant", "error", "incomplete")] == [0, 1, 2, 3]


# The line


def test_line_of_a_conformant_result_has_the_triple_the_counts_and_the_wire() -> None:
    made = result(check(), check(level="sync"), check("skip", "sync"), levels=("sync", "contract"))
    assert verdict_line(made) == "conformant: native > nixl > native, contract 1/1, sync 1/1 (cma)"
    assert sentence(made).endswith("2 checks passed. 1 check of what it does not claim was skipped.")


def test_line_of_an_incomplete_result_says_which_level_did_not_run_and_why() -> None:
    made = result(check(), *[check("not_run", "rdma", detail=NO_RDMA)] * 2, levels=("contract", "rdma"))
    assert (
        verdict_line(made) == f"incomplete: native > nixl > native, contract 1/1, rdma 0/2 (cma); rdma did not run: {NO_RDMA}"
    )
    assert sentence(made) == f"Nothing failed, but rdma did not run: {NO_RDMA}."


def test_line_of_an_incomplete_result_counts_the_other_reasons() -> None:
    lacking = [check("not_run", detail=text) for text in ("no GPU", NO_RDMA, NO_RDMA, "")]
    assert verdict_line(result(check(), *lacking)).endswith(
        f"; 4 of 5 checks of contract did not run: {NO_RDMA} (and 2 other reasons)"
    )


def test_line_of_an_incomplete_result_says_where_nothing_was_shown() -> None:
    made = result(check("skip"), levels=("contract", "speed"))
    assert verdict_line(made).endswith("; contract shows nothing: all of it was skipped; speed shows nothing: it has no checks")


def test_line_of_a_failure_has_the_number_and_the_first_in_the_order_of_the_levels() -> None:
    made = result(
        check("fail", "sync", "later"),
        check("fail", name="torn", what="a torn update is refused", detail="long\ntraceback"),
        check("error"),
        levels=("contract", "sync"),
    )
    assert verdict_line(made) == (
        "not-conformant: native > nixl > native, 2 checks failed, the first torn: a torn update is refused"
    )


def test_line_of_an_error_says_that_the_suite_broke() -> None:
    made = result(check("error", detail="Traceback\nboom"), trainer=None)
    assert verdict_line(made).startswith("error: none > nixl > native, ")
    assert "1 check could not be judged, since the suite broke, every_byte_arrives: Traceback" in verdict_line(made)


@given(st.text(), st.sampled_from(get_args(State)))
def test_line_is_one_line_whatever_the_details_are(text: str, state: State) -> None:
    line = verdict_line(result(check(state, detail=text, what=text)))
    assert len(line.splitlines()) == 1
    assert len(line) < 300


def test_id_of_a_check_in_words() -> None:
    assert in_words("test_every_byte_arrives[2-bf16_x]") == "every byte arrives [2-bf16_x]"
    assert in_words("contract.every_byte_arrives[1.5]") == "every byte arrives [1.5]"
    assert in_words("commit") == "commit"
    assert first_line("\n\n  one  two\nthree") == "one two"
    assert first_line("x" * 500, limit=10) == "x" * 9 + "…"


# result.json


def test_result_is_the_same_after_it_was_written_and_read(tmp_path: Path) -> None:
    made = result(
        check("fail", what="bytes arrive", expected="1", got="2", detail="Traceback ✗ \x00 \ud800"),
        check("skip", "sync", detail="not claimed"),
        levels=("sync", "contract"),
        trainer=None,
        transport=backend(
            "mine", options={"wire": "tcp", "sizes": [1, 2.5, None, True]}, capabilities=["rdma"], reference=True
        ),
    )
    page = write_report(made, tmp_path / "new" / "out")
    assert page.name == "report.html"
    assert sorted(path.name for path in page.parent.iterdir()) == ["report.html", "result.json"]
    assert read_result(page.parent / "result.json") == read_result(page.parent) == made
    data = json.loads((page.parent / "result.json").read_text())
    assert (data["schema"], data["verdict"], data["trainer"], list(data["levels"])) == (
        1,
        "not-conformant",
        None,
        ["contract", "sync"],
    )
    assert data["levels"]["contract"] == {"pass": 0, "fail": 1, "error": 0, "skip": 0, "not_run": 0}
    assert list(data["checks"][1]) == ["id", "level", "state", "seconds", "detail"]


def test_result_fits_its_json_schema() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    data = json.loads(result(check("fail", what="w"), check()).to_json())
    validator = jsonschema.Draft202012Validator(json_schema())
    validator.check_schema(json_schema())
    validator.validate(data)
    damages: list[dict[str, Any]] = [
        {"schema": 2},
        {"verdict": "fine"},
        {"more": 1},
        {"levels": {"other": {}}},
        {"wire": {}},
        {"checks": [{}]},
    ]
    for damage in damages:
        assert not validator.is_valid({**data, **damage})
    for key in data:
        assert not validator.is_valid({name: value for name, value in data.items() if name != key})


def _without(*path: str) -> Callable[[dict[str, Any]], object]:
    def change(data: dict[str, Any]) -> None:
        for key in path[:-1]:
            data = data[key]
        del data[path[-1]]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(schema=2), "has schema version 2, and this rlbridge knows 1\n  upgrade"),
        (lambda data: data.update(schema="1"), "is not the result of a conformance run"),
        (lambda data: data.update(schema=True), "is not the result of a conformance run"),
        (_without("schema"), "is not the result of a conformance run"),
        (_without("environment"), "is damaged:\n  environment: Field required"),
        (_without("trainer", "name"), "trainer.name: Field required"),
        (lambda data: data.update(verdict="conformant"), "the verdict is conformant, and the levels say not-conformant"),
        (lambda data: data["levels"]["contract"].update({"fail": 0}), "the counts of the levels are not those of the checks"),
        (lambda data: data["checks"][0].update(level="speed"), "checks of levels that were not asked for: speed"),
        (lambda data: data["checks"][0].update(seconds=-1), "checks.0.seconds"),
        (lambda data: data.update({f"k{i}": 1 for i in range(9)}), "and 4 more"),
    ],
)
def test_damaged_result_is_refused_and_says_where(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    data = json.loads(result(check("fail")).to_json())
    change(data)
    (tmp_path / "result.json").write_text(json.dumps(data))
    with pytest.raises(ResultError, match=re.escape(message)) as caught:
        read_result(tmp_path)
    assert str(tmp_path / "result.json") in str(caught.value)
    assert isinstance(caught.value, RlbridgeError)


@pytest.mark.parametrize("content", [b"", b'{"schema": 1, "verdi', b"\xff\xfe", b"[]", b"null", b"[" * 100_000])
def test_file_that_is_no_result_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "result.json").write_bytes(content)
    with pytest.raises(ResultError, match=r"is damaged|is not the result"):
        read_result(tmp_path)


def test_missing_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match=r"cannot read .*No such file"):
        read_result(tmp_path / "result.json")


def test_result_cannot_be_made_of_checks_of_other_levels() -> None:
    with pytest.raises(ValidationError, match="not asked for: speed"):
        result(check(level="speed"))


# The documentation

DOCS = Path(__file__).parents[2] / "docs"
RESULT_PAGE = (DOCS / "conformance_result.md").read_text()


@pytest.mark.parametrize(
    "model", [Result, BackendInfo, LevelCounts, Check, Wire, Environment], ids=lambda model: model.__name__
)
def test_every_key_of_result_json_is_documented(model: type[BaseModel]) -> None:
    keys = [field.alias or name for name, field in model.model_fields.items()]
    assert [key for key in keys if f"| `{key}` |" not in RESULT_PAGE] == []


def test_states_verdicts_levels_and_exit_codes_are_documented() -> None:
    words = [*get_args(State), *get_args(Level)]
    assert [word for word in words if f"| `{word}` |" not in RESULT_PAGE] == []
    for verdict in get_args(Verdict):
        assert f"| `{verdict}` | {exit_code(verdict)} |" in RESULT_PAGE


def test_example_of_the_documentation_is_a_result(tmp_path: Path) -> None:
    [example] = re.findall(r"^```json\n(.*?)^```$", RESULT_PAGE, re.MULTILINE | re.DOTALL)
    (tmp_path / "result.json").write_text(example)
    read = read_result(tmp_path)
    assert json.loads(read.to_json()) == json.loads(example)
    assert f"`{verdict_line(read)}`" in RESULT_PAGE
