"""Level faults: the link between the ends cut, narrowed and stalled; shared memory that is full, and names left in it."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rlbridge.errors import PeerLostError, RlbridgeError
from rlbridge_conformance.checks import Mismatch, check, expect, holds
from rlbridge_conformance.disturbed import attempt, named, recovers, serving, whole
from rlbridge_conformance.faults.mounts import SHARED_MEMORY, enlarge, join, private_shared_memory
from rlbridge_conformance.faults.network import INTERFACE, Link, enter
from rlbridge_conformance.run import Stages, not_run
from rlbridge_conformance.stage import Stage

_NETWORK = {"needs": ["transport.cross_host", "transport.plain_processes"], "machine": ["network_namespaces", "tun"]}

_BULK_MIB = 16
_ENOUGH_MBIT = 50.0
"""So narrow that the bulk takes more than two seconds: there is a middle to fail in."""

_SLOW_MBIT = 2.0
"""So narrow that the bulk would take a minute."""

_DISTURB: dict[str, Callable[[Link], None]] = {
    "cut": Link.cut,
    "narrowed": lambda link: link.narrow(_SLOW_MBIT),
    "stalled": Link.stall,
}
_REPAIR: dict[str, Callable[[Link], None]] = {"cut": Link.mend, "narrowed": Link.widen, "stalled": Link.go_on}


@check("faults", "transport", needs=_NETWORK["needs"], machine=[*_NETWORK["machine"], "traffic_control"])
@pytest.mark.parametrize("fault", _DISTURB)
def test_a_link_fails_in_mid_transfer(stages: Stages, fault: str) -> None:
    with Link(proxy=True) as link:
        stage = over(link, stages, bulk_mib=_BULK_MIB)
        old = serving(stage)
        stage.train()
        stage.version += 1
        stage.session.publish(stage.version)
        new = stage.saved()
        error = _disturb(stage, link, fault)
        try:
            if error is None:
                raise Mismatch("a pull ends in an error, when its link fails in the middle", "DeadlineError", "success")
            named(error, "trainer[", "generator[")
            whole(stage, stage.engines, old, new)
        finally:
            _REPAIR[fault](link)
            link.widen()
        recovers(stage)
        recovers(stage)


@check("faults", "transport", needs=_NETWORK["needs"], machine=_NETWORK["machine"])
def test_an_epoch_begins_after_a_link_was_down(stages: Stages) -> None:
    with Link(proxy=True) as link:
        stage = over(link, stages)
        old = serving(stage)
        stage.session.replace(stage.trainers[0].party)  # by itself: the sync begins a new epoch
        link.cut()
        try:
            with stage.syncing(setup_seconds=1.5, deadline_seconds=1.5, late_seconds=0.5):
                error = attempt(stage.sync)
            holds(error is not None, "no epoch begins over a link that is down", "an error", "a sync that succeeded")
            whole(stage, stage.engines, old)
        finally:
            link.mend()
        recovers(stage)


@check("faults", "transport", needs=["transport.plain_processes"], machine=["mount_namespaces"])
def test_shared_memory_is_full(stages: Stages) -> None:
    """A transport that needs it says so, and no process dies of it; one that does not goes on."""
    with private_shared_memory(1 << 16, full=True) as holder:  # one for both ends, which may meet there
        stage = _joined(holder, stages)
        error = attempt(stage.sync)
        if error is None:
            stage.holds(stage.saved())
            return
        holds(
            not isinstance(error, PeerLostError), "no process dies of a full /dev/shm", "an error of the transport", str(error)
        )
        expect("nothing is served of a sync that failed", 0, stage.state().version)
        stage.trainers[0].apply(_make_room, 1 << 26)
        recovers(stage)


@check("faults", "transport", needs=["transport.plain_processes"], machine=["mount_namespaces"])
def test_an_epoch_that_is_over_leaves_no_names(stages: Stages) -> None:
    """In a /dev/shm of the ends' own, which holds nothing of anybody else: only what the first epoch left stays."""
    with private_shared_memory(1 << 27) as holder:
        stage = _joined(holder, stages)
        left: list[list[str]] = []
        for _ in range(3):
            stage.session.attach()
            for _ in range(2):
                stage.sync()
            stage.session.close()
            left.append(stage.trainers[0].apply(_names))
        holds(len(left[-1]) <= len(left[0]), "files in /dev/shm after three epochs", left[0] or "none", left[-1])


def _joined(holder: int, stages: Stages) -> Stage:
    """A trainer and an engine in the /dev/shm that `holder` holds, where they may meet."""
    prepare = {role: functools.partial(join, holder) for role in ("trainer", "generator")}
    return stages.fresh(prepare, model="awkward", bulk_mib=4, trainer={"keep_dtypes": True}, generator={"keep_dtypes": True})


def _names(_host: Any) -> list[str]:
    return sorted(path.name for path in Path(SHARED_MEMORY).iterdir())


@contextmanager
def _pulling(stage: Stage) -> Iterator[Future[Any]]:
    """A pull of the published version, on its way."""
    with stage.syncing(deadline_seconds=1.5, late_seconds=1.0), ThreadPoolExecutor(1) as pool:
        yield pool.submit(lambda: attempt(lambda: stage.session.pull(stage.version)))


def _disturb(stage: Stage, link: Link, fault: str) -> RlbridgeError | None:
    """Pull over a link that is slow enough for it to fail in the middle. The error that the pull ends in."""
    link.narrow(_ENOUGH_MBIT)
    before = link.bytes()[1].received
    with _pulling(stage) as pull:
        while link.bytes()[1].received < before + (1 << 20) and not pull.done():
            time.sleep(0.002)
        _DISTURB[fault](link)
    error: RlbridgeError | None = pull.result()
    return error


def over(link: Link, stages: Stages, *, bulk_mib: int = 4) -> Stage:
    """A trainer in one end of a link and an engine in the other: a sync between them, which has gone over the link."""
    options = stages.triple.claims("transport").over_network(INTERFACE)
    here, there = (functools.partial(enter, end.namespace) for end in link.ends)
    stage = stages.fresh(
        {"trainer": here, "generator": there},
        model="awkward",
        bulk_mib=bulk_mib,
        trainer={"keep_dtypes": True},
        generator={"keep_dtypes": True},
        transport=options or {},
    )
    before = link.bytes()[1].received
    report = stage.sync()
    crossed = link.bytes()[1].received - before
    if crossed < report.bytes and options is not None:
        raise Mismatch(f"a transport that is told {options} sends the bytes over it", f"{report.bytes} bytes", f"{crossed}")
    if crossed < report.bytes:
        not_run("the bytes took a way between two processes of one host: over_network can say how to switch it off")
    return stage


def _make_room(_host: Any, nbytes: int) -> None:
    enlarge(nbytes)
