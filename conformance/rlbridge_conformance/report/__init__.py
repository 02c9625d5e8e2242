"""The report of a conformance run: result.json, report.html, and the page of the docs that is made of several results."""

from __future__ import annotations

from rlbridge_conformance.report.environment import Environment, look
from rlbridge_conformance.report.files import ResultError, read_result, write_report
from rlbridge_conformance.report.redact import redact, redact_text
from rlbridge_conformance.report.result import (
    STATES,
    BackendInfo,
    Check,
    LevelCounts,
    Result,
    State,
    Verdict,
    Wire,
    exit_code,
    json_schema,
    verdict_of,
)
from rlbridge_conformance.report.words import verdict_line

__all__ = [
    "Result",
    "Check",
    "BackendInfo",
    "LevelCounts",
    "Wire",
    "Environment",
    "State",
    "STATES",
    "Verdict",
    "verdict_of",
    "verdict_line",
    "exit_code",
    "json_schema",
    "write_report",
    "read_result",
    "ResultError",
    "look",
    "redact",
    "redact_text",
]
