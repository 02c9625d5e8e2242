from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from rlbridge.errors import DigestError, QuarantineError, StaleVersionError, SyncError
from rlbridge.rdma.counters import Reading
from rlbridge.sync import subscriber
from rlbridge.sync.messages import Held, Nothing, Pull, Pulled, Read, State, Timed, Verify, Wait
from rlbridge_conformance.toy import SHAPES, ToyEngine, ToySource, weights
from tests.sync.stage import MIB_ROWS, Stage, ask, eventually, stopped

Make = Callable[..., Stage]


def test_the_engine_serves_while_bytes_arrive(make_stage: Make) -> None:
    stage = make_stage(bulk=16 * MIB_ROWS, transport={"wire": "tcp"})
    engine = stage.engines[0]
    stage.sync(1)
    stage.load(2)
    stage.session.publish(2)
    with ThreadPoolExecutor(1) as pool:
        with stopped(stage.trainers[0]):  # which holds the transfer
            pull = pool.submit(stage.session.pull, 2)
            assert eventually(lambda: engine.do("apply", receiving))
            assert stage.serve(1)
            assert ask(engine, "state", Nothing(), State) == State("ready", 1)
            assert not pull.done()
        pull.result(30)
    assert stage.serve(1)  # all of version 2 is there and verified, and none of it is installed
    assert engine.do("apply", arena_bulk) == [2.0]
    stage.session.install(2)
    assert stage.serve(2)


@pytest.mark.parametrize("operation", ["read", "write"])
def test_a_byte_that_changed_in_the_arena_is_found_and_nothing_is_installed(make_stage: Make, operation: str) -> None:
    stage = make_stage(2, (2,), transport={"operation": operation})
    engine = stage.engines[0]
    stage.sync(1)
    engine.do("apply", flip_before_verify)
    with pytest.raises(DigestError, match=r"1 of \d+ segments in the arena are not what trainer") as caught:
        stage.sync(2)
    where = caught.value.where
    assert where["phase"] == "verify"
    assert where["version"] == "2"
    assert where["rank"] == "generator[0].rank[0]"
    assert (where["peer"], where["tensor"]) == engine.do("apply", flipped)
    assert stage.serve(1)
    stage.sync(3)
    assert stage.serve(3)


@pytest.mark.parametrize("version", [2, 3])
def test_a_byte_that_changed_at_the_source_after_it_was_hashed_is_found(make_stage: Make, version: int) -> None:
    stage = make_stage(2)
    for earlier in range(1, version):
        stage.sync(earlier)
    stage.load(version)
    stage.session.publish(version)
    stage.trainers[1].do("apply", flip_source, version)
    with pytest.raises(DigestError) as caught:
        stage.session.pull(version)
    assert caught.value.where["peer"] == "trainer[1]"
    assert stage.serve(version - 1)


def test_what_is_not_verified_is_not_installed(make_stage: Make) -> None:
    stage = make_stage()
    engine = stage.engines[0]
    stage.sync(1)
    stage.load(2)
    stage.session.publish(2)
    with pytest.raises(SyncError, match="no pull of version 2 was begun"):
        ask(engine, "wait_pull", Wait(2, 1.0), Pulled)
    with pytest.raises(SyncError, match="version 2 has not arrived"):
        ask(engine, "verify", Verify(2, [b""]), Timed)
    ask(engine, "start_pull", Pull(2, 1, 10.0), Nothing)
    ask(engine, "wait_pull", Wait(2, 10.0), Pulled)
    for method in ("install", "check", "commit"):
        with pytest.raises(SyncError, match="version 2 is not"):
            ask(engine, method, Wait(2, 1.0), Timed)
    assert stage.serve(1)


@pytest.mark.parametrize("carried_by_ray", [False, True])
def test_what_the_ports_count_while_a_version_arrives_is_reported(make_stage: Make, carried_by_ray: bool) -> None:
    """The ports are made up. What Ray carries arrives before the pull begins: there the count is from the commit before."""
    stage = make_stage(fresh=True)
    engine = stage.engines[0]
    assert stage.sync(1).ports == {}  # no port counts here
    engine.do("apply", make_ports_count)
    stage.sync(2)
    engine.do("apply", count, 1000, carried_by_ray)
    report = stage.sync(3)
    (counts,) = report.ports.values()
    assert list(report.ports) == ["generator[0].rank[0]"]
    assert counts.received == (1001 if carried_by_ray else 1)
    assert counts.known_from == "rx_bytes of made_up0:1"


def test_a_version_that_is_not_newer_is_not_pulled(make_stage: Make) -> None:
    stage = make_stage()
    stage.sync(3)
    for version in (2, 3):
        with pytest.raises(StaleVersionError, match=f"version {version} is not newer than version 3"):
            ask(stage.engines[0], "start_pull", Pull(version, 0, 1.0), Nothing)


def test_two_pulls_never_share_an_arena(make_stage: Make) -> None:
    stage = make_stage(bulk=8 * MIB_ROWS, transport={"wire": "tcp"})
    engine = stage.engines[0]
    stage.sync(1)
    with stopped(stage.trainers[0]):
        ask(engine, "start_pull", Pull(2, 0, 10.0), Nothing)
        with pytest.raises(QuarantineError, match="may still write"):
            ask(engine, "start_pull", Pull(3, 0, 10.0), Nothing)


@pytest.mark.parametrize("operation", ["read", "write"])
def test_a_pull_that_nobody_waits_for_keeps_its_arena_when_the_epoch_ends(make_stage: Make, operation: str) -> None:
    """One engine refuses to begin; the other one has begun, and the session gives up without waiting for it."""
    stage = make_stage(1, (1, 1), transport={"operation": operation}, deadline_seconds=3.0)
    stage.sync(1)
    stage.engines[1].do("apply", claim_version, 2)
    with pytest.raises(StaleVersionError) as caught:
        stage.sync(2)
    assert caught.value.where["peer"] == "generator[1]"
    if operation == "write":  # nobody writes, so the first engine's pull waits
        assert stage.engines[0].do("apply", receiving)
    stage.sync(3)
    assert stage.serve(3)
    version = itertools.count(4)
    assert eventually(lambda: sync_and_count_graves(stage, next(version)) == 0)


def test_calls_of_an_epoch_that_is_over_are_refused(make_stage: Make) -> None:
    stage = make_stage()
    stage.sync(1)
    late = stage.session._token()
    stage.session.attach()
    engine = stage.engines[0]
    for method, message in (
        ("start_pull", Pull(9, 0, 1.0, late)),
        ("wait_pull", Wait(9, 1.0, late)),
        ("verify", Verify(9, [], late)),
        ("install", Wait(9, 1.0, late)),
    ):
        with pytest.raises(SyncError, match="too late"):
            ask(engine, method, message, Nothing)
    assert stage.serve(1)


def test_what_is_served_can_be_read_box_by_box(make_stage: Make) -> None:
    stage = make_stage(2)
    stage.sync(1)
    first = ask(stage.engines[0], "read", Read(0, 3), Held)
    rest = ask(stage.engines[0], "read", Read(3, 1000), Held)
    boxes = [*first.boxes, *rest.boxes]
    assert (len(first.boxes), first.total) == (3, len(boxes))
    for box in boxes:
        cut = tuple(slice(o, o + n) for o, n in zip(box.region.offset, box.region.shape, strict=True))
        assert torch.equal(
            torch.frombuffer(bytearray(box.raw), dtype=torch.float32), weights(1)[box.region.tensor][cut].flatten()
        )
    assert {box.region.tensor for box in boxes} == {name for name, shape in SHAPES.items() if 0 not in shape}


def test_an_unknown_call_is_refused(make_stage: Make) -> None:
    with pytest.raises(SyncError, match="a subscriber has no method 'pul'"):
        ask(make_stage().engines[0], "pul", Nothing(), Nothing)


def receiving(engine: ToyEngine) -> bool:
    receipt = engine.generator.subscribers[0]._receipt
    return receipt is not None and receipt.running


def arena_bulk(engine: ToyEngine) -> list[float]:
    """The distinct values of the tensor "bulk" in the arena."""
    subscriber = engine.generator.subscribers[0]
    assert subscriber._share is not None
    found = [s for s, p in zip(subscriber._segments, subscriber._share.parts, strict=True) if p.region.tensor == "bulk"]
    return sorted({float(v) for s in found for v in torch.unique(s)})


def flip_before_verify(engine: ToyEngine) -> None:
    """Change one bit of what arrives, once."""
    subscriber = engine.generator.subscribers[0]
    verify = subscriber._verify

    def flip(message: Verify) -> Timed:
        del subscriber._verify
        engine.flip_arena_byte()
        engine.flipped = where_flipped(engine)  # type: ignore[attr-defined]
        return verify(message)

    subscriber._verify = flip  # type: ignore[method-assign]


def where_flipped(engine: ToyEngine) -> tuple[str, str]:
    subscriber = engine.generator.subscribers[0]
    assert subscriber._share is not None
    assert subscriber._arena is not None
    at = subscriber._arena.nbytes // 2
    part = next(p for p in subscriber._share.parts if p.offset <= at < p.offset + p.nbytes)
    return f"trainer[{part.source}]", part.region.tensor


def flipped(engine: ToyEngine) -> tuple[str, str]:
    return engine.flipped  # type: ignore[attr-defined, no-any-return]


def flip_source(source: ToySource, version: int) -> None:
    slot = next(s for s in source.publisher._slots if s.version == version)
    assert slot.hashed is not None
    slot.hashed.result(10)
    slot.segments[0].view(torch.uint8).view(-1)[0] ^= 1


def claim_version(engine: ToyEngine, version: int) -> None:
    engine.generator.subscribers[0].version = version


def sync_and_count_graves(stage: Stage, version: int) -> int:
    """Arenas of earlier epochs are freed in passing, by a sync."""
    stage.sync(version)
    return sum(engine.do("apply", graves) for engine in stage.engines)


def graves(engine: ToyEngine) -> int:
    return sum(len(s._graveyard) for s in engine.generator.subscribers)


def make_ports_count(_engine: ToyEngine) -> None:
    """A port that counts one byte more each time that it is looked at."""
    looks = itertools.count()
    _port["more"] = 0

    def read() -> Reading:
        return Reading({("made_up0:1", "hw_counters/rx_bytes"): (next(looks) + _port["more"], 0, 1)})

    subscriber.counters = read


def count(engine: ToyEngine, nbytes: int, carried_by_ray: bool) -> None:
    """Let bytes go by the port, and the transport be one that Ray carries."""
    _port["more"] += nbytes
    transport = engine.generator.subscribers[0]._transport
    assert transport is not None
    transport.moves_ray_objects = carried_by_ray  # type: ignore[misc]


_port: dict[str, int] = {}
