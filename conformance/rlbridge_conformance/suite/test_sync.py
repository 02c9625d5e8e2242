"""Level sync: the triple as a run uses it, in Ray actors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np

from rlbridge.errors import DirtyError, LayoutError, StaleVersionError
from rlbridge.sync.messages import Nothing, pack
from rlbridge_conformance.checks import Mismatch, check, expect, holds
from rlbridge_conformance.levels import Role
from rlbridge_conformance.members import Member, errors_of
from rlbridge_conformance.probes import no_growth, registrations, usage
from rlbridge_conformance.run import Stages
from rlbridge_conformance.stage import Stage
from rlbridge_conformance.suite.completions import close, joined
from rlbridge_conformance.suite.trainer_stages import publishes_in_place

TOLERANCE = 2e-3
"""Log-probs of a trainer and an engine that compute in float32 differ by less, whatever order each adds in."""

_PROMPTS = [[5, 9, 17, 33, 2, 40, 11, 6, 28, 51, 7, 19, 44, 3, 60, 12], [8, 23, 4, 31], [50, 2, 45], [14, 39, 27, 10, 62, 35]]


@check("sync")
def test_every_sync_brings_the_saved_weights(stages: Stages) -> None:
    stage = _usual(stages)
    for turn in range(5):
        stage.train()
        stage.scramble()
        report = stage.sync()
        expect("the report names the version that was synced", stage.version, report.version)
        saved = stage.saved()
        stage.holds(saved)
        expect(f"sync {turn + 1} moves at least the bytes of the model", True, report.bytes >= _smallest(stage))


@check("sync")
def test_log_probs_are_the_trainers_after_each_sync(stages: Stages) -> None:
    stage = _usual(stages)
    for _ in range(3):
        stage.train()
        stage.sync()
        _agrees(stage)


@check("sync")
def test_an_untied_head_arrives(stages: Stages) -> None:
    stage = stages(model="untied")
    for _ in range(2):
        stage.train()
        stage.sync()
        stage.holds(stage.saved())
        _agrees(stage)


@check("sync")
def test_old_weights_do_not_pass_for_new_ones(stages: Stages) -> None:
    """The control of the log-prob check: without a sync, weights that have moved must show."""
    stage = _usual(stages)
    stage.sync()
    sequences = stage.sequences()
    before = stage.trainer_scores(sequences)
    moved = _train_until(stage, sequences, lambda now: float(np.abs(now - before).max()), 100 * TOLERANCE)
    apart = float(np.abs(stage.trainer_scores(sequences) - stage.engine_scores(sequences)).max())
    holds(
        apart > 50 * TOLERANCE,
        f"log-probs of an engine that holds the old version differ, once the trainer's have moved by {moved:.2g}",
        f"more than {50 * TOLERANCE:.2g} apart",
        f"{apart:.2g}",
    )


@check("sync")
def test_text_is_that_of_a_fresh_engine(stages: Stages) -> None:
    """A to B and back to A: each time as an engine that has just loaded what the trainer exported."""
    stage = _usual(stages)
    stage.sync()
    state = stage.directory / f"state-{stage.version}"
    stage.on_trainers("save_state", str(state))
    first, text_a = _fresh_text(stage)
    _same_text(stage, text_a, "A")
    text_b = text_a
    for _ in range(10):
        stage.train()
        _, text_b = _fresh_text(stage)
        if text_b != text_a:
            break
    if text_b == text_a:
        raise Mismatch("training moves the greedy text of at least one prompt", "another text within 10 steps", text_a)
    stage.sync()
    _same_text(stage, text_b, "B, after A")
    stage.on_trainers("load_state", str(state))
    stage.sync()
    _same_text(stage, text_a, f"A, after B (exported to {first})")


@check("sync")
def test_a_cached_prompt_is_computed_anew(stages: Stages) -> None:
    """Seen by generation, its text and its log-probs: a score bypasses a prefix cache."""
    stage = _usual(stages)
    stage.sync()
    for _ in range(2):
        old = [c.token_ids for c in stage.generate(_PROMPTS)]
    for _ in range(10):
        stage.train()
        _, fresh = _fresh_text(stage)
        if fresh != old:
            break
    stage.sync()
    what = "the new version, for prompts that were cached under the old one"
    for index in range(len(stage.engines)):
        said = stage.generate(_PROMPTS, index, temperature=1.0, seed=1)
        close(stage, joined(_PROMPTS, said), said, what, index)
    _same_text(stage, fresh, what)


@check("sync")
def test_a_sync_of_the_same_weights_changes_nothing(stages: Stages) -> None:
    stage = _usual(stages)
    stage.train()
    stage.sync()
    before, text = stage.served(), stage.generate(_PROMPTS)
    stage.sync()
    expect("the bytes served are those of before", True, before == stage.served())
    expect("the text is that of before", [c.token_ids for c in text], [c.token_ids for c in stage.generate(_PROMPTS)])
    expect("the version is the new one", stage.version, stage.state().version)


@check("sync")
def test_versions_only_grow(stages: Stages) -> None:
    stage = _usual(stages)
    for _ in range(2):
        stage.sync()
        expect("every engine is at the version of the sync", [stage.version] * len(stage.engines), _versions(stage))
    for version in (stage.version, stage.version - 1):
        error = errors_of(lambda version=version: stage.session.sync(version))  # type: ignore[misc]
        expect(f"version {version} is refused after {stage.version}", StaleVersionError.__name__, type(error).__name__)
    expect("a refused version changes nothing", [stage.version] * len(stage.engines), _versions(stage))
    stage.sync()
    stage.holds(stage.saved())


@check("sync")
def test_every_token_carries_its_version(stages: Stages) -> None:
    stage = _usual(stages)
    for _ in range(2):
        stage.sync()
        for engine in range(len(stage.engines)):
            for completion in stage.generate(_PROMPTS, engine):
                expect("there is a version for each token", len(completion.token_ids), len(completion.versions))
                expect("every token is of the version served", {stage.version}, set(completion.versions))


@check("sync")
def test_a_torn_engine_serves_nothing(stages: Stages) -> None:
    stage = _usual(stages)
    stage.sync()
    stage.scramble()
    for index, engine in enumerate(stage.engines):
        expect(f"{engine.name} is dirty after a scramble", "dirty", stage.state(index).state)
        error = errors_of(lambda index=index: stage.generate(_PROMPTS, index))  # type: ignore[misc]
        expect(f"{engine.name} refuses to generate", DirtyError.__name__, type(error).__name__)
        error = errors_of(lambda index=index: stage.engine_scores(stage.sequences(), index))  # type: ignore[misc]
        expect(f"{engine.name} refuses to score", DirtyError.__name__, type(error).__name__)
    stage.sync()
    _agrees(stage)


@check("sync")
def test_training_right_after_a_publish_does_not_show(stages: Stages) -> None:
    stage = _usual(stages)
    stage.train()
    stage.version += 1
    stage.session.publish(stage.version)
    saved = stage.saved()
    stage.train(2)
    stage.session.pull(stage.version)
    stage.train()
    stage.session.install(stage.version)
    stage.holds(saved)


@check("sync", needs=["trainer.live_storage", "transport.live_storage"])
def test_weights_that_are_read_in_place_are_those_published(stages: Stages) -> None:
    """Parts of rows, as an engine of several ranks may take them, do not lie in one piece: they may be refused."""
    stage = _usual(stages)
    several = len(stage.engines[0].party.call("live_digests", msgspec.msgpack.encode([pack(Nothing())])).result(60)) > 1
    with stage.another_session(publish="barrier"):
        error = errors_of(stage.session.attach)
    if error is None or not several:
        publishes_in_place(stage)
        return
    expect("parts of rows are refused when the epoch begins", LayoutError.__name__, type(error).__name__)
    expect("by a publisher, with the tensor's name", {"peer", "tensor"}, {"peer", "tensor"} & set(error.where))
    stage.scramble()
    stage.sync()
    stage.holds(stage.saved())


@check("sync")
def test_fifty_syncs_leave_nothing_behind(stages: Stages) -> None:
    stage = _usual(stages)
    for _ in range(10):
        stage.sync()
    members = [*stage.trainers, *stage.engines]
    before = {m.name: m.apply(usage) for m in members}
    for _ in range(50):
        stage.sync()
    for member in members:
        no_growth(member.name, before[member.name], functools.partial(member.apply, usage), "syncs", 50)


@check("sync")
def test_nothing_is_registered_after_the_first_sync(stages: Stages) -> None:
    stage = _usual(stages)
    stage.sync()
    count = stage.triple.claims("transport").registrations
    roles: list[tuple[Member, Role]] = [(m, "trainer") for m in stage.trainers] + [(m, "generator") for m in stage.engines]
    before = [m.apply(registrations, role, count) for m, role in roles]
    for _ in range(4):
        stage.train()
        stage.sync()
    for (member, role), was in zip(roles, before, strict=True):
        now = member.apply(registrations, role, count)
        expect(f"{member.name} goes on with the transports of the epoch's start", [i for i, _ in was], [i for i, _ in now])
        expect(f"{member.name} registers no more memory", [held for _, held in was], [held for _, held in now])


def _usual(stages: Stages) -> Stage:
    """Two ranks and two engines where the backends can, in which most checks of the level play."""
    ranks = 2 if stages.triple.claims("trainer").claims("multi_rank") else 1
    engines = 2 if stages.triple.claims("generator").claims("several_engines") else 1
    return stages(ranks=ranks, engines=engines)


def _agrees(stage: Stage) -> None:
    sequences = stage.sequences()
    wanted = stage.trainer_scores(sequences)
    for index, engine in enumerate(stage.engines):
        apart = float(np.abs(wanted - stage.engine_scores(sequences, index)).max())
        holds(
            apart < TOLERANCE,
            f"log-probs of {engine.name} are those of the trainer, after version {stage.version}",
            f"less than {TOLERANCE:g} apart",
            f"{apart:.3g}",
        )


def _train_until(stage: Stage, sequences: Any, distance: Callable[[Any], float], enough: float) -> float:
    for _ in range(20):
        stage.train()
        moved = distance(stage.trainer_scores(sequences))
        if moved > enough:
            return moved
    raise Mismatch("training moves the trainer's log-probs", f"more than {enough:g} in 20 steps", f"{moved:.3g}")


def _fresh_text(stage: Stage) -> tuple[str, list[list[int]]]:
    """What an engine says that has just loaded what the trainer exports now."""
    path = stage.save()
    return path.name, stage.fresh_text(path, _PROMPTS)


def _same_text(stage: Stage, wanted: list[list[int]], which: str) -> None:
    for index, engine in enumerate(stage.engines):
        got = [c.token_ids for c in stage.generate(_PROMPTS, index)]
        expect(f"the greedy text of {engine.name} is that of a fresh engine with {which}", wanted, got)


def _versions(stage: Stage) -> list[int]:
    return [stage.state(index).version for index in range(len(stage.engines))]


def _smallest(stage: Stage) -> int:
    return sum(t.numel() for t in stage.saved().values())
