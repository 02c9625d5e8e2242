"""The report as files: result.json for programs, report.html for people."""

from __future__ import annotations

import json
import os
from pathlib import Path

from pydantic import ValidationError

from rlbridge.errors import RlbridgeError
from rlbridge_conformance.report.page import render
from rlbridge_conformance.report.result import SCHEMA, Result

RESULT = "result.json"
PAGE = "report.html"

_MOST_PROBLEMS = 5


class ResultError(RlbridgeError):
    """A result.json that cannot be read."""

    exit_code = 2


def write_report(result: Result, directory: Path) -> Path:
    """Write result.json and report.html into `directory`, each whole or not at all. The path of report.html."""
    directory.mkdir(parents=True, exist_ok=True)
    _replace(directory / RESULT, result.to_json())
    _replace(directory / PAGE, render(result))
    return directory / PAGE


def read_result(path: Path) -> Result:
    """The result in the file `path`, or in the directory `path`.

    Raises:
        ResultError: there is none, it is damaged, or a newer rlbridge wrote it.
    """
    if path.is_dir():
        path = path / RESULT
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ResultError(f"{path} is damaged, it is not JSON: {error}", todo=_AGAIN) from error
    schema = data.get("schema") if isinstance(data, dict) else None
    if type(schema) is not int or schema < 1:
        raise ResultError(f"{path} is not the result of a conformance run: it has no schema version", todo=_AGAIN)
    if schema > SCHEMA:
        raise ResultError(
            f"{path} has schema version {schema}, and this rlbridge knows {SCHEMA}", todo="upgrade rlbridge to read it"
        )
    try:
        return Result.model_validate(data)
    except ValidationError as error:
        raise ResultError("\n  ".join([f"{path} is damaged:", *_problems(error)]), todo=_AGAIN) from error


_AGAIN = "write it again with rlbridge conform --report"


def _problems(error: ValidationError) -> list[str]:
    found = error.errors(include_url=False, include_input=False)
    lines = [f"{'.'.join(map(str, each['loc'])) or 'the whole'}: {each['msg']}" for each in found[:_MOST_PROBLEMS]]
    return lines + ([f"and {len(found) - len(lines)} more"] if len(found) > len(lines) else [])


def _replace(path: Path, content: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(content, encoding="utf-8")
    os.replace(temporary, path)  # noqa: PTH105  (the name says what is meant: atomic, over what is there)
