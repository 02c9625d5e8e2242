from __future__ import annotations

import itertools
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from rlbridge.errors import LayoutError, PeerLostError, StaleVersionError, SyncError
from tests.sync.stage import MIB_ROWS, Stage, stopped

Make = Callable[..., Stage]


@pytest.mark.parametrize(
    ("ranks", "tps", "flat", "operation", "wire"),
    [
        pytest.param(ranks, tps, *how, id=f"{ranks}x{'+'.join(map(str, tps))}-{'flat' if how[0] else 'rows'}-{how[1]}-{how[2]}")
        for (ranks, tps), how in zip(
            itertools.product((1, 2, 3), ((1,), (2,), (1, 2))),
            itertools.cycle(
                [
                    (False, "read", "any"),
                    (True, "write", "any"),
                    (True, "read", "tcp"),
                    (False, "write", "tcp"),
                ]
            ),
            strict=False,
        )
    ],
)
def test_every_engine_serves_what_the_trainers_hold(
    make_stage: Make, ranks: int, tps: tuple[int, ...], flat: bool, operation: str, wire: str
) -> None:
    stage = make_stage(ranks, tps, flat=flat, transport={"operation": operation, "wire": wire})
    for version in (1, 2, 5):
        report = stage.sync(version)
        assert stage.serve(version)
        assert (report.version, report.epoch, report.verified) == (version, 1, True)
        assert report.wire == ("nixl over tcp/lo" if wire == "tcp" else "nixl over cma")
    assert stage.session.attached is not None
    assert report.bytes >= stage.session.attached.bytes
    assert sum(e.bytes_moved for e in report.evidence) == 3 * report.bytes
    assert set(report.phases) == {"snapshot", "wire", "verify", "install", "pause"}


@pytest.mark.parametrize("publish", ["snapshot", "barrier"])
@pytest.mark.parametrize("operation", ["read", "write"])
def test_both_ways_of_publishing_work_both_ways_of_moving(make_stage: Make, publish: str, operation: str) -> None:
    stage = make_stage(2, (1, 1), publish=publish, transport={"operation": operation})
    for version in (1, 2, 3):
        stage.sync(version)
        assert stage.serve(version)


def test_a_bf16_engine_gets_the_trainers_float32_rounded(make_stage: Make) -> None:
    stage = make_stage(2, (2,), flat=True, served=torch.bfloat16)
    stage.sync(1)
    assert stage.serve(1)
    assert stage.session.attached is not None
    assert {(c.source, c.wire) for c in stage.session.attached.casts} == {("float32", "bfloat16")}


def test_a_cast_is_refused_where_the_config_says_so(make_stage: Make) -> None:
    stage = make_stage(served=torch.bfloat16, cast="refuse")
    with pytest.raises(LayoutError, match="float32") as caught:
        stage.session.attach()
    assert caught.value.where["tensor"] == "embed"


@pytest.fixture(scope="module")
def shared() -> Iterator[Stage]:
    stage = Stage(2, (1, 1))
    yield stage
    stage.close()


def test_versions_only_grow(shared: Stage) -> None:
    version = shared.session.version + 4
    shared.sync(version)
    epoch = shared.session.epoch
    for stale in (version, version - 1):
        with pytest.raises(StaleVersionError, match=f"version {stale} is not newer than version {version}"):
            shared.session.sync(stale)
    assert shared.serve(version)
    shared.sync(version + 1)  # and the refusals cost no epoch
    assert shared.session.epoch == epoch


def test_the_steps_of_a_sync_can_be_taken_one_by_one(shared: Stage) -> None:
    old = shared.session.version or 1
    if not shared.session.version:
        shared.sync(old)
    new = old + 1
    shared.load(new)
    shared.session.publish(new)
    for trainer in shared.trainers:
        trainer.do("add", 1.0)  # the next training step
    shared.session.pull(new)
    assert shared.serve(old)
    report = shared.session.install(new)
    assert shared.serve(new)
    assert report.version == new


def test_steps_out_of_order_are_refused(shared: Stage) -> None:
    version = shared.session.version + 1
    with pytest.raises(SyncError, match="is not published"):
        shared.session.pull(version)
    shared.load(version)
    shared.session.publish(version)
    with pytest.raises(SyncError, match="has not been pulled"):
        shared.session.install(version)
    shared.session.pull(version)
    shared.session.install(version)
    with pytest.raises(SyncError, match="is not published"):
        shared.session.install(version)


def test_an_engine_refuses_a_version_that_it_has_from_another_session(make_stage: Make) -> None:
    stage = make_stage()
    stage.sync(3)
    version = 3
    other = stage.session_with()
    with pytest.raises(StaleVersionError) as caught:
        other.sync(version)  # fresh for this one, and already published there
    assert caught.value.where["version"] == str(version)
    assert stage.serve(version)


def test_the_epoch_of_another_session_ends_this_one_and_a_sync_begins_the_next(make_stage: Make) -> None:
    stage = make_stage()
    stage.sync(3)
    version = 3
    stage.session_with().attach()
    with pytest.raises(SyncError, match="came in epoch"):
        stage.sync(version + 1)
    assert all(engine.do("served") == version for engine in stage.engines)
    stage.sync(version + 1)
    assert stage.serve(version + 1)


def test_closing_a_session_gives_the_arenas_back(make_stage: Make) -> None:
    stage = make_stage(bulk=32 * MIB_ROWS, fresh=True)
    before = [p.do("apply", resident_mib) for p in (*stage.trainers, *stage.engines)]
    stage.sync(1)
    stage.session.close()
    after = [p.do("apply", resident_mib) for p in (*stage.trainers, *stage.engines)]
    # A trainer rank has two arenas of 32 MiB, an engine rank one, and the engine's parameters are written for the first time.
    assert after[0] - before[0] < 32
    assert after[1] - before[1] < 32 + 24
    assert stage.serve(1)
    stage.sync(2)
    assert stage.serve(2)


def test_closing_a_session_does_not_wait_for_ever(make_stage: Make) -> None:
    stage = make_stage(2, late_seconds=0.3)
    stage.sync(1)
    with stopped(stage.trainers[0]):
        stage.trainers[1].signal(signal.SIGKILL)
        stage.session.close()


def test_replacing_a_party_needs_its_name(make_stage: Make) -> None:
    stage = make_stage()
    stranger = stage.new_trainer(0)
    stranger.name = "trainer[7]"
    try:
        with pytest.raises(SyncError, match=r"no party 'trainer\[7\]'"):
            stage.session.replace(stranger)
    finally:
        stranger.stop()


def test_a_new_engine_takes_the_place_of_a_dead_one(make_stage: Make) -> None:
    stage = make_stage(2, (1, 2))
    stage.sync(1)
    stage.engines[1].stop()
    stage.load(2)
    with pytest.raises(PeerLostError) as caught:
        stage.session.sync(2)
    assert caught.value.where["peer"] == "generator[1]"
    assert stage.engines[0].do("served") == 1
    stage.engines[1] = stage.new_engine(1)
    stage.session.replace(stage.engines[1])
    stage.sync(3)
    assert stage.serve(3)


def resident_mib(_: Any) -> float:
    with open("/proc/self/statm") as statm:  # noqa: PTH123
        return int(statm.read().split()[1]) * 4096 / 2**20
