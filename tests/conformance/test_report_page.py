"""The page of one result, and the matrix of several."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rlbridge_conformance.levels import LEVELS
from rlbridge_conformance.report import STATES, Result, Wire, write_report
from rlbridge_conformance.report.matrix import main as write_matrix
from rlbridge_conformance.report.matrix import matrix
from rlbridge_conformance.report.page import render, shortened
from tests.conformance.results import NO_RDMA, backend, check, environment_with, result

# The page

VOID = {"meta", "link", "br", "hr", "img", "input"}
HOSTILE = "</pre></details><script>alert(1)</script><img src=x onerror='a()'>\"&amp; {{ 7*7 }} {% raw %} "
HOSTILE += "\x1b[31mred\x1b[0m \x00 \u202e"


class Page(HTMLParser):
    """The tags of a page, which have to be balanced, and its text."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        assert len(attrs) == len(dict(attrs))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data

    def headings(self) -> Iterator[str]:
        return (attributes["id"] or "" for tag, attributes in self.tags if tag == "h2")


def full_result(text: str = "detail") -> Result:
    every = [check(state, level, f"{level}_{state}", detail=text) for level in LEVELS for state in STATES]
    failed = check("fail", "faults", "torn[2-1]", what=text, expected=text, got=text, detail=text)
    return result(
        *every,
        failed,
        levels=LEVELS,
        trainer=backend("mine", options={"a": {text: text}}, capabilities=["rdma", "cuda"]),
        generator=backend("toy", reference=True),
        transport=None,
        wire=Wire(name=text, evidence=text),
        environment=environment_with(variables={"NCCL_X": text}, gpus=[text], driver="1", rdma_devices=[text]),
    )


@pytest.mark.parametrize("text", ["detail", HOSTILE, "", "a\nb" * 20_000], ids=["plain", "hostile", "empty", "long"])
def test_page_is_well_formed_and_asks_for_nothing(text: str) -> None:
    source = render(full_result(text))
    page = Page(source)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {attributes["aria-labelledby"] for _, attributes in page.tags if "aria-labelledby" in attributes} <= set(ids)
    assert not {tag for tag, _ in page.tags} & {"script", "img", "iframe", "object", "embed", "form"}
    assert [attributes.get("href") for _, attributes in page.tags if "href" in attributes] == ["data:,"]
    assert not [key for _, attributes in page.tags for key in attributes if key.startswith("on") or key == "src"]
    assert "url(" not in source
    assert "@import" not in source
    assert source.startswith("<!DOCTYPE html>")


def test_hostile_text_is_shown_and_not_obeyed() -> None:
    source = render(full_result(HOSTILE))
    assert "<script>" not in source
    assert html.escape("<script>alert(1)</script>", quote=False) in source
    assert "{{ 7*7 }} {% raw %} red \\x00 \\u202e" in Page(source).text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202e]", source)


def test_page_tells_failures_first_and_then_errors_and_what_did_not_run() -> None:
    page = Page(render(full_result()))
    assert list(page.headings()) == ["levels", "failures", "errors", "not-run", "checks", "skipped", "environment"]
    assert "Not conformant" in page.text
    assert "torn [2-1]" in page.text


def test_page_of_a_conformant_result_is_short() -> None:
    page = Page(render(result(check())))
    assert list(page.headings()) == ["levels", "checks", "environment"]
    assert "All that the backends claim was tried, and held: 1 check passed." in page.text


def test_page_of_nothing_at_all_is_a_page() -> None:
    assert (
        "Incomplete" in Page(render(result(levels=("contract",), trainer=None, generator=None, transport=None, wire=None))).text
    )


def test_failure_shows_what_was_expected_and_what_was_seen() -> None:
    text = Page(render(result(check("fail", what="every byte arrives", expected="0xAB", got="0xCD", detail="tb")))).text
    assert text.index("every byte arrives") < text.index("0xAB") < text.index("0xCD") < text.index("Detail")


def test_long_detail_is_cut_in_the_middle_with_a_note() -> None:
    text = "first " + "x" * 100_000 + " last"
    short = shortened(text)
    assert len(short) < 13_000
    assert short.startswith("first ")
    assert short.endswith(" last")
    assert f"{100_011 - 12_000:,} characters are left out here" in short
    assert len(render(result(check("fail", detail=text)))) < 40_000


# The matrix


def matrix_rows(page: str) -> list[list[str]]:
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in page.splitlines() if line.startswith("|")]


def test_matrix_has_a_row_for_each_triple_and_a_column_for_each_level() -> None:
    passed = result(*[check()] * 41, check("skip", "rdma"), levels=("contract", "rdma"))
    lacking = result(check(), check("not_run", "rdma", detail=NO_RDMA), levels=("contract", "rdma"), trainer=backend("a"))
    mixed = result(
        *[check("fail")] * 2, check(), check("error"), check("not_run", detail="x"), trainer=backend("b", reference=True)
    )
    rows = matrix_rows(matrix([passed, lacking, mixed]))
    assert rows[0] == ["trainer", "transport", "generator", "verdict", "contract", "sync", "rdma", "faults", "speed", "wire"]
    assert rows[2][:7] == ["(b)", "nixl", "native", "not-conformant", "2 ✗, 1 ✓, 1 error, 1 not run: x", "-", "-"]
    assert rows[3][3:7] == ["incomplete", "1 ✓", "-", "not run: no RDMA device (/sys/class/infiniband is empty)"]
    assert rows[4] == ["native", "nixl", "native", "conformant", "41 ✓", "-", "not claimed", "-", "-", "cma"]


def test_matrix_tells_the_options_that_the_user_gave() -> None:
    given = backend("nixl", options={"wire": "tcp", "a": 1})
    rows = matrix_rows(matrix([result(check(), transport=given)]))
    assert rows[2][1] == "nixl, a=1, wire=tcp"


def test_matrix_is_the_same_in_any_order_and_ends_with_a_newline() -> None:
    several = [result(check(seconds=number), trainer=backend(name)) for number, name in enumerate("bab")]
    assert matrix(several) == matrix(several[::-1])
    assert matrix(several).endswith("|\n")


def test_matrix_renders_without_a_warning(tmp_path: Path) -> None:
    special = "| `x` $y$ *z* __a__ [b](c) {d}`e` ~~f~~ <http://g> \\ ^h"
    paths = []
    for number, made in enumerate([full_result(), full_result(f"{HOSTILE} {special}"), result(levels=("speed",))]):
        write_report(made, tmp_path / str(number))
        paths.append(str(tmp_path / str(number) / "result.json"))
    source, out = tmp_path / "docs", tmp_path / "html"
    source.mkdir()
    assert write_matrix([str(source / "index.md"), *paths]) == 0
    (source / "conf.py").write_text('extensions = ["myst_parser"]\n')
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-b", "html", str(source), str(out)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert (built.returncode, built.stderr) == (0, "")
    page = (out / "index.html").read_text()
    assert page.count("<tr ") == 8
    assert html.escape(special, quote=False) in page


def test_matrix_of_a_damaged_result_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert write_matrix([str(tmp_path / "page.md"), str(tmp_path / "none.json")]) == 2
    assert "cannot read" in capsys.readouterr().err
    assert not (tmp_path / "page.md").exists()
