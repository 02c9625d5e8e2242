"""What a sync did and how long each part of it took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rlbridge.rdma.counters import Counted
from rlbridge.roles.transport import WireEvidence
from rlbridge.weights.plan import Cast


@dataclass(frozen=True)
class AttachReport:
    """An epoch: who takes part, the size of the plan, and the seconds of each part of the preparation."""

    epoch: int
    sources: Sequence[str]
    sinks: Sequence[str]
    segments: int
    copies: int
    bytes: int
    arena_bytes: Mapping[str, int]
    casts: Sequence[Cast]
    phases: Mapping[str, float]


@dataclass(frozen=True)
class SyncReport:
    """A version that every engine serves.

    Attributes:
        version: The version committed.
        epoch: The membership it was sent to.
        seconds: From the start of the snapshot to the last commit.
        bytes: Bytes moved, over all engine ranks.
        phases: Seconds of `snapshot`, `wire`, `verify`, `install` and `pause`, each of the slowest rank.
        verified: All digests agreed: at both arenas and over the live parameters.
        wire: What carried the bytes, as far as it is known.
        evidence: How that is known, one entry a rank that acted.
        ports: By engine rank, what the RDMA ports of its host counted while the version arrived; of hosts that have any.
    """

    version: int
    epoch: int
    seconds: float
    bytes: int
    phases: Mapping[str, float]
    verified: bool
    wire: str
    evidence: Sequence[WireEvidence] = field(default_factory=list)
    ports: Mapping[str, Counted] = field(default_factory=dict)
