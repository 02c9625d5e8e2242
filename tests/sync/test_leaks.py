"""What happens once an epoch happens once, and what a sync takes it gives back."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlbridge_conformance.toy import ToyEngine, ToySource
from tests.sync.stage import Stage

Make = Callable[..., Stage]


@pytest.mark.parametrize("operation", ["read", "write"])
def test_fifty_syncs_register_once_and_leave_nothing_behind(make_stage: Make, operation: str) -> None:
    stage = make_stage(2, (2,), transport={"operation": operation}, fresh=True)
    parties = [*stage.trainers, *stage.engines]
    for party in parties:
        party.do("apply", count_registrations)
    for version in range(1, 11):
        stage.sync(version)
    before = [party.do("apply", holdings) for party in parties]
    for version in range(11, 61):
        stage.sync(version)
    after = [party.do("apply", holdings) for party in parties]
    assert stage.serve(60)
    assert stage.session.epoch == 1
    for party, was, now in zip(parties, before, after, strict=True):
        assert now["registrations"] == now["agents"] == (1 if party in stage.trainers else 2)
        # UCX and the allocator open and close on their own time; a leak is one a sync, which would be fifty.
        for counted in ("files", "threads", "maps"):
            assert now[counted] - was[counted] < 25, counted
        assert now["resident_mib"] - was["resident_mib"] < 8
        assert now["kept"] == was["kept"]


def test_ten_epochs_leave_nothing_behind(make_stage: Make) -> None:
    stage = make_stage(1, (1,), fresh=True)
    parties = [*stage.trainers, *stage.engines]
    for version in (1, 2, 3):
        stage.session.attach()
        stage.sync(version)
    before = [party.do("apply", holdings) for party in parties]
    shared = {name for held in before for name in held["shared"]}
    for version in range(4, 14):
        stage.session.attach()
        stage.sync(version)
        shared.update(*(party.do("apply", holdings)["shared"] for party in parties))
    after = [party.do("apply", holdings) for party in parties]
    assert stage.serve(13)
    for was, now in zip(before, after, strict=True):
        assert now["files"] <= was["files"] + 1
        assert now["threads"] <= was["threads"] + 3
        assert now["resident_mib"] - was["resident_mib"] < 24
        assert now["logs"] <= was["logs"]
        assert 0 < len(now["shared"]) <= len(was["shared"])
    left = shared.difference(*(now["shared"] for now in after))
    assert [path for path in left if Path(path).exists()] == []


def count_registrations(party: ToySource | ToyEngine) -> None:
    """Count what NIXL is asked to register in this process, and the agents that are made."""
    from nixl._api import nixl_agent

    party.counted = {"registrations": 0, "agents": 0}  # type: ignore[union-attr]
    register, begin = nixl_agent.register_memory, nixl_agent.__init__

    def counting_register(*args: Any, **kwargs: Any) -> Any:
        party.counted["registrations"] += 1  # type: ignore[union-attr]
        return register(*args, **kwargs)

    def counting_begin(*args: Any, **kwargs: Any) -> None:
        party.counted["agents"] += 1  # type: ignore[union-attr]
        begin(*args, **kwargs)

    nixl_agent.register_memory, nixl_agent.__init__ = counting_register, counting_begin


def holdings(party: ToySource | ToyEngine) -> dict[str, Any]:
    """What this process holds."""
    proc = Path("/proc/self")
    publisher = [party.publisher] if isinstance(party, ToySource) else []
    subscribers: list[Any] = [] if isinstance(party, ToySource) else party.generator.subscribers
    transports: list[Any] = [end._transport for end in (*publisher, *subscribers)]
    return getattr(party, "counted", {}) | {
        "files": len(list((proc / "fd").iterdir())),
        "threads": len(list((proc / "task").iterdir())),
        "maps": len(maps := (proc / "maps").read_text().splitlines()),
        "shared": {line.split()[5] for line in maps if "/dev/shm/" in line},
        "logs": len(list(Path("/tmp").glob(f"*ucx*{os.getpid()}*"))),
        "resident_mib": int((proc / "statm").read_text().split()[1]) * 4096 / 2**20,
        "kept": [
            sum(len(slots) for slots in t._transfers.values()) + len(t._peers) + len(t._expected) + len(t._notes)
            for t in transports
        ]
        + [len(s._graveyard) for s in subscribers],
    }
