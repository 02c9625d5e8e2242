"""Level sync, the protocol of session, publishers and engines: what each end refuses, by calls that a session never makes."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import msgspec

from rlbridge.errors import DigestError, DirtyError, LeaseError, QuarantineError, StaleVersionError, SyncError
from rlbridge.roles.batch import Completion, Sampling, encode
from rlbridge.sync.calls import Party
from rlbridge.sync.messages import Acknowledge, Digests, Publish, Pull, Update, Wait, answer, pack, result
from rlbridge_conformance.checks import check, expect, holds
from rlbridge_conformance.disturbed import has_ranks_inside
from rlbridge_conformance.inside import spoil_the_next_install
from rlbridge_conformance.members import Member, errors_of
from rlbridge_conformance.run import Stages
from rlbridge_conformance.stage import Stage

_PROMPTS = [[5, 9, 17], [8, 23, 4, 31], [50, 2, 45]]


@check("sync")
def test_a_publisher_refuses_an_old_version(stages: Stages) -> None:
    stage = _synced(stages)
    for version in (stage.version, stage.version - 1):
        for trainer in stage.trainers:
            _refuses(trainer, "publish", Publish(version, []), StaleVersionError)
    _goes_on(stage)


@check("sync")
def test_an_engine_rank_refuses_an_old_version(stages: Stages) -> None:
    stage = _synced(stages)
    for version in (stage.version, stage.version - 1):
        for engine in stage.engines:
            _refuses(engine, "start_pull", Pull(version, 0, 1.0), StaleVersionError)
    stage.session.attach()
    _goes_on(stage)


@check("sync")
def test_an_engine_refuses_an_old_version(stages: Stages) -> None:
    stage = _synced(stages)
    text = _text(stage)
    for version in (stage.version, stage.version - 1):
        for index, engine in enumerate(stage.engines):
            _refuses(engine, "update", Update(version, 1.0), StaleVersionError)
            expect(f"{engine.name} goes on serving", "ready", stage.state(index).state)
    expect("it says what it said before", text, _text(stage))


@check("sync")
def test_calls_of_another_epoch_are_refused(stages: Stages) -> None:
    stage = _synced(stages)
    later, other = stage.version + 1, "another.1"
    for trainer in stage.trainers:
        _refuses(trainer, "publish", Publish(later, [], other), SyncError)
    for engine in stage.engines:
        _refuses(engine, "start_pull", Pull(later, 0, 1.0, other), SyncError)
    _goes_on(stage)


@check("sync")
def test_a_failed_update_is_not_served(stages: Stages) -> None:
    stage = _synced(stages)
    for index, engine in enumerate(stage.engines):
        _refuses(engine, "update", Update(stage.version + 1, 1.0), SyncError)
        expect(f"{engine.name} is dirty after an update that failed", "dirty", stage.state(index).state)
        refused = errors_of(lambda index=index: stage.generate(_PROMPTS, index))  # type: ignore[misc]
        expect(f"{engine.name} refuses to generate", DirtyError.__name__, type(refused).__name__)
    _goes_on(stage)


@check("sync")
def test_bytes_that_are_not_those_published_are_not_installed(stages: Stages) -> None:
    stage = _synced(stages)
    text, served = _text(stage), stage.version
    stage.session.close()  # its parties take part in one session at a time
    session = stage.session_with()
    session.trainers = [_Misquoting(party) for party in session.trainers]
    stage.version += 1
    stage.train()
    error = errors_of(lambda: session.sync(stage.version))
    expect("bytes that are not those of the digests are refused", DigestError.__name__, type(error).__name__)
    for index, engine in enumerate(stage.engines):
        state = stage.state(index)
        expect(f"{engine.name} goes on with what it had", ("ready", served), (state.state, state.version))
    expect("it says what it said before", text, _text(stage))
    session.close()
    stage.session.attach()
    _goes_on(stage)


@check("sync", needs=["generator.ranks_inside"])
def test_weights_that_are_not_those_published_are_not_served(stages: Stages) -> None:
    """An element changes between the install and the check of the live parameters."""
    stage = _synced(stages)
    has_ranks_inside(stage.engines[0].apply(spoil_the_next_install))
    stage.train()
    error = errors_of(stage.sync)
    expect("live parameters that are not those published are refused", DigestError.__name__, type(error).__name__)
    expect(f"{stage.engines[0].name} is dirty", "dirty", stage.state().state)
    _goes_on(stage)


@check("sync")
def test_what_is_published_is_kept_until_it_is_acknowledged(stages: Stages) -> None:
    stage = _synced(stages)
    for _ in range(2):
        _publish(stage)
    _is_leased(stage)
    _goes_on(stage)


@check("sync")
def test_an_acknowledgement_is_of_one_version(stages: Stages) -> None:
    stage = _synced(stages)
    for _ in range(2):
        _publish(stage)
    _acknowledge(stage, _sinks(stage))
    _is_leased(stage)
    _goes_on(stage)


@check("sync", needs=["generator.several_engines"])
def test_what_is_published_is_kept_until_all_have_it(stages: Stages) -> None:
    stage = _synced(stages)
    _publish(stage)
    _acknowledge(stage, _sinks(stage)[1:])
    _publish(stage)
    _acknowledge(stage, _sinks(stage))
    _is_leased(stage)
    _goes_on(stage)


@check("sync")
def test_an_arena_of_an_unfinished_transfer_is_not_used(stages: Stages) -> None:
    stage = _synced(stages)
    stage.session.attach()
    _publish(stage)
    (engine, *_) = stage.engines
    _tell(engine, "start_pull", Pull(stage.version, 0, 0.0))
    unfinished = errors_of(lambda: _tell(engine, "wait_pull", Wait(stage.version, 1.0))) is not None
    if unfinished:  # some transports are done in no time at all
        _refuses(engine, "start_pull", Pull(stage.version, 0, 5.0), QuarantineError)
    stage.session.attach()
    _goes_on(stage)


@check("sync")
def test_an_update_ends_its_pause(stages: Stages) -> None:
    stage = _synced(stages)
    for engine in stage.engines:
        packed = encode(Sampling(max_tokens=4, temperature=0.0))
        said = engine.ask("generate", list[Completion], _PROMPTS, packed, seconds=20.0)
        expect(f"{engine.name} answers each prompt after an update", len(_PROMPTS), len(said))


class _Misquoting:
    """A trainer rank whose digests differ by a bit from those of what it has published."""

    actor = None

    def __init__(self, party: Party) -> None:
        self.name, self.actor, self._party = party.name, party.actor, party

    def call(self, method: str, payload: bytes, tensors: dict[str, Any] | None = None) -> Future[list[bytes]]:
        begun = self._party.call(method, payload, tensors)
        if method != "digests":
            return begun
        told = result(begun.result(60)[0], Digests)
        changed: Future[list[bytes]] = Future()
        changed.set_result([answer(lambda: Digests(bytes([told.joined[0] ^ 1]) + told.joined[1:], told.seconds))])
        return changed

    def tensors(self, version: int, slot: int, sink: str, tensor_transport: str | None) -> Any:
        return self._party.tensors(version, slot, sink, tensor_transport)


def _synced(stages: Stages) -> Stage:
    """The stage of all of these checks, two of each where the backends can, just given weights that they had not."""
    ranks = 2 if stages.triple.claims("trainer").claims("multi_rank") else 1
    engines = 2 if stages.triple.claims("generator").claims("several_engines") else 1
    stage = stages(ranks=ranks, engines=engines)
    stage.train()
    stage.sync()
    return stage


def _tell(member: Member, method: str, message: object) -> None:
    """Make a call as the session would; an engine's ranks are given a list."""
    packed = pack(message)
    of_ranks = member.name.startswith("generator") and method != "update"
    for reply in member.party.call(method, msgspec.msgpack.encode([packed]) if of_ranks else packed).result(60):
        result(reply, msgspec.Raw)


def _refuses(member: Member, method: str, message: object, kind: type[SyncError]) -> None:
    error = errors_of(lambda: _tell(member, method, message))
    holds(isinstance(error, kind), f"{member.name} refuses {message}", kind.__name__, repr(error))


def _publish(stage: Stage) -> None:
    stage.version += 1
    stage.session.publish(stage.version)


def _sinks(stage: Stage) -> list[str]:
    assert stage.session.attached is not None
    return list(stage.session.attached.sinks)


def _acknowledge(stage: Stage, sinks: list[str]) -> None:
    for trainer in stage.trainers:
        _tell(trainer, "acknowledge", Acknowledge(stage.version, sinks))


def _is_leased(stage: Stage) -> None:
    error = errors_of(lambda: _publish(stage))
    expect("no version takes the place of one that is being read", LeaseError.__name__, type(error).__name__)


def _text(stage: Stage) -> list[list[int]]:
    return [completion.token_ids for completion in stage.generate(_PROMPTS)]


def _goes_on(stage: Stage) -> None:
    """Leave the stage as it was: another sync brings what the trainer has."""
    stage.train()
    stage.sync()
    stage.holds(stage.saved())
