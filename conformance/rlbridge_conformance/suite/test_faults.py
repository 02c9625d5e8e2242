"""Level faults: real signals to real processes, lost messages, flipped bits. Nothing torn is served, and syncs recover."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from rlbridge.errors import DigestError, RlbridgeError
from rlbridge_conformance.checks import Mismatch, check, expect, holds
from rlbridge_conformance.disturbed import (
    LIMIT_SECONDS,
    PATIENCE,
    attempt,
    has_ranks_inside,
    named,
    recovers,
    serving,
    short,
    too_short,
    whole,
)
from rlbridge_conformance.faults.signals import send
from rlbridge_conformance.faults.tripwire import Deaf, Moment, Tripwire, in_place_of
from rlbridge_conformance.probes import flip_staged, pulling, staged_digests, subscribed, unsettled
from rlbridge_conformance.reference.rank_processes import rank_pids
from rlbridge_conformance.run import Stages
from rlbridge_conformance.stage import Stage

PHASES = {
    "plan": ("generator[0]", "record"),
    "register": ("generator[0]", "open"),
    "connect": ("generator[0]", "connect"),
    "snapshot": ("trainer[1]", "publish"),
    "wire": ("generator[0]", "wait_pull"),
    "verify": ("generator[0]", "verify"),
    "install": ("generator[0]", "update"),
}
"""Each phase of a sync: whose call of what it is."""

VICTIMS = {"trainer": "trainer[1]", "generator": "generator[0]", "rank": "generator[0].rank[1]"}
"""A trainer rank, a generator's own process, and an engine rank in a process of its own, as serving engines have them."""

MOMENTS: tuple[Moment, ...] = ("before", "during", "after")
SIGNALS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}


def _matrix() -> list[Any]:
    """Every case but one of two that are the same: after a phase is before the next one, for all but the last."""
    cases = []
    for phase in PHASES:
        for moment in MOMENTS:
            if moment != "after" or phase == "install":
                cases += [pytest.param(phase, moment, how, id=f"{how}-{moment}-{phase}") for how in SIGNALS]
    return cases


@check("faults", "transport", needs=["transport.plain_processes"])
@pytest.mark.parametrize(("phase", "moment", "how"), _matrix())
@pytest.mark.parametrize("victim", VICTIMS)
def test_a_process_is_lost(stages: Stages, victim: str, phase: str, moment: Moment, how: str) -> None:
    """Killed or stopped, at every moment of a sync."""
    alone = {"ranks": 2, "engines": 1, "generator": {"tp": 2, "rank_processes": True}}
    for patience in PATIENCE:
        stage = stages(**alone) if victim == "rank" else _crowd(stages)
        if lose(stage, VICTIMS[victim], phase, moment, how, patience):
            return


def _crowd(stages: Stages) -> Stage:
    """Two trainer ranks and two engines; a tensor that takes a while."""
    return stages(
        ranks=2, engines=2, model="awkward", bulk_mib=4, trainer={"keep_dtypes": True}, generator={"keep_dtypes": True}
    )


def lose(stage: Stage, name: str, phase: str, moment: Moment, how: str, patience: float) -> bool:
    """One case; whether it has shown anything."""
    old = serving(stage)
    stage.train()
    new, state = stage.saved(), stage.directory / f"state-{stage.version}"
    stage.on_trainers("save_state", str(state))
    owner = name.partition(".")[0]
    pid = stage.member(owner).pid if name == owner else stage.engines[0].apply(rank_pids)[1]
    whose, method = PHASES[phase]
    wire = Tripwire(stage.member(whose).party, method, moment, lambda: send(pid, SIGNALS[how]), _half(stage, phase))
    if phase in ("plan", "register", "connect"):
        stage.session.replace(stage.trainers[0].party)  # by itself: the sync begins a new epoch
    error = _disturbed(stage, wire, patience)
    shown = not too_short(error, owner, patience)
    if error is not None and shown:
        named(error, owner)
    elif shown and not wire.tripped.wait(5):
        raise Mismatch(f"the sync calls {method} of {whose}", "a call", "none")
    others = [m for m in stage.engines if m.name != owner]
    whole(stage, others, old, new)
    if how == "killed":
        stage.replace(owner)
        stage.on_trainers("load_state", str(state))
    else:
        send(pid, signal.SIGCONT)
        whole(stage, stage.engines, old, new)
    recovers(stage)
    return shown


def _half(stage: Stage, phase: str) -> float:
    """Half of what the phase took in the sync before; what has no measure of its own is short."""
    attached = stage.session.attached
    measured = {**(attached.phases if attached else {}), **stage.reports[-1].phases}
    return measured.get(phase, 0.002) / 2


def _disturbed(stage: Stage, party: Tripwire | Deaf, patience: float = PATIENCE[0]) -> RlbridgeError | None:
    """A sync with short deadlines through `party`: the error that it ends in, if it does."""
    with short(stage, patience), in_place_of(stage.session, party):
        return attempt(stage.sync)


@check("faults", "transport", needs=["transport.plain_processes"])
@pytest.mark.parametrize("lost", ["call", "answer"])
@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("trainer[1]", "open"),
        ("trainer[1]", "publish"),
        ("trainer[1]", "send"),
        ("trainer[1]", "acknowledge"),
        ("generator[0]", "connect"),
        ("generator[0]", "start_pull"),
        ("generator[0]", "verify"),
        ("generator[0]", "update"),
    ],
)
def test_a_message_is_lost(stages: Stages, name: str, method: str, lost: Any) -> None:
    for patience in PATIENCE:
        if _lose_message(_crowd(stages), name, method, lost, patience):
            return


def _lose_message(stage: Stage, name: str, method: str, lost: Any, patience: float) -> bool:
    """One case; whether it has shown anything."""
    old = serving(stage)
    stage.train()
    new = stage.saved()
    if method in ("open", "connect"):
        stage.session.replace(stage.trainers[0].party)  # by itself: the sync begins a new epoch
    error = _disturbed(stage, Deaf(stage.member(name).party, method, lost), patience)
    shown = not too_short(error, name, patience)
    if error is None:
        raise Mismatch(f"a sync whose {method} of {name} is lost ends in an error", "DeadlineError", "success")
    if shown:
        named(error, name)
    whole(stage, stage.engines, old, new)
    if shown and method not in ("acknowledge", "update"):  # no engine was told that it has the version: it may be sent again
        stage.session.sync(stage.version)
        stage.holds(new)
    recovers(stage)
    return shown


@check("faults", needs=["transport.plain_processes", "generator.ranks_inside"])
@pytest.mark.parametrize("before", ["verify", "update"])
def test_a_bit_flips_in_the_staging_arena(stages: Stages, before: str) -> None:
    """After the bytes have arrived, and again after they have been verified: they are not served, or not for long."""
    stage = stages()
    old = serving(stage)
    stage.train()
    engine = stage.engines[0]
    has_ranks_inside(engine.apply(subscribed))
    with in_place_of(stage.session, Tripwire(engine.party, before, "before", lambda: engine.apply(flip_staged))):
        error = attempt(stage.sync)
    expect("the sync ends in an error", DigestError.__name__, type(error).__name__)
    holds("tensor" in getattr(error, "where", {}), "the error names the tensor", "a tensor", str(error))
    whole(stage, stage.engines, old, stage.saved())
    recovers(stage)


@check("faults", "transport", needs=["transport.plain_processes"])
def test_a_receive_ends_though_a_source_has_stopped(stages: Stages) -> None:
    stage = _crowd(stages)
    serving(stage)
    victim = stage.trainers[1]
    try:
        _disturbed(stage, Tripwire(stage.engines[0].party, "start_pull", "before", lambda: victim.signal(signal.SIGSTOP)))
        left = _eventually_none(stage, pulling)
    finally:
        victim.signal(signal.SIGCONT)
    expect("transfers of each engine that go on past their deadline, while a source is stopped", [0] * len(stage.engines), left)
    recovers(stage)


@check("faults", "transport", needs=["transport.plain_processes"])
def test_nothing_is_written_once_a_transfer_is_settled(stages: Stages) -> None:
    """A deadline in the middle of a transfer: what the transport calls settled stays as it is, whoever goes on elsewhere."""
    stage = stages(ranks=2, model="awkward", bulk_mib=32, trainer={"keep_dtypes": True}, generator={"keep_dtypes": True})
    old = serving(stage)
    stage.train()
    stage.version += 1
    stage.session.publish(stage.version)
    with stage.syncing(deadline_seconds=0.002, late_seconds=5.0):
        attempt(lambda: stage.session.pull(stage.version))
    _eventually_none(stage, pulling)
    _eventually_none(stage, unsettled)
    before = stage.engines[0].apply(staged_digests)
    time.sleep(0.3)
    expect("the arenas of transfers that are settled", before, stage.engines[0].apply(staged_digests))
    whole(stage, stage.engines, old)
    recovers(stage)


def _eventually_none(stage: Stage, count: Callable[[Any], int]) -> list[int]:
    """What `count` comes to in each engine, when it no longer changes or after a while."""
    limit = time.monotonic() + LIMIT_SECONDS / 4
    while any(found := [engine.apply(count) for engine in stage.engines]) and time.monotonic() < limit:
        time.sleep(0.02)
    return found
