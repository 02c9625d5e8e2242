"""What only shows where Ray carries the calls: the object store, and actors that are lost."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import pytest

from rlbridge_conformance.checks import Mismatch, check, holds
from rlbridge_conformance.disturbed import PATIENCE, attempt, named, recovers, serving, short, too_short, whole
from rlbridge_conformance.faults.signals import send
from rlbridge_conformance.faults.tripwire import Tripwire, in_place_of
from rlbridge_conformance.probes import object_store_bytes
from rlbridge_conformance.run import Stages
from rlbridge_conformance.stage import Stage

_SYNCS = 3


@check("sync", ray=True)
def test_no_weights_go_through_the_object_store(stages: Stages) -> None:
    """Unless that is the wire which the report names."""
    stage = stages.fresh(model="wide")
    members = [*stage.trainers, *stage.engines]
    before = {member.name: member.apply(object_store_bytes) for member in members}
    reports = [stage.sync() for _ in range(_SYNCS)]
    if any(evidence.wire == "plasma" for report in reports for evidence in report.evidence):
        return
    for member in members:
        touched = member.apply(object_store_bytes) - before[member.name]
        holds(
            touched < reports[0].bytes / 2,
            f"{member.name} has no weights in Ray's object store, after {_SYNCS} syncs of {reports[0].bytes} bytes",
            "a few bytes of messages",
            f"{touched} bytes more of it in use",
        )


@check("faults", ray=True)
@pytest.mark.parametrize(
    ("name", "method", "of", "how"),
    [
        ("trainer[0]", "wait_pull", "generator[0]", "killed"),
        ("trainer[0]", "publish", "trainer[0]", "stopped"),
        ("generator[0]", "update", "generator[0]", "killed"),
        ("generator[0]", "wait_pull", "generator[0]", "stopped"),
    ],
    ids=["trainer-killed-wire", "trainer-stopped-snapshot", "generator-killed-install", "generator-stopped-wire"],
)
def test_an_actor_is_lost(stages: Stages, name: str, method: str, of: str, how: str) -> None:
    several = stages.triple.claims("generator").claims("several_engines")
    for patience in PATIENCE:
        if _lose(stages(engines=2 if several else 1), name, method, of, how, patience):
            return


def _lose(stage: Stage, name: str, method: str, of: str, how: str, patience: float) -> bool:
    """One case; whether it has shown anything."""
    old = serving(stage)
    stage.train()
    new, state = stage.saved(), stage.directory / f"state-{stage.version}"
    stage.on_trainers("save_state", str(state))
    pid = stage.member(name).pid
    act: Callable[[], Any] = lambda: send(pid, signal.SIGKILL if how == "killed" else signal.SIGSTOP)  # noqa: E731
    with short(stage, patience), in_place_of(stage.session, Tripwire(stage.member(of).party, method, "before", act)):
        error = attempt(stage.sync)
    shown = not too_short(error, name, patience)
    if error is None:
        raise Mismatch(f"a sync in which {name} is {how} ends in an error", "an error that names it", "success")
    if shown:
        named(error, name)
    whole(stage, [engine for engine in stage.engines if engine.name != name], old, new)
    if how == "killed":
        stage.replace(name)
        stage.on_trainers("load_state", str(state))
    else:
        send(pid, signal.SIGCONT)
        whole(stage, stage.engines, old, new)
    recovers(stage)
    return shown
