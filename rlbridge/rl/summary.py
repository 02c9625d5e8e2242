"""What a run comes down to: its reward, its syncs, and whether every one of them was verified."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

PHASES = ("snapshot", "wire", "verify", "install", "pause")


class Report(Protocol):
    """What is read of a sync report (`rlbridge.sync.report.SyncReport`)."""

    @property
    def version(self) -> int:
        """What the generators serve since."""

    @property
    def seconds(self) -> float:
        """From publish to commit."""

    @property
    def bytes(self) -> int:
        """Over all segments and sinks."""

    @property
    def phases(self) -> Mapping[str, float]:
        """Seconds of each phase."""

    @property
    def verified(self) -> bool:
        """Whether the digests at both ends are equal."""

    @property
    def wire(self) -> str:
        """What carried the bytes."""

    @property
    def evidence(self) -> Sequence[object]:
        """How that is known, by rank."""

    @property
    def ports(self) -> Mapping[str, object]:
        """What the RDMA ports of the hosts counted, by engine rank."""


def summarise(
    *,
    steps: int,
    rewards: Sequence[float],
    reports: Sequence[Report],
    trainer: str,
    generator: str,
    transport: str,
    wall_seconds: float,
) -> dict[str, Any]:
    """The summary of a run, ready for JSON. What there is no value for is None.

    Args:
        steps: Optimizer steps that were made.
        rewards: The mean held-out reward of each evaluation, in order: the first is before the first step.
        reports: Of every sync, in order. `verified` needs at least one, and all of them verified.
        trainer: Name of the backend.
        generator: Name of the backend.
        transport: Name of the backend.
        wall_seconds: From the run's start to its end.
    """
    return {
        "steps": steps,
        "reward": _rewards(rewards),
        "syncs": len(reports),
        "versions": [report.version for report in reports],
        "verified": bool(reports) and all(report.verified for report in reports),
        "trainer": trainer,
        "generator": generator,
        "transport": transport,
        "wire": ", ".join(dict.fromkeys(report.wire for report in reports)) or None,
        "sync_seconds": _spread([report.seconds for report in reports]),
        "bytes_per_sync": round(statistics.fmean(report.bytes for report in reports)) if reports else None,
        "phases": {phase: _median([r.phases[phase] for r in reports if phase in r.phases]) for phase in PHASES},
        "wall_seconds": wall_seconds,
    }


def _rewards(rewards: Sequence[float]) -> dict[str, float | None]:
    if not rewards:
        return {"first": None, "last": None, "best": None}
    return {"first": float(rewards[0]), "last": float(rewards[-1]), "best": float(max(rewards))}


def _spread(seconds: Sequence[float]) -> dict[str, float | None]:
    if not seconds:
        return {"p50": None, "p95": None, "max": None}
    p50, p95 = np.percentile(seconds, [50, 95])
    return {"p50": float(p50), "p95": float(p95), "max": float(max(seconds))}


def _median(seconds: Sequence[float]) -> float | None:
    return float(statistics.median(seconds)) if seconds else None
