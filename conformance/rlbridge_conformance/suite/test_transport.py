"""The contract of a transport: every byte of every version, from any number of ranks to any number, and nothing else."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from rlbridge.errors import ConfigError, DigestError
from rlbridge.plugins import registry
from rlbridge.roles.transport import Transport, TransportOptions
from rlbridge.sync.messages import TransportSpec
from rlbridge.sync.report import SyncReport
from rlbridge_conformance import by_hand
from rlbridge_conformance.by_hand import ByHand, copies
from rlbridge_conformance.checks import check, expect, holds
from rlbridge_conformance.members import errors_of
from rlbridge_conformance.probes import no_growth, registrations, usage
from rlbridge_conformance.run import Stages
from rlbridge_conformance.stage import Stage

_SIZES = (1, 2, 3, 5, 7, 63, 64, 65, 127, 129, 1023, 1025, 4095, 4097)
_AWKWARD: dict[str, Any] = {"model": "awkward", "generator": {"keep_dtypes": True}}
_WATCH_SECONDS = 0.3
"""How long memory is watched that nobody should write any more."""


# Bytes


@check("contract", "transport")
@pytest.mark.parametrize(
    ("ranks", "tp", "engines"), [(1, 1, 1), (1, 2, 1), (2, 1, 2), (3, 1, 1), (3, 2, 1), (2, 1, 1), (2, 2, 1)]
)
def test_every_byte_arrives(stages: Stages, ranks: int, tp: int, engines: int) -> None:
    if tp > _ranks_of_an_engine(stages):
        pytest.skip("not claimed by the transport: plain_processes, as the ranks of an engine are that live in one actor")
    stage = stages(ranks=ranks, engines=engines, generator={"tp": tp})
    stage.session.attach()
    for _ in range(2):
        _arrives(stage)


@check("contract", "transport", needs=["transport.live_storage"])
def test_weights_that_are_read_in_place_arrive(stages: Stages) -> None:
    """Out of the parameters themselves: many blocks, and for each version the same ones."""
    stage = stages(ranks=2, engines=1, generator={"tp": 1})
    with stage.another_session(publish="barrier"):
        for _ in range(3):
            stage.train()
            _arrives(stage)


@check("contract", "transport")
def test_each_of_six_versions_is_its_own(stages: Stages) -> None:
    """The sources' two buffers take turns; what stays in one of them, or comes out of the other, shows."""
    stage = _usual(stages)
    before: Mapping[str, torch.Tensor] = {}
    for _ in range(6):
        stage.train()
        _arrives(stage)
        saved = stage.saved()
        expect("training has changed every tensor", [], [n for n in before if torch.equal(before[n], saved[n])])
        before = saved


@check("contract", "transport")
def test_copies_of_any_size_arrive(stages: Stages) -> None:
    """Odd ones, at odd offsets, neighbours of one another."""
    stage = _usual(stages)
    with copies(by_hand.shredded(_SIZES)):
        attached = stage.session.attach()
    holds(attached.copies > 4 * len(_SIZES), "the copies are cut small", f"more than {4 * len(_SIZES)}", attached.copies)
    for _ in range(2):
        stage.train()
        _arrives(stage)


@check("contract", "transport")
def test_nothing_is_written_between_the_copies(stages: Stages) -> None:
    stage = stages(trainer={"keep_dtypes": True}, **_AWKWARD)
    with copies(by_hand.one_a_tensor):
        stage.session.attach()
    engine = stage.engines[0]
    for _ in range(2):
        wide = engine.apply(by_hand.paint_gaps)
        holds(wide > 0, "there is memory between the tensors, for the check to look at", "some bytes", wide)
        stage.train()
        _arrives(stage)
        expect("bytes between the copies that are as they were", wide, engine.apply(by_hand.painted_gaps))


@check("contract", "transport")
def test_a_single_changed_bit_arrives(stages: Stages) -> None:
    """Two versions that differ nowhere else: nothing may be left out because it looks as before."""
    stage = _usual(stages)
    name = "model.layers.0.mlp.gate_proj.weight"
    for _ in range(2):
        _arrives(stage)
    before = stage.saved()
    for trainer in stage.trainers:
        trainer.apply(by_hand.flip_weight, name)
    after = stage.saved()
    changed = {n: int((before[n] != after[n]).sum()) for n in before if not torch.equal(before[n], after[n])}
    expect("one element has changed, of all that the trainer saves", {name: 1}, changed)
    _arrives(stage)


# Versions


@check("contract", "transport")
def test_what_was_published_arrives_though_training_goes_on(stages: Stages) -> None:
    stage = _usual(stages)
    for _ in range(2):
        stage.version += 1
        stage.session.publish(stage.version)
        saved = stage.saved()
        stage.train(2)
        expect("training has changed the weights", False, _same(saved, stage.saved()))
        stage.session.pull(stage.version)
        stage.train()
        stage.session.install(stage.version)
        stage.holds(saved)


@check("contract", "transport")
def test_a_version_is_whole_though_the_next_one_is_published(stages: Stages) -> None:
    """While the first is on its way: both come, each out of its own buffer."""
    stage = _usual(stages)
    hand = ByHand(stage)
    first, saved = hand.publish(), stage.saved()
    hand.begin(first)
    stage.train()
    second, newer = hand.publish(), stage.saved()
    for flight, wanted in ((first, saved), (second, newer)):
        if flight is second:
            hand.begin(second)
        hand.arrive(flight)
        hand.verify(flight)
        hand.install(flight)
        stage.holds(wanted)


@check("contract", "transport")
def test_nothing_is_written_once_receive_has_returned(stages: Stages) -> None:
    stage = _usual(stages)
    hand = ByHand(stage)
    flight = hand.publish()
    hand.begin(flight)
    hand.arrive(flight)
    hand.verify(flight)
    nbytes = [engine.apply(by_hand.paint_arenas) for engine in stage.engines]
    stage.train()
    hand.publish()
    time.sleep(_WATCH_SECONDS)
    expect(
        "bytes of the arenas that are as they were left", nbytes, [engine.apply(by_hand.painted) for engine in stage.engines]
    )


@check("contract", "transport")
def test_flipped_bytes_are_not_served(stages: Stages) -> None:
    """And the version may be sent again, in an epoch of its own, with other bytes."""
    stage = _usual(stages)
    stage.sync()
    saved, version = stage.saved(), stage.version
    stage.train()
    hand = ByHand(stage)
    flight = hand.publish()
    digests = hand.digests(flight)
    stage.trainers[0].apply(by_hand.flip_published, flight.slot)
    hand.begin(flight)
    hand.arrive(flight)
    error = errors_of(lambda: hand.verify(flight, digests))
    expect("bytes that are not those published are refused", DigestError.__name__, type(error).__name__)
    stage.holds(saved)
    expect("the engine is at the version before", ("ready", version), (stage.state().state, stage.state().version))
    stage.version -= 1
    stage.train()
    stage.session.attach()
    _arrives(stage)
    expect("the version is the one that was refused", flight.version, stage.state().version)


# What it says of itself


@check("contract", "transport")
def test_receive_counts_what_arrived(stages: Stages) -> None:
    stage = _usual(stages)
    with copies(by_hand.one_a_tensor):
        attached = stage.session.attach()
    for _ in range(2):
        expect("the bytes received are those of the copies", attached.bytes, stage.sync().bytes)


@check("contract", "transport")
def test_the_evidence_is_no_less_than_what_arrived(stages: Stages) -> None:
    """A wire with a name ("unknown" is one), how it is known, and a count of bytes since the epoch began."""
    stage = _usual(stages)
    moved = 0
    for _ in range(3):
        stage.train()
        report = stage.sync()
        moved += report.bytes
        _evident(report, moved)


def _evident(report: SyncReport, moved: int) -> None:
    holds(bool(report.evidence), "an end of the wire says what carried the bytes", "a wire with a name", "none")
    for evidence in report.evidence:
        for what in ("backend", "wire", "known_from"):
            holds(bool(getattr(evidence, what).strip()), f"the evidence has words for {what}", "a text", repr(evidence))
    claimed = sum(evidence.bytes_moved for evidence in report.evidence)
    holds(claimed >= moved, "the evidence counts the bytes of all versions of the epoch", f"{moved} or more", claimed)


@check("contract", "transport")
def test_memory_is_registered_once_an_epoch(stages: Stages) -> None:
    stage = _usual(stages)
    stage.sync()
    claims: Any = stage.triple.claims("transport")
    members = [(m, "trainer") for m in stage.trainers] + [(m, "generator") for m in stage.engines]
    before = [member.apply(registrations, role, claims.registrations) for member, role in members]
    for _ in range(2):
        stage.train()
        stage.sync()
    for (member, role), was in zip(members, before, strict=True):
        now = member.apply(registrations, role, claims.registrations)
        expect(f"{member.name} goes on with the transports of the epoch's start", [i for i, _ in was], [i for i, _ in now])
        expect(f"{member.name} registers no more memory", [held for _, held in was], [held for _, held in now])


@check("contract", "transport")
def test_why_it_is_unavailable_is_a_sentence(stages: Stages) -> None:
    for device in ("cpu", "cuda"):
        said = [_class(stages).unavailable(_options(stages), device) for _ in range(2)]
        holds(
            all(word is None or (isinstance(word, str) and word.strip()) for word in said),
            f"why it cannot work on {device} is None, or a text that says so",
            "None or a text",
            repr(said[0]),
        )
        expect(f"it says the same of {device} when it is asked again", said[0], said[1])


@check("contract", "transport")
def test_unknown_transport_options_are_refused(stages: Stages) -> None:
    options = _options(stages)
    holds(isinstance(options, TransportOptions), "its options model is one of a transport", "TransportOptions", type(options))
    unknown = {**stages.triple.transport.options, "no_transport_has_this_option": 1}
    error = errors_of(lambda: stages.triple.validated("transport", unknown))
    expect("an option that it does not know is refused", ConfigError.__name__, type(error).__name__)


@check("contract", "transport")
def test_transport_options_cross_processes(stages: Stages) -> None:
    """As JSON: that is how each rank gets them."""
    options = _options(stages)
    again = stages.triple.validated("transport", options.model_dump(mode="json"))
    expect("the options are the same on the other side", repr(options), repr(again))


# Epochs


@check("contract", "transport")
def test_an_end_without_copies_has_nothing_to_do(stages: Stages) -> None:
    """A rank that owns nothing, or needs nothing, is part of the epoch all the same."""
    stage = _usual(stages)
    expect("tensors that a source without copies gives", 0, stage.trainers[0].apply(by_hand.idle_source, _spec(stage)))
    expect("bytes that a sink without copies gets", (0, True), stage.engines[0].apply(by_hand.idle_sink, _spec(stage)))


@check("contract", "transport")
def test_an_end_closes_that_was_never_connected(stages: Stages) -> None:
    """An epoch may end before it has begun, because of another party."""
    stage = _usual(stages)
    stage.trainers[0].apply(by_hand.open_and_close, _spec(stage), "source")
    stage.engines[0].apply(by_hand.open_and_close, _spec(stage), "sink")


@check("contract", "transport")
def test_a_replaced_trainer_rank_is_found(stages: Stages) -> None:
    stage = _usual(stages)
    _arrives(stage)
    state = str(stage.directory / f"state-{stage.version}")
    stage.on_trainers("save_state", state)
    stage.replace("trainer[1]")
    stage.on_trainers("load_state", state)
    stage.train()
    _arrives(stage)


@check("contract", "transport")
def test_a_replaced_engine_is_found(stages: Stages) -> None:
    stage = _usual(stages)
    _arrives(stage)
    stage.replace("generator[0]")
    stage.train()
    _arrives(stage)


@check("contract", "transport")
def test_twenty_epochs_leave_nothing_behind(stages: Stages) -> None:
    stage = _usual(stages)
    for _ in range(3):
        _epoch(stage)
    members = [*stage.trainers, *stage.engines]
    before = [member.apply(usage) for member in members]
    for _ in range(20):
        _epoch(stage)
    kept = 20 * stages.triple.claims("transport").descriptors_an_epoch * max(len(stage.trainers), len(stage.engines))
    for member, was in zip(members, before, strict=True):
        no_growth(member.name, was, functools.partial(member.apply, usage), "epochs", 20, descriptors=kept)


@check("contract", "transport")
def test_the_end_of_an_epoch_gives_its_memory_back(stages: Stages) -> None:
    """All of the arenas, and of shared memory what was not there for good after the first epoch."""
    stage = stages.fresh()
    members = {"trainer[0]": stage.trainers[0], "generator[0].rank[0]": stage.engines[0]}
    left: dict[str, int] = {}
    for epoch in range(2):
        attached = stage.session.attach()
        for _ in range(2):
            stage.sync()
        during = {name: member.apply(usage) for name, member in members.items()}
        stage.session.close()
        for name, member in members.items():
            after, arenas = member.apply(usage), attached.arena_bytes[name] * (2 if name.startswith("trainer") else 1)
            freed = during[name].tensors - after.tensors
            holds(freed >= arenas, f"{name}: bytes of tensors that are freed", f"the arenas' {arenas}, or more", freed)
            expect(f"{name}: bytes of shared memory after epoch {epoch}", left.setdefault(name, after.shared), after.shared)


# Other tensors, more engines


@check("contract", "transport")
@pytest.mark.parametrize("kind", ["transposed", "flat", "gathered"])
def test_tensors_of_every_kind_arrive(stages: Stages, kind: str) -> None:
    """A scalar, an empty one, one of int8, half ones and odd ones, however the trainer holds and cuts them."""
    cut = {"contiguous": False} if kind == "transposed" else {"shards": kind}
    stage = stages(ranks=2, trainer={"keep_dtypes": True, **cut}, **_AWKWARD)
    with copies(by_hand.one_a_tensor):
        stage.session.attach()
    for _ in range(2):
        stage.train()
        _arrives(stage)


@check("contract", "transport")
def test_a_large_tensor_arrives(stages: Stages) -> None:
    """Larger than what a transport may move at once, and no multiple of that."""
    stage = stages(bulk_mib=5, trainer={"keep_dtypes": True}, **_AWKWARD)
    stage.session.attach()
    for _ in range(2):
        stage.train()
        _arrives(stage)


@check("contract", "transport")
def test_three_engines_receive_at_once(stages: Stages) -> None:
    stage = stages(engines=3)
    stage.session.attach()
    for _ in range(2):
        stage.train()
        _arrives(stage)


def _usual(stages: Stages) -> Stage:
    """Two trainer ranks, an engine of two ranks, and an epoch that no other check has used: the scene of most checks."""
    stage = stages(ranks=2, engines=1, generator={"tp": _ranks_of_an_engine(stages)})
    stage.session.attach()
    return stage


def _ranks_of_an_engine(stages: Stages) -> int:
    """Two where the transport can. Ray brings its objects to actors, and the reference engine's ranks live in one."""
    return 2 if stages.triple.claims("transport").claims("plain_processes") else 1


def _arrives(stage: Stage) -> None:
    """A sync, after which the engines serve what the trainer saves and nothing of what they had."""
    stage.scramble()
    stage.sync()
    stage.holds(stage.saved())


def _epoch(stage: Stage) -> None:
    stage.session.attach()
    stage.sync()


def _same(saved: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return all(torch.equal(saved[name], other[name]) for name in saved)


def _class(stages: Stages) -> type[Transport[Any]]:
    found: type[Transport[Any]] = registry().load("transport", stages.triple.transport.name)
    return found


def _options(stages: Stages) -> Any:
    return stages.triple.validated("transport", stages.triple.transport.options)


def _spec(stage: Stage) -> TransportSpec:
    return TransportSpec(stage.triple.transport.name, by_hand.transport_options(stage).model_dump(mode="json"))
