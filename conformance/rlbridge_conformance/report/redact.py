"""Keeping secrets out of reports: by the name of what holds them, by their form, and by where they stand in a text.

A name such as `hf_token` or `RAY_AUTH_TOKEN` marks its value, whatever it is; in free text, `name=value`, `name: value` and
`--name value` do the same. Known forms (bearer tokens, keys of Hugging Face, OpenAI, AWS and the like) and the user part of
a URL are found anywhere. Where it is not clear what a text means, too much is taken out rather than too little.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, Literal

MARK = "<redacted>"

_Secrecy = Literal["none", "words", "all"]

# Anywhere in a name, its separators left out: api_key, API-Key and apiKey are one.
_SECRET_PARTS = (
    *("secret", "password", "passwd", "passphrase", "credential", "authorization", "authorisation"),
    *("apikey", "accesskey", "privatekey"),
)
_SECRET_WORDS = {"auth", "bearer", "cookie", "cookies", "jwt", "oauth", "pwd"}
# Names of counts as well (max_tokens, num_key_value_heads), so numbers stay.
_SECRET_UNLESS_NUMBER = {"key", "keys", "pass", "token", "tokens"}
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")

_TERMINAL = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\))")
# Control characters, those that turn the direction of a text, and what no Unicode text may hold.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")

_FORMS = [
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL),
    re.compile(r"(?i:(?<=bearer )|(?<=bearer\t)) *(?!(?i:tokens?|auth\w*)(?:[\s.,;:)]|\Z))[^\s\"',;)\]}]+"),
    re.compile(r"(?<![A-Za-z0-9])hf_(?:[A-Za-z0-9]{16,}|(?=[A-Za-z]*[0-9])[A-Za-z0-9]{8,})"),
    re.compile(r"(?<![A-Za-z0-9])sk-(?:[\w-]{16,}|(?=[A-Za-z_-]*[0-9])[\w-]{8,})"),
    re.compile(r"(?<![A-Za-z0-9])(?:AKIA|ASIA|ABIA|ACCA|AGPA|AIDA|AIPA|ANPA|ANVA|AROA)[A-Z0-9]{12,}"),
    re.compile(r"(?<![A-Za-z0-9])(?:gh[opsur]_|github_pat_|glpat-|nvapi-|xox[abeoprs]-|AIza)[\w-]{16,}"),
    re.compile(r"(?<![\w-])eyJ[\w-]{8,}\.[\w-]+(?:\.[\w-]*)?"),
]

# All patterns take a time that grows with the text and not with its square: a detail may be megabytes of a log.
_BEFORE_LAST_AT = re.compile(r"(?<!\S)\S+@")
# A password may hold "/" or "@" although it should be quoted; then all up to the last "@" goes.
_URL_USER = re.compile(r"(?<=://)(?:[^/:]*:.*(?=@)|[^/?#]*(?=@))")
_NAME = re.compile(
    r"(?<![\w.-])(?P<name>[\w.-]++)"
    r"(?:\\*[\"']?[ \t]*(?:[=!]==?|=>|:=|=|:(?!:|//))(?:\s*+(?=\\*[\"'])|[ \t]*)|(?<=[\w-])(?P<flag>[ \t]+)(?=[^\s-]))"
)
_QUOTED = r"[bru]{0,2}(?P<quote>\\*[\"'])(?P<inner>(?:(?!(?P=quote))(?:\\.|.))*)(?P=quote)"
_BRACKETED = r"(?P<bracketed>[\[({][^\])}]{0,4000}[\])}])"
# password: str | None = "..."
_ANNOTATED = r"[\w.\[\]]++(?:[ \t]*\|[ \t]*[\w.\[\]]++)*+[ \t]*=[ \t]*(?:\"[^\"]*\"|'[^']*'|\S+)"
_VALUE = re.compile(rf"{_QUOTED}|{_BRACKETED}|(?P<annotated>{_ANNOTATED})|(?P<run>\S+)", re.DOTALL)
_LINE = re.compile(rf"{_QUOTED}|{_BRACKETED}|(?P<run>[^\r\n]+)", re.DOTALL)
_NUMBERS = re.compile(r"[\s\[\](){},.\d_+eE-]*")
_NO_SECRET = re.compile(r"(?i:true|false|none|null|)")


def redact(value: Any) -> Any:
    """`value` as JSON has it, without secrets: mappings and lists to any depth, numbers and booleans as they are.

    What JSON does not know (a path, an object, NaN) becomes its text.
    """
    return _redact(value, "none")


def redact_text(text: str) -> str:
    """`text` without secrets and without terminal escapes, the home directory as "~"; unprintable characters are escaped."""
    # First of all: a colour code or a NUL in the middle of a secret would hide it.
    text = _UNPRINTABLE.sub(_escaped, _TERMINAL.sub("", text).replace("\r\n", "\n"))
    # What is taken out can uncover what was glued to it. This ends, since each round leaves less than it found.
    while (cleaner := _without_secrets(text)) != text:
        text = cleaner
    return text


def is_secret_name(name: str) -> bool:
    """Whether a key, a variable or an option of that name holds a secret, unless it holds a number."""
    return _secrecy(name) != "none"


def _redact(value: Any, secrecy: _Secrecy) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Mapping):
        return {redact_text(str(key)): _redact(item, _stricter(secrecy, _secrecy(str(key)))) for key, item in value.items()}
    if isinstance(value, Set):
        return _redact(sorted(value, key=repr), secrecy)
    if isinstance(value, list | tuple):
        before = [None, *value]
        return [_redact(item, _stricter(secrecy, _after_flag(last, item))) for last, item in zip(before, value, strict=False)]
    if isinstance(value, int | float) and secrecy != "all":
        return value if math.isfinite(value) else str(value)
    if secrecy != "none":
        return MARK if str(value) else ""
    return redact_text(str(value))


def _secrecy(name: str) -> _Secrecy:
    words = [word.lower() for word in _WORD.findall(name)]
    if not words or words[-1] in {"error", "exception", "warning"}:  # KeyError: ...
        return "none"
    joined = "".join(words)
    if any(part in joined for part in _SECRET_PARTS) or _SECRET_WORDS & set(words):
        return "all"
    return "words" if any(word in _SECRET_UNLESS_NUMBER or word.endswith("token") for word in words) else "none"


def _stricter(one: _Secrecy, other: _Secrecy) -> _Secrecy:
    order: list[_Secrecy] = ["none", "words", "all"]
    return max(one, other, key=order.index)


def _after_flag(last: object, item: object) -> _Secrecy:
    """What an item of a command line is, by the item before it: ["--api-key", "..."]."""
    is_flag = isinstance(last, str) and last.startswith("-") and "=" not in last
    return _secrecy(str(last)) if is_flag and not str(item).startswith("--") else "none"


def _without_secrets(text: str) -> str:
    text = _BEFORE_LAST_AT.sub(lambda found: _URL_USER.sub(MARK, found[0]), text)
    for form in _FORMS:
        text = form.sub(MARK, text)
    return _home_as_tilde(_without_named_values(text))


def _without_named_values(text: str) -> str:
    parts, end = [], 0
    for found in _NAME.finditer(text):
        name = found["name"]
        secrecy = _secrecy_in_text(name)
        if found.start() < end or secrecy == "none" or (found["flag"] and not name.startswith("-")):
            continue
        whole_line = found["flag"] is None and re.search(r"(?i)authori[sz]ation|cookie", name)
        value = (_LINE if whole_line else _VALUE).match(text, found.end())
        if value and (span := _secret_span(value, secrecy)):
            parts += [text[end : span[0]], MARK]
            end = span[1]
    return "".join([*parts, text[end:]])


def _secrecy_in_text(name: str) -> _Secrecy:
    """As `_secrecy`, but in prose a key is a key of a dict, tokens are what a model makes, and a pass is a test's."""
    words = [word.lower() for word in _WORD.findall(name)]
    if name.endswith(".py") or words in (["key"], ["pass"]) or (words and words[-1] in {"keys", "pass", "tokens"}):
        return "all" if _secrecy(name) == "all" and not name.endswith(".py") else "none"
    return _secrecy(name)


def _secret_span(value: re.Match[str], secrecy: _Secrecy) -> tuple[int, int] | None:
    group = value.lastgroup or "run"
    start, stop = value.span(group)
    secret = value[group]
    if group == "run":
        secret = secret.rstrip(" \t)]}\"',;")
        stop = start + len(secret)
    number = secrecy == "words" and group != "inner" and _NUMBERS.fullmatch(secret)
    return None if number or _NO_SECRET.fullmatch(secret) else (start, stop)


def _home_as_tilde(text: str) -> str:
    home = str(Path.home())
    if home == "/":
        return text
    # A home directly below the root has a common name: /proc/1/root is none.
    before = r"(?<![\w.~-])" if home.count("/") == 1 else ""
    return re.sub(rf"{before}{re.escape(home)}(?![\w-]|\.\w)", "~", text)


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
