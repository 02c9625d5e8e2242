"""Processes that are killed or stopped at the worst moment."""

from __future__ import annotations

import itertools
import pickle
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from rlbridge.errors import DeadlineError, DirtyError, PeerLostError, QuarantineError, SyncError, from_wire, to_wire
from rlbridge.sync.messages import Nothing, Pull
from rlbridge.sync.subscriber import Subscriber
from rlbridge_conformance.processes import ProcessParty
from rlbridge_conformance.toy import ToyEngine, ToySource
from tests.sync.stage import MIB_ROWS, Stage, ask, eventually, stopped
from tests.sync.test_subscriber import arena_bulk, graves, receiving, sync_and_count_graves

Make = Callable[..., Stage]


def test_a_trainer_that_dies_before_the_pull_leaves_the_old_version_served(make_stage: Make) -> None:
    stage = make_stage(2, (1, 2))
    stage.sync(1)
    stage.load(2)
    stage.session.publish(2)
    stage.trainers[1].signal(signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(PeerLostError) as caught:
        stage.session.pull(2)
    assert time.monotonic() - start < 20  # the deadline is 30 s: the news does not wait for it
    assert caught.value.where["peer"] == "trainer[1]"
    assert caught.value.where["phase"] == "wire"
    assert stage.serve(1)
    recover(stage, 1)


@pytest.mark.parametrize("operation", ["read", "write"])
def test_a_trainer_that_dies_in_the_middle_of_the_transfer_leaves_the_old_version_served(
    make_stage: Make, operation: str
) -> None:
    stage = make_stage(2, bulk=48 * MIB_ROWS, transport={"wire": "tcp", "operation": operation})
    stage.sync(1)
    stage.load(2)
    stage.session.publish(2)
    with ThreadPoolExecutor(1) as pool:
        pull = pool.submit(stage.session.pull, 2)
        assert eventually(lambda: stage.engines[0].do("apply", receiving))
        stage.trainers[1].signal(signal.SIGKILL)
        start = time.monotonic()
        with pytest.raises(PeerLostError) as caught:
            pull.result(60)
    assert time.monotonic() - start < 10
    assert caught.value.where["peer"] == "trainer[1]"
    assert stage.serve(1)
    recover(stage, 1)


def test_an_engine_that_dies_in_the_middle_of_the_transfer_harms_no_other(make_stage: Make) -> None:
    """Over TCP, UCX 1.23 now and then aborts the source of a reader that dies (docs/limits.md): a trainer is lost as well."""
    stage = make_stage(2, (1, 1), bulk=24 * MIB_ROWS, transport={"wire": "tcp"})
    stage.sync(1)
    stage.load(2)
    stage.session.publish(2)
    with ThreadPoolExecutor(1) as pool:
        pull = pool.submit(stage.session.pull, 2)
        assert eventually(lambda: stage.engines[1].do("apply", receiving))
        stage.engines[1].signal(signal.SIGKILL)
        with pytest.raises(PeerLostError) as caught:
            pull.result(60)
    lost = [rank for rank, trainer in enumerate(stage.trainers) if not is_there(trainer)]
    assert caught.value.where["peer"] in {"generator[1]", *(stage.trainers[rank].name for rank in lost)}
    assert stage.engines[0].do("matches", 1)
    stage.engines[1] = stage.new_engine(1)
    stage.session.replace(stage.engines[1])
    for rank in lost:
        stage.trainers[rank] = stage.new_trainer(rank)
        stage.session.replace(stage.trainers[rank])
    stage.sync(3)
    assert stage.serve(3)


def test_an_engine_that_dies_while_it_installs_leaves_the_other_one_whole(make_stage: Make) -> None:
    stage = make_stage(1, (1, 1))
    stage.sync(1)
    stage.load(2)
    stage.session.publish(2)
    stage.session.pull(2)
    stage.engines[1].do("apply", die_in_the_install)
    with pytest.raises(PeerLostError) as caught:
        stage.session.install(2)
    assert caught.value.where == {"peer": "generator[1]", "version": "2", "phase": "install"}
    assert stage.engines[0].do("served") == 2
    assert stage.engines[0].do("matches", 2)


def test_the_subscriber_of_the_next_driver_keeps_what_may_still_be_written_into(make_stage: Make) -> None:
    stage = make_stage(1, bulk=32 * MIB_ROWS, transport={"wire": "tcp"})
    trainer, engine = stage.trainers[0], stage.engines[0]
    stage.sync(1)
    stage.load(2)
    stage.session.publish(2)
    trainer.signal(signal.SIGSTOP)
    with stage.with_options(deadline_seconds=2.0), pytest.raises(DeadlineError, match="did not"):
        stage.session.pull(2)
    engine.do("apply", begin_anew)
    assert engine.do("apply", graves) == 1
    trainer.signal(signal.SIGCONT)
    stage.session = stage.session_with(deadline_seconds=20.0)
    stage.session.attach()
    versions = itertools.count(3)
    assert eventually(lambda: sync_and_count_graves(stage, next(versions)) == 0)


@pytest.mark.parametrize("operation", ["read", "write"])
def test_bytes_that_come_after_the_deadline_land_where_nobody_reads(make_stage: Make, operation: str) -> None:
    stage = make_stage(1, bulk=32 * MIB_ROWS, transport={"wire": "tcp", "operation": operation}, deadline_seconds=20.0)
    trainer, engine = stage.trainers[0], stage.engines[0]
    stage.sync(1)
    stage.session = stage.session_with(deadline_seconds=2.0)
    stage.session.attach()
    engine.do("apply", fill_arena, 0.0)
    stage.load(2)
    stage.session.publish(2)
    with ThreadPoolExecutor(1) as pool:
        if operation == "read":
            trainer.signal(signal.SIGSTOP)
            pull = pool.submit(stage.session.pull, 2)
        else:
            pull = pool.submit(stage.session.pull, 2)
            assert eventually(lambda: engine.do("apply", receiving))
            trainer.signal(signal.SIGSTOP)  # in the middle of writing, or before it
        start = time.monotonic()
        with pytest.raises(DeadlineError, match="did not") as caught:
            pull.result(30)
    assert time.monotonic() - start < 20
    assert caught.value.where["peer"] == "trainer[0]"
    assert caught.value.where["phase"] == "wire"
    assert caught.value.where["version"] == "2"
    assert stage.serve(1)
    assert engine.do("apply", arena_bulk) != [2.0]
    with pytest.raises(QuarantineError, match="may still write into this arena") as refused:
        ask(engine, "start_pull", Pull(3, 0, 1.0), Nothing)
    assert refused.value.where["rank"] == "generator[0].rank[0]"

    old = engine.do("apply", keep_an_eye_on_the_arena)
    trainer.signal(signal.SIGCONT)
    if operation == "read":  # a source that goes on answers what it was asked
        assert eventually(lambda: engine.do("apply", arena_bulk) == [2.0])
    assert stage.serve(1)

    report = stage.sync(3)
    assert stage.serve(3)
    assert report.epoch == 2
    assert engine.do("apply", arena_bulk) == [3.0]
    assert engine.do("apply", arena_address) != old
    stage.sync(4)
    assert stage.serve(4)
    assert engine.do("apply", graves) == 0


def test_a_late_write_never_meets_the_arena_of_the_next_epoch(make_stage: Make) -> None:
    """The source stays stopped while the engine begins the next epoch with others, and goes on in the middle of it."""
    stage = make_stage(2, bulk=24 * MIB_ROWS, transport={"wire": "tcp"}, deadline_seconds=20.0)
    engine, late = stage.engines[0], stage.trainers[1]
    stage.sync(1)
    stage.session.options = stage.session_with(deadline_seconds=1.5).options
    stage.load(2)
    stage.session.publish(2)
    with stopped(late):
        with pytest.raises(DeadlineError) as caught:
            stage.session.pull(2)
        assert caught.value.where["peer"] == "trainer[1]"
        stage.session.options = stage.session_with().options
        stage.trainers[1] = stage.new_trainer(1)
        stage.session.replace(stage.trainers[1])  # against the rules: the old process is not dead
        stage.load(3)
        stage.session.publish(3)
        stage.session.pull(3)
        assert engine.do("apply", graves) == 1  # an answer that comes too late would find nobody, and end the process
    time.sleep(0.5)  # the late bytes land now
    stage.session.install(3)
    assert stage.serve(3)
    stage.sync(4)
    assert stage.serve(4)
    late.stop()


@pytest.mark.parametrize(
    ("who", "step", "phase"),
    [
        ("trainer[1]", "attach", "plan"),
        ("generator[0]", "attach", "plan"),
        ("trainer[1]", "publish", "snapshot"),
        ("trainer[1]", "pull", "wire"),
        ("generator[0]", "pull", "wire"),
        ("generator[0]", "install", "install"),
    ],
)
def test_every_wait_for_a_stopped_party_ends_and_names_it(make_stage: Make, who: str, step: str, phase: str) -> None:
    stage = make_stage(2, transport={"wire": "tcp"})
    stage.sync(1)
    party = next(p for p in (*stage.trainers, *stage.engines) if p.name == who)
    session = stage.session
    stage.load(2)
    if step in ("pull", "install"):
        session.publish(2)
    if step == "install":
        session.pull(2)
    start = time.monotonic()
    hurry = stage.with_options(deadline_seconds=1.0, setup_seconds=1.0, late_seconds=0.5)
    with hurry, stopped(party), pytest.raises(DeadlineError) as caught:
        session.attach() if step == "attach" else getattr(session, step)(2)
    assert time.monotonic() - start < 20
    assert caught.value.where["peer"] == who
    assert caught.value.where["phase"] == phase
    if step != "attach":
        assert caught.value.where["version"] == "2"
    crossed = from_wire(to_wire(pickle.loads(pickle.dumps(caught.value))))
    assert type(crossed) is DeadlineError
    assert str(crossed) == str(caught.value)
    if step == "install":  # what it was told before it was stopped it does when it goes on
        assert eventually(lambda: stage.serve(2))
    stage.sync(3)
    assert stage.serve(3)


def test_an_engine_that_is_dirty_stays_so_through_failed_syncs(make_stage: Make) -> None:
    stage = make_stage(2, deadline_seconds=10.0)
    stage.sync(1)
    ask(stage.engines[0], "scramble", Nothing(), Nothing)
    stage.trainers[1].stop()
    for version in (2, 3):
        with pytest.raises(SyncError):
            stage.session.sync(version)
        with pytest.raises(DirtyError):
            stage.engines[0].do("served")
    recover(stage, 1)


def is_there(party: ProcessParty) -> bool:
    try:
        return bool(party.do("apply", answers))
    except PeerLostError:
        return False


def answers(_source: ToySource) -> bool:
    return True


def recover(stage: Stage, rank: int) -> None:
    """A new trainer in the place of the dead one, and the next version."""
    stage.trainers[rank] = stage.new_trainer(rank)
    stage.session.replace(stage.trainers[rank])
    stage.sync(7)
    assert stage.serve(7)
    assert stage.session.epoch > 1


def fill_arena(engine: ToyEngine, value: float) -> None:
    for segment in engine.generator.subscribers[0]._segments:
        segment.fill_(value)


def arena_address(engine: ToyEngine) -> int:
    arena = engine.generator.subscribers[0]._arena
    assert arena is not None
    return int(arena.tensor.data_ptr())


def keep_an_eye_on_the_arena(engine: ToyEngine) -> int:
    """Its address; and its memory stays ours, so that no other arena gets the same one."""
    arena = engine.generator.subscribers[0]._arena
    assert arena is not None
    engine.watched = arena.tensor  # type: ignore[attr-defined]
    return arena_address(engine)


def die_in_the_install(engine: ToyEngine) -> None:
    import os

    def install(_: list[torch.Tensor]) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    engine.generator.subscribers[0]._sink.install = install  # type: ignore[method-assign, assignment]


def begin_anew(engine: ToyEngine) -> None:
    """What an engine does that outlives its driver, when the next one comes."""
    engine.generator.subscribers = [Subscriber(old.name, old._sink, instead_of=old) for old in engine.generator.subscribers]
