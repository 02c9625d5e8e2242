"""The report of a conformance run: verdicts, result.json, the page, the matrix, and that no secret reaches any of them."""

from __future__ import annotations

import html
import importlib.metadata
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_args
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from rlbridge.errors import RlbridgeError
from rlbridge_conformance.report import (
    LEVELS,
    STATES,
    BackendInfo,
    Check,
    Environment,
    Level,
    LevelCounts,
    Result,
    ResultError,
    State,
    Verdict,
    Wire,
    environment,
    exit_code,
    json_schema,
    look,
    read_result,
    redact,
    redact_text,
    verdict_line,
    verdict_of,
    write_report,
)
from rlbridge_conformance.report.matrix import main as write_matrix
from rlbridge_conformance.report.matrix import matrix
from rlbridge_conformance.report.page import render, shortened
from rlbridge_conformance.report.redact import MARK
from rlbridge_conformance.report.words import first_line, in_words, sentence

DOCS = Path(__file__).parents[2] / "docs"
NO_RDMA = "no RDMA device (/sys/class/infiniband is empty)"

ENVIRONMENT = Environment(
    time="2025-01-02T03:04:05+00:00",
    python="3.11.7",
    platform="Debian GNU/Linux 12 (bookworm), x86_64",
    kernel="6.1.0",
    cpus=2,
    memory=8 * 2**30,
    versions={"rlbridge": "0.1.0", "nixl": "1.3.0", "vllm": None, "ucx": "1.19.0"},
    driver=None,
    gpus=None,
    rdma_devices=[],
    variables={"OMP_NUM_THREADS": "1"},
)


def environment_with(**changes: Any) -> Environment:
    return Environment.model_validate({**ENVIRONMENT.model_dump(), **changes})


def backend(name: str, **changes: Any) -> BackendInfo:
    facts = {"distribution": "rlbridge", "version": "0.1.0", "options": {}, "capabilities": [], "reference": False}
    return BackendInfo(name=name, **{**facts, **changes})


def check(state: State = "pass", level: Level = "contract", name: str = "every_byte_arrives", **more: Any) -> Check:
    return Check(id=name, level=level, state=state, **{"seconds": 0.5, "detail": "", **more})


def result(*checks: Check, levels: tuple[Level, ...] = ("contract",), **changes: Any) -> Result:
    triple = {"trainer": backend("native"), "generator": backend("native"), "transport": backend("nixl")}
    facts: dict[str, Any] = {**triple, "wire": Wire(name="cma", evidence="UCX protocol report"), **changes}
    return Result.of(levels, checks, facts.pop("environment", ENVIRONMENT), **facts)


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


# Redaction

SECRET_NAMES = [
    *("token", "hf_token", "HF_TOKEN", "RAY_AUTH_TOKEN", "accessToken", "authtoken", "secret", "client-secret", "SECRET_VALUE"),
    *("password", "dbPassword", "PASSWD", "key", "api_key", "apiKey", "APIKey", "X-API-Key", "apikey", "AWS_ACCESS_KEY_ID"),
    *("ssh.key", "credential", "credentials", "Authorization", "authorization_header", "cookie", "passphrase", "--api-key"),
]
ORDINARY_NAMES = ["tokenizer", "backend", "monkey", "keyboard", "wire", "lr", "author", "keep_alive", "UCX_IB_PKEY", "bypass"]
# Of letters and digits that the surroundings below do not have, so that a hit is no accident.
SECRETS = st.text("QXZ789%!+=~^", min_size=6, max_size=30)
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.sampled_from(ORDINARY_NAMES)
)
ORDINARY = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(ORDINARY_NAMES), inner, max_size=3)),
)


@st.composite
def nested(draw: st.DrawFn, value: Any) -> Any:
    """`value` somewhere within lists and mappings."""
    for _ in range(draw(st.integers(0, 4))):
        if draw(st.booleans()):
            value = [*draw(st.lists(ORDINARY, max_size=2)), value, *draw(st.lists(ORDINARY, max_size=2))]
        else:
            value = {**draw(st.dictionaries(st.sampled_from(ORDINARY_NAMES), ORDINARY, max_size=2)), "inner": value}
    return value


@given(st.data(), SECRETS, st.sampled_from(SECRET_NAMES))
def test_value_of_a_secret_name_never_comes_out(data: st.DataObject, secret: str, name: str) -> None:
    planted = data.draw(nested({name: data.draw(nested(secret))}))
    assert secret not in json.dumps(redact(planted), ensure_ascii=False)
    made = backend("mine", options={"outer": planted})
    assert secret not in result(trainer=made).to_json()


@given(SECRETS.map("Q".__add__), st.sampled_from([name for name in SECRET_NAMES if name != "key"]))
def test_value_that_a_text_names_as_a_secret_never_comes_out(secret: str, name: str) -> None:
    for text in (
        "{0}={1}",
        "{0}: {1}",
        "a {0!r}: {1!r}",
        '"{0}": "{1}",',
        "{0} = {1})",
        "f({0}='{1}', n=2)",
        "{0}=['{1}', 'x']",
    ):
        assert secret not in redact_text(text.format(name, secret))


@given(
    st.text("QXZ789%!+=~^@/:?#[]{}()'\"\\$&*,;<>|", min_size=6),
    st.text("abc DEF.\n\t\x00\u202e", max_size=40),
    st.text("abc DEF.\n\t\x00\u202e", max_size=40),
    st.sampled_from(["", "user", "a.b-c", "x@y"]),
    st.sampled_from(["https", "postgres", "git+ssh", "redis"]),
)
def test_password_of_a_url_never_comes_out_of_a_text(password: str, before: str, after: str, user: str, scheme: str) -> None:
    for written in (password, quote(password, safe="")):
        out = redact_text(f"{before} {scheme}://{user}:{written}@host:80/path {after}")
        assert written not in out
        assert "@host:80/path" in out or MARK in out


@given(ORDINARY)
def test_numbers_booleans_and_words_are_as_they_were(value: Any) -> None:
    assert redact(value) == value
    assert json.dumps(redact(value)) == json.dumps(value)


FRAGMENTS = st.sampled_from(
    [
        *(*SECRET_NAMES, *ORDINARY_NAMES, str(Path.home()), MARK),
        *(" ", "\n", " = ", ": ", "Bearer ", "bearer  ", "\x1b[31m", "\x00", "\x1b]0;x\x07", "12", "true", "str"),
        *(
            "hf_abcdefghijklmnopqrstuvw",
            "sk-proj-0123456789abcdef",
            "AKIAABCDEFGHIJKLMNOP",
            "eyJabcdefgh.a.b",
            "://",
            "--",
            "=>",
        ),
        *"=:\"'\\@[](){},;~/-<>.|",
    ]
)


@given(st.one_of(st.text(), st.lists(FRAGMENTS, max_size=12).map("".join)))
def test_redacting_twice_changes_nothing_more(text: str) -> None:
    once = redact_text(text)
    assert redact_text(once) == once


@given(st.data(), st.sampled_from(SECRET_NAMES))
def test_redacting_values_twice_changes_nothing_more(data: st.DataObject, name: str) -> None:
    once = redact({name: data.draw(nested(data.draw(LEAVES))), "list": ["--token", "x", data.draw(ORDINARY)]})
    assert redact(once) == once


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("password=hunter2 step=3", "password=<redacted> step=3"),
        ('{"api_key": "a b", "step": 3}', '{"api_key": "<redacted>", "step": 3}'),
        (r"{\"token\": \"a\", \"n\": 1}", r"{\"token\": \"<redacted>\", \"n\": 1}"),
        ("Options(token='a', n=1)", "Options(token='<redacted>', n=1)"),
        ("assert password == 'hunter2'", "assert password == '<redacted>'"),
        ("password   = 'hunter2'", "password   = '<redacted>'"),
        ('password: str = "hunter2"', "password: <redacted>"),
        ("serve --api-key abc --port 80", "serve --api-key <redacted> --port 80"),
        ("Authorization: Basic dXNlcg== \nnext", "Authorization: <redacted> \nnext"),
        ("{'Authorization': 'Basic dXNlcg=='}", "{'Authorization': '<redacted>'}"),
        ("curl -H 'X: Bearer abc.def'", "curl -H 'X: Bearer <redacted>'"),
        ("with hf_abcdefghijklmnopqrstuvwxyzabcdef01 on", "with <redacted> on"),
        ("sk-proj-abcDEF123_456-789xyz", "<redacted>"),
        ("AKIAIOSFODNN7EXAMPLE", "<redacted>"),
        ("ghp_abcdefghijklmnopqrstuvwxyz0123456789", "<redacted>"),
        ("https://token@github.com/a/b", "https://<redacted>@github.com/a/b"),
        ("pass\x1b[0mword=hun\x1b[31mter2", "password=<redacted>"),
        ("-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----\nx", "<redacted>\nx"),
    ],
)
def test_secret_is_taken_out_of_a_text_and_the_rest_stays(text: str, expected: str) -> None:
    assert redact_text(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "KeyError: 'lm_head.weight'",
        "max_tokens=16, eos_token_id=2, num_key_value_heads: 8",
        "missing_keys=['model.embed_tokens.weight']",
        "tests/test_token.py::test_pass: 12 passed",
        "test_key.py:12: AssertionError",
        "key: model.layers.0",
        "a bearer token, the password, and the key",
        "git+https://github.com/org/repo@v1.2",
        "https://docs.example.org/a@b",
        "hf_checkpoint_path, hf_model, sk-learn, risk-adjusted-return-of-2024",
        "secret: true, password: None",
        "ucx_ib_pkey=0x8001",
    ],
)
def test_text_without_a_secret_is_as_it_was(text: str) -> None:
    assert redact_text(text) == text


@pytest.mark.parametrize("unit", ["a", "a.b-", "://", "eyJ", "-eyJ", "a=[", "password='", "x_token: a|", "bearer ", "\\"])
def test_long_text_takes_no_longer_than_its_length_asks_for(unit: str) -> None:
    # With a pattern that backtracks over and over this never ends, and the time limit of the tests strikes.
    assert len(redact_text(unit * 20_000)) >= len(MARK)


def test_secret_after_a_flag_of_a_command_line_is_taken_out() -> None:
    assert redact(["--api-key", "abc", "--port", "80"]) == ["--api-key", MARK, "--port", "80"]


def test_what_json_does_not_know_becomes_text() -> None:
    assert redact({"path": Path("a"), 1: (1, 2), "set": {2, 1}, "nan": float("nan")}) == {
        "path": "a",
        "1": [1, 2],
        "set": [1, 2],
        "nan": "nan",
    }


@pytest.mark.parametrize("home", ["/home/bob", "/root"])
def test_home_directory_is_shortened(monkeypatch: pytest.MonkeyPatch, home: str) -> None:
    monkeypatch.setenv("HOME", home)
    text = f"{home}/x {home} file://{home}/y '{home}' {home}s {home}-2/x A={home}:{home}/bin"
    assert redact_text(text) == f"~/x ~ file://~/y '~' {home}s {home}-2/x A=~:~/bin"
    assert redact_text("/proc/1/root/x") == "/proc/1/root/x"


def test_secret_reaches_no_file_of_a_report(tmp_path: Path) -> None:
    secret = "hunter2hunter2"
    text = f"failed at https://u:{secret}@h/ with Bearer {secret} and token={secret}"
    variables = {"RAY_AUTH_TOKEN": secret, "UCX_URL": f"http://u:{secret}@h"}
    made = result(
        check("fail", detail=text, what=text, expected=text, got=text),
        *(check(state, detail=text) for state in ("error", "skip", "not_run")),
        environment=environment_with(variables=variables),
        transport=backend("mine", options={"env": {"MY_API_KEY": secret}, "url": f"http://{secret}@h"}),
        wire=Wire(name="tcp", evidence=text),
    )
    write_report(made, tmp_path)
    for path in tmp_path.iterdir():
        assert secret not in path.read_text()
    assert secret not in matrix([made]) + verdict_line(made)


# The environment


def test_environment_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "mlx5_1").mkdir()
    (tmp_path / "mlx5_0").mkdir()
    smi = tmp_path / "bin/nvidia-smi"
    smi.parent.mkdir()
    smi.write_text("#!/bin/sh\nprintf '570.1, NVIDIA H100 80GB HBM3\\n570.1, NVIDIA H100 80GB HBM3\\n'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(smi.parent), prepend=":")
    monkeypatch.setattr(environment, "_INFINIBAND", tmp_path)
    monkeypatch.setattr(environment, "_bundled_ucx", list)
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "hunter2")
    monkeypatch.setenv("OTHER", "1")
    found = look()
    assert found.python == sys.version.split()[0]
    assert found.cpus >= 1
    assert found.memory > 2**28
    assert found.versions["rlbridge"] == importlib.metadata.version("rlbridge")
    assert set(found.versions) == {*environment.DISTRIBUTIONS, "ucx"}
    assert (found.driver, found.gpus) == ("570.1", ["NVIDIA H100 80GB HBM3"] * 2)
    assert found.rdma_devices == ["bin", "mlx5_0", "mlx5_1"]
    assert found.variables["NCCL_DEBUG"] == "INFO"
    assert found.variables["RAY_AUTH_TOKEN"] == MARK
    assert "OTHER" not in found.variables


def test_version_of_ucx_is_that_of_the_wheel_of_nixl(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nixl")
    bundled = environment._bundled_ucx()
    monkeypatch.setattr(environment, "_bundled_ucx", lambda: bundled[:1])
    assert re.fullmatch(r"\d+\.\d+\.\d+", look().versions["ucx"] or "")


def test_machine_without_gpus_rdma_and_nixl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(environment, "_INFINIBAND", tmp_path / "none")
    monkeypatch.setattr(environment, "_NIXL_WHEELS", ("no-such-distribution",))
    found = look()
    assert (found.driver, found.gpus, found.rdma_devices, found.versions["ucx"]) == (None, None, [], None)


def test_looking_at_the_environment_imports_no_framework() -> None:
    code = (
        "import sys; from rlbridge_conformance.report import look; look();"
        "print([name for name in ('ray', 'torch', 'nixl', 'transformers', 'pytest') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


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


# The documentation

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
