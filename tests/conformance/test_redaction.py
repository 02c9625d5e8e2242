"""No secret reaches a report, and what is none stays as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlbridge_conformance.report import Wire, redact, redact_text, verdict_line, write_report
from rlbridge_conformance.report.matrix import matrix
from rlbridge_conformance.report.redact import MARK
from tests.conformance.results import backend, check, environment_with, result

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
