"""What a run leaves in its directory: metrics.jsonl, syncs.jsonl, evaluations.jsonl and summary.json."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from rlbridge import hookimpl
from rlbridge.rl.run import Run
from rlbridge.rl.summary import Report

METRICS = "metrics.jsonl"
SYNCS = "syncs.jsonl"
EVALUATIONS = "evaluations.jsonl"
SUMMARY = "summary.json"


class FileObserver:
    """Writes each event as one line of JSON, at once, and the summary at the end. NaN and infinities are written as null.

    A run that is resumed first drops what an earlier process wrote beyond the step it goes on from.
    """

    def __init__(self) -> None:
        self._last_version: int | None = None

    @hookimpl
    def rlbridge_run_started(self, run: Run) -> None:
        """Drop the lines of steps that will be made again."""
        if run.resumed_step:
            for name in (METRICS, EVALUATIONS):
                _keep(run.directory / name, lambda record: record["step"] <= run.resumed_step)

    @hookimpl
    def rlbridge_step_finished(self, run: Run, metrics: Mapping[str, float]) -> None:
        """One line in metrics.jsonl, "step" first."""
        others = {name: value for name, value in metrics.items() if name != "step"}
        _append(run.directory / METRICS, {"step": int(metrics["step"]), **others})

    @hookimpl
    def rlbridge_weights_committed(self, run: Run, report: Report) -> None:
        """One line in syncs.jsonl."""
        path = run.directory / SYNCS
        if self._last_version is None:
            # Which versions a resumed run makes again is known only now, by the first of them.
            _keep(path, lambda record: record["version"] < report.version)
        self._last_version = report.version
        _append(
            path,
            {
                "version": report.version,
                "seconds": report.seconds,
                "bytes": report.bytes,
                "wire": report.wire,
                "evidence": report.evidence,
                "ports": report.ports,
                "verified": report.verified,
                "phases": report.phases,
            },
        )

    @hookimpl
    def rlbridge_evaluated(self, run: Run, step: int, reward: float) -> None:
        """One line in evaluations.jsonl."""
        _append(run.directory / EVALUATIONS, {"step": step, "reward": reward})

    @hookimpl
    def rlbridge_run_finished(self, run: Run, result: Mapping[str, object]) -> None:
        """summary.json, whole or not at all."""
        _replace(run.directory / SUMMARY, msgspec.json.format(_encoder.encode(result), indent=2) + b"\n")


def _append(path: Path, record: Mapping[str, Any]) -> None:
    with path.open("ab") as file:
        file.write(_encoder.encode(record) + b"\n")


def _keep(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    if path.exists():
        _replace(path, b"".join(line for line in path.read_bytes().splitlines(keepends=True) if _is_whole(line, wanted)))


def _is_whole(line: bytes, wanted: Callable[[dict[str, Any]], bool]) -> bool:
    # The process that was killed may have left half a line behind.
    try:
        return line.endswith(b"\n") and wanted(msgspec.json.decode(line))
    except msgspec.DecodeError:
        return False


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    os.replace(temporary, path)  # noqa: PTH105  (the name says what is meant: atomic, over what is there)


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else str(value)


_encoder = msgspec.json.Encoder(enc_hook=_plain)
