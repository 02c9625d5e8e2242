from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from rlbridge.errors import DeadlineError, LayoutError, LeaseError, RlbridgeError, StaleVersionError, SyncError
from rlbridge.sync.messages import Acknowledge, Digests, Nothing, Publish, Published, Send, Sent, Wait
from rlbridge_conformance.toy import ToySource
from tests.sync.stage import MIB_ROWS, Stage, ask, stopped

Make = Callable[..., Stage]
SINKS = ["generator[0].rank[0]"]


@pytest.mark.parametrize("operation", ["read", "write"])
def test_training_goes_on_while_a_version_is_on_its_way(make_stage: Make, operation: str) -> None:
    """The engine is stopped in the middle of the transfer, and the trainers take a step meanwhile."""
    stage = make_stage(2, bulk=24 * MIB_ROWS, transport={"wire": "tcp", "operation": operation})
    stage.sync(1)
    stage.load(2)
    stage.session.publish(2)
    with ThreadPoolExecutor(1) as pool:
        pull = pool.submit(stage.session.pull, 2)
        time.sleep(0.01)
        with stopped(stage.engines[0]):
            for trainer in stage.trainers:
                trainer.do("add", 1.0)
            assert not pull.done()
        pull.result(30)
    stage.session.install(2)
    assert stage.serve(2)


def test_a_version_that_nobody_acknowledged_is_not_overwritten(make_stage: Make) -> None:
    stage = make_stage(lease_seconds=60.0)
    stage.sync(1)
    trainer = stage.trainers[0]
    for version in (2, 3):  # two arenas hold two versions
        trainer.do("load", version)
        ask(trainer, "publish", Publish(version, SINKS), Published)
    kept = ask(trainer, "digests", Wait(2, 5.0), Digests)
    with pytest.raises(LeaseError, match=r"version 2 is still leased by generator\[0\]\.rank\[0\]") as caught:
        ask(trainer, "publish", Publish(4, SINKS), Published)
    assert caught.value.where["rank"] == "trainer[0]"
    assert trainer.do("apply", rehash, 2) == kept.joined
    ask(trainer, "acknowledge", Acknowledge(2, SINKS), Nothing)
    ask(trainer, "publish", Publish(4, SINKS), Published)


def test_a_lease_lasts_until_every_sink_has_acknowledged(make_stage: Make) -> None:
    stage = make_stage(1, (1, 1), lease_seconds=60.0)
    stage.session.attach()
    trainer = stage.trainers[0]
    both = [*SINKS, "generator[1].rank[0]"]
    for version in (1, 2):
        ask(trainer, "publish", Publish(version, both), Published)
    ask(trainer, "acknowledge", Acknowledge(1, SINKS), Nothing)
    with pytest.raises(LeaseError, match=r"leased by generator\[1\]\.rank\[0\]"):
        ask(trainer, "publish", Publish(3, both), Published)


def test_a_lease_that_has_run_out_begins_a_new_epoch_by_itself(make_stage: Make) -> None:
    stage = make_stage(2, lease_seconds=0.3)
    stage.sync(1)
    for version in (2, 3):
        # Only one rank is in arrears: the other one publishes version 4, and once more in the new epoch.
        ask(stage.trainers[0], "publish", Publish(version, SINKS), Published)
    time.sleep(0.4)
    with pytest.raises(LeaseError, match="has run out") as caught:
        ask(stage.trainers[0], "publish", Publish(4, SINKS), Published)
    assert caught.value.where["expelled"] == SINKS[0]
    report = stage.sync(4)
    assert (report.version, report.epoch) == (4, 2)
    assert stage.serve(4)


def test_a_version_is_published_once(make_stage: Make) -> None:
    stage = make_stage()
    stage.sync(3)
    for version in (2, 3):
        with pytest.raises(StaleVersionError, match=f"version {version} cannot be published after version 3"):
            ask(stage.trainers[0], "publish", Publish(version, SINKS), Published)


def test_a_version_that_nobody_received_can_be_published_again(make_stage: Make) -> None:
    stage = make_stage(2)
    stage.sync(1)
    with stage.with_options(deadline_seconds=0.5), stopped(stage.trainers[1]), pytest.raises(DeadlineError):
        stage.session.sync(2)
    stage.sync(2)
    assert stage.serve(2)


def test_a_snapshot_that_fails_leaves_no_version_behind(make_stage: Make) -> None:
    stage = make_stage(deadline_seconds=5.0)
    stage.sync(1)
    stage.sync(2)
    trainer = stage.trainers[0]
    trainer.do("apply", break_snapshot, True)
    with pytest.raises(RlbridgeError, match="half a snapshot") as caught:
        stage.session.sync(3)
    assert caught.value.where == {"peer": "trainer[0]", "version": "3", "phase": "snapshot"}
    for version in (1, 3):  # version 1 was in that arena
        with pytest.raises(SyncError, match="is not published here"):
            ask(trainer, "digests", Wait(version, 1.0), Digests)
        with pytest.raises(SyncError, match="is not in buffer 0"):
            ask(trainer, "send", Send(version, 0, 1.0), Sent)
    trainer.do("apply", break_snapshot, False)
    stage.sync(3)
    assert stage.serve(3)


def test_calls_of_an_epoch_that_is_over_are_refused(make_stage: Make) -> None:
    stage = make_stage()
    stage.sync(1)
    late = stage.session._token()
    stage.session.attach()
    for method, message, kind in (
        ("publish", Publish(9, SINKS, late), Published),
        ("send", Send(9, 0, 1.0, late), Sent),
        ("digests", Wait(9, 1.0, late), Digests),
        ("acknowledge", Acknowledge(9, SINKS, late), Nothing),
    ):
        with pytest.raises(SyncError, match="too late"):
            ask(stage.trainers[0], method, message, kind)
    stage.sync(2)
    assert stage.serve(2)


def test_a_publish_that_a_stopped_trainer_answers_too_late_does_no_harm(make_stage: Make) -> None:
    stage = make_stage(2)
    stage.sync(1)
    with stage.with_options(deadline_seconds=0.5), stopped(stage.trainers[0]), pytest.raises(DeadlineError) as caught:
        stage.session.sync(2)
    assert caught.value.where["phase"] == "snapshot"
    for version in (4, 5, 6):
        stage.sync(version)
        assert stage.serve(version)


def test_barrier_lets_nobody_train_before_all_have_the_version(make_stage: Make) -> None:
    stage = make_stage(2, publish="barrier")
    stage.sync(1)
    stage.load(2)
    stage.session.publish(2)
    with pytest.raises(LeaseError, match=r"training would change version 2 while generator\[0\]\.rank\[0\] reads it"):
        stage.trainers[0].do("add", 1.0)
    stage.session.pull(2)
    for trainer in stage.trainers:
        trainer.do("add", 1.0)
    stage.session.install(2)
    assert stage.serve(2)
    stage.session.sync(3)
    assert stage.engines[0].do("matches", 2, 1.0)


def test_barrier_does_not_install_what_training_may_have_changed(make_stage: Make) -> None:
    """The lease runs out, training goes on, and the bytes and the digests are those of the next step: they agree."""
    stage = make_stage(publish="barrier")
    stage.sync(1)
    stage.session = stage.session_with(lease_seconds=0.2)
    stage.session.attach()
    stage.load(2)
    stage.session.publish(2)
    time.sleep(0.3)
    stage.trainers[0].do("add", 1.0)
    stage.trainers[0].do("apply", hash_again)
    with pytest.raises(LeaseError, match="for longer than its lease"):
        stage.session.pull(2)
    assert stage.serve(1)


def test_barrier_refuses_storage_of_another_dtype_by_name(make_stage: Make) -> None:
    stage = make_stage(publish="barrier", served=torch.bfloat16)
    with pytest.raises(LayoutError, match="the trainer holds float32 and the wire carries bfloat16") as caught:
        stage.session.attach()
    assert caught.value.where["tensor"] == "embed"
    assert caught.value.where["peer"] == "trainer[0]"


def test_barrier_refuses_storage_that_is_not_contiguous_by_name(make_stage: Make) -> None:
    stage = make_stage(1, (2,), publish="barrier")
    with pytest.raises(LayoutError, match="is not contiguous") as caught:
        stage.session.attach()
    assert caught.value.where["tensor"] == "o"


def test_barrier_notices_that_a_parameter_has_moved(make_stage: Make) -> None:
    stage = make_stage(publish="barrier")
    stage.sync(1)
    stage.trainers[0].do("apply", move)
    with pytest.raises(LayoutError, match="have moved in memory"):
        stage.session.sync(2)
    stage.sync(2)
    assert stage.serve(2)


def test_an_unknown_call_is_refused(make_stage: Make) -> None:
    with pytest.raises(SyncError, match="a publisher has no method 'publsh'"):
        ask(make_stage().trainers[0], "publsh", Nothing(), Nothing)


def rehash(source: ToySource, version: int) -> bytes:
    """The digests of what the version's arena holds now."""
    from rlbridge.weights.digest import digests

    slot = next(s for s in source.publisher._slots if s.version == version)
    return b"".join(digests(slot.segments))


def hash_again(source: ToySource) -> None:
    """As if hashing had only now come to it."""
    from rlbridge.sync.publisher import _hash

    slot = source.publisher._slots[0]
    slot.hashed = source.publisher._hasher.submit(_hash, slot.segments)


def break_snapshot(source: ToySource, fail: bool) -> None:
    """Make the next snapshots fail half-way."""
    inner: Any = source.publisher._source

    def snapshot(destinations: list[torch.Tensor]) -> None:
        destinations[0].zero_()
        raise RuntimeError("half a snapshot")

    if fail:
        inner.snapshot = snapshot
    else:
        del inner.snapshot


def move(source: ToySource) -> None:
    """What an optimizer does that replaces a parameter."""
    source.shards["q"] = source.shards["q"].clone()
