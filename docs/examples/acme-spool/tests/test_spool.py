"""The transport under a whole sync: two trainer ranks and an engine of two ranks in three processes, without Ray."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlbridge.errors import SyncError
from rlbridge.sync.messages import TransportSpec
from rlbridge.sync.session import SyncOptions, SyncSession
from rlbridge_conformance.processes import ProcessParty
from rlbridge_conformance.toy import ToyEngine, ToySource


@pytest.fixture
def parties() -> Iterator[tuple[list[ProcessParty], ProcessParty]]:
    trainers = [ProcessParty(f"trainer[{rank}]", functools.partial(ToySource, rank, 2, flat=True)) for rank in range(2)]
    engine = ProcessParty("generator[0]", functools.partial(ToyEngine, 0, tp=2))
    yield trainers, engine
    for party in [*trainers, engine]:
        party.stop()


def test_three_versions_arrive_bit_for_bit(parties: tuple[list[ProcessParty], ProcessParty], tmp_path: Path) -> None:
    trainers, engine = parties
    spec = TransportSpec("spool", {"backend": "spool", "directory": str(tmp_path)})
    session = SyncSession(trainers, [engine], spec, SyncOptions())
    for version in (1, 2, 3):
        for trainer in trainers:
            trainer.do("load", version)
        report = session.sync(version)
        assert report.verified
        assert report.wire == "spool over file"
        assert engine.do("matches", version)
        assert engine.do("served") == version


def test_engine_keeps_its_version_when_a_trainer_is_gone(
    parties: tuple[list[ProcessParty], ProcessParty], tmp_path: Path
) -> None:
    trainers, engine = parties
    spec = TransportSpec("spool", {"backend": "spool", "directory": str(tmp_path)})
    session = SyncSession(trainers, [engine], spec, SyncOptions(deadline_seconds=1.0))
    session.sync(1)
    trainers[1].stop()
    with pytest.raises(SyncError, match=r"trainer\[1\]"):
        session.sync(2)
    assert engine.do("served") == 1
