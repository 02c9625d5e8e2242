"""Level contract, the generator: what it asks of a trainer, and that it serves what it was given."""

from __future__ import annotations

import filecmp
import functools
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from typing import Any

import msgspec
import numpy as np
import pytest

from rlbridge.errors import LayoutError, ModelError
from rlbridge.sync.calls import Party
from rlbridge.sync.messages import Described, Nothing, Record, answer, pack, result
from rlbridge.weights.layout import Layout, Region, TensorMeta, whole
from rlbridge_conformance.checks import check, expect, holds
from rlbridge_conformance.inside import move
from rlbridge_conformance.members import errors_of
from rlbridge_conformance.models import make_model
from rlbridge_conformance.probes import no_growth, usage
from rlbridge_conformance.run import Stages
from rlbridge_conformance.stage import Stage

TOLERANCE = 2e-3
"""Log-probs of a trainer and an engine that compute in float32 differ by less, whatever order each adds in."""

_SAME = 1e-4
"""Log-probs that one engine computes twice of the same weights differ by less."""

_PROMPTS = [[5, 9, 17], [8, 23, 31], [50, 2, 45], [14, 39, 27]]
"""Each is shorter than the blocks of prefix caches: no check but that of the cache depends on one."""

_NORM, _DOWN = "model.layers.1.post_attention_layernorm.weight", "model.layers.1.mlp.down_proj.weight"
_SURPLUS = "model.layers.7.mlp.up_proj.weight"


@check("contract", "generator")
def test_the_layout_is_whole_and_always_the_same(stages: Stages) -> None:
    stage = synced(stages)
    published = _published(stage)
    first, second = _record(stage, published), _record(stage, published)
    for one, other in zip(first, second, strict=True):
        expect(f"recording again gives {one.name} the same layout", _regions([one]), _regions([other]))
    own = {meta.name: meta for meta in published if meta.alias_of is None}
    asked = [region for described in first for region in described.layout.regions]
    expect("the engine asks only for tensors that the trainer publishes", set(), {r.tensor for r in asked} - own.keys())
    for name, meta in own.items():
        covered = np.zeros(meta.shape, dtype=bool)
        for region in asked:
            if region.tensor == name:
                expect(f"{region} lies in {name}", region, region.intersect(whole(meta)))
                covered[tuple(slice(o, o + n) for o, n in zip(region.offset, region.shape, strict=True))] = True
        expect(f"all ranks together ask for all of {name}", covered.size, int(covered.sum()))
    stage.session.attach()


@check("contract", "generator")
def test_recording_leaves_the_weights_alone(stages: Stages) -> None:
    stage = synced(stages)
    saved, before = stage.saved(), stage.engine_scores(stage.sequences())
    _record(stage, _published(stage))
    _same(before, stage.engine_scores(stage.sequences()), "a layout was recorded")
    stage.session.attach()
    stage.holds(saved)


@check("contract", "generator")
def test_names_may_come_in_any_order(stages: Stages) -> None:
    stage = synced(stages)
    before = stage.engine_scores(stage.sequences())
    other = stage.session_with()
    other.trainers = [_Reversing(party) for party in other.trainers]
    stage.scramble()
    stage.version += 1
    other.sync(stage.version)
    stage.holds(stage.saved())
    _same(before, stage.engine_scores(stage.sequences()), "the same weights came by names in the reverse order")
    stage.session.attach()


@check("contract", "generator")
@pytest.mark.parametrize("wrong", ["missing", "surplus", "shape"])
def test_another_models_tensors_are_refused(stages: Stages, wrong: str) -> None:
    stage = synced(stages)
    published, before = _published(stage), stage.engine_scores(stage.sequences())
    changed, named = {
        "missing": ([t for t in published if t.name != _NORM], ""),  # the engine names its own parameter
        "surplus": ([*published, TensorMeta(_SURPLUS, (48, 32), "float32")], _SURPLUS),
        "shape": (
            [TensorMeta(t.name, (t.shape[0] + 1, t.shape[1]), t.dtype) if t.name == _DOWN else t for t in published],
            _DOWN,
        ),
    }[wrong]
    error = errors_of(lambda: _record(stage, changed))
    expect(f"a checkpoint with a tensor {wrong} is refused", LayoutError.__name__, type(error).__name__)
    assert error is not None
    holds("tensor" in error.where and named in str(error), "the error names the tensor", named or "a tensor", str(error))
    _same(before, stage.engine_scores(stage.sequences()), "another model's tensors were refused")
    stage.session.attach()
    stage.train()
    stage.sync()
    stage.holds(stage.saved())


@check("contract", "generator")
def test_a_scramble_shows_in_every_tensor(stages: Stages) -> None:
    """The control of all checks that scramble: what a sync does not write would show."""
    stage = synced(stages)
    before = stage.served()
    stage.scramble()
    for rank, (was, now) in enumerate(zip(before, stage.served(), strict=True)):
        same = [str(a.region) for a, b in zip(was, now, strict=True) if a.raw == b.raw and a.raw]
        expect(f"no part of rank {rank} is served as before, after a scramble", [], same)
    stage.train()
    stage.sync()


@check("contract", "generator")
def test_each_sync_installs_the_saved_weights(stages: Stages) -> None:
    """The first time over scrambled weights that are no others than the trainer's: all of them have to be written."""
    stage = synced(stages)
    for turn in range(5):
        if turn:
            stage.train()
        stage.scramble()
        stage.sync()
        stage.holds(stage.saved())


@check("contract", "generator")
def test_an_update_without_a_change_changes_nothing(stages: Stages) -> None:
    stage = synced(stages)
    before, scores = stage.served(), stage.engine_scores(stage.sequences())
    stage.sync()
    expect("the bytes served are those of before", True, before == stage.served())
    _same(scores, stage.engine_scores(stage.sequences()), "the same weights were synced again")


@check("contract", "generator")
def test_only_completions_are_scored(stages: Stages) -> None:
    stage = synced(stages)
    sequences = stage.sequences(rows=6)
    scores, mask = stage.engine_scores(sequences), sequences.completion_mask_BT()
    expect("there is a score for each place", (sequences.tokens_BT.shape, "float32"), (scores.shape, str(scores.dtype)))
    expect("scores of prompts and padding are 0", 0, int(np.count_nonzero(scores[~mask])))
    expect("scores of completions are log-probs", True, bool((np.isfinite(scores[mask]) & (scores[mask] < 0)).all()))


@check("contract", "generator")
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_scores_are_at_the_temperature_asked_for(stages: Stages, temperature: float) -> None:
    stage = synced(stages)
    apart = float(np.abs(stage.trainer_scores(stage.sequences()) - _wanted(stage, temperature)).max())
    holds(apart > 50 * TOLERANCE, "a temperature changes log-probs", f"more than {50 * TOLERANCE:g}", f"{apart:.3g}")
    _agrees(stage, temperature)


@check("contract", "generator")
@pytest.mark.parametrize("part", ["q_norm", "k_norm", "embed_tokens", "model.norm", "up_proj"])
def test_what_is_derived_follows_an_update(stages: Stages, part: str) -> None:
    """One tensor moves alone: what an engine ties to it, folds it into or keeps beside it must have moved with it."""
    stage = synced(stages)
    before = stage.trainer_scores(stage.sequences())
    stage.trainers[0].apply(move, part)
    _moved(stage, before)
    stage.sync()
    _agrees(stage)


@check("contract", "generator")
def test_the_model_directory_is_left_alone(stages: Stages) -> None:
    stage = synced(stages)
    stage.generate(_PROMPTS)
    made = stage.directory / "made-again"
    if not made.exists():
        make_model(made, stage.scene.model)
    files = sorted(str(p.relative_to(made)) for p in made.rglob("*"))
    found = sorted(str(p.relative_to(stage.model)) for p in stage.model.rglob("*"))
    expect("the model directory holds the files that it was made with", files, found)
    _, changed, lost = filecmp.cmpfiles(made, stage.model, files, shallow=False)
    expect("no file of the model directory has changed", [], [*changed, *lost])


@check("contract", "generator")
def test_every_rank_answers_for_itself(stages: Stages) -> None:
    stage = synced(stages)
    layouts = _record(stage, _published(stage))
    names = [described.name for described in layouts]
    expect("the ranks have names of their own", len(names), len(set(names)))
    stage.session.attach()
    for described, boxes in zip(layouts, stage.served(), strict=True):
        strange = [str(box.region) for box in boxes if not any(_within(box.region, r) for r in described.layout.regions)]
        expect(f"what {described.name} shows is what it has asked for", [], strange)
    expect("there is one answer a rank to any call", len(names), len(_ranks(stage, "live_digests")))


@check("contract", "generator")
def test_a_directory_without_a_model_is_refused(stages: Stages) -> None:
    stage = synced(stages)
    for index, kind in enumerate(("empty", "without weights")):
        path = stage.directory / f"no-model-{stage.version}-{index}"
        path.mkdir()
        if kind == "without weights":
            for file in stage.model.glob("*.json"):
                (path / file.name).write_text(file.read_text())
        error = errors_of(lambda path=path: stage.fresh_text(path, _PROMPTS))  # type: ignore[misc]
        expect(f"a model directory that is {kind} is refused", ModelError.__name__, type(error).__name__)
        holds(path.name in str(error), "the error names the directory", path.name, str(error))


@check("contract", "generator")
def test_thirty_syncs_leave_nothing_behind(stages: Stages) -> None:
    stage = synced(stages)
    for _ in range(5):
        stage.trainers[0].apply(move, "")
        stage.sync()
    (engine,) = stage.engines
    before = engine.apply(usage)
    for _ in range(30):
        stage.trainers[0].apply(move, "")
        stage.sync()
    no_growth(engine.name, before, functools.partial(engine.apply, usage), "syncs", 30)


@check("contract", "generator")
@pytest.mark.parametrize("model", ["tied", "untied"])
def test_log_probs_are_those_of_the_trainer(stages: Stages, model: Any) -> None:
    stage = synced(stages, model=model)
    for _ in range(2):
        before = stage.trainer_scores(stage.sequences())
        stage.trainers[0].apply(move, "")
        _moved(stage, before)
        apart = float(np.abs(_wanted(stage) - stage.engine_scores(stage.sequences())).max())
        holds(
            apart > 50 * TOLERANCE, "an engine before its sync has other log-probs", f"{50 * TOLERANCE:g} apart", f"{apart:.3g}"
        )
        stage.sync()
        _agrees(stage)


@check("contract", "generator")
@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_trainer_ranks_will_do(stages: Stages, ranks: int) -> None:
    stage = synced(stages, ranks=ranks)
    for _ in range(2):
        stage.train()
        stage.scramble()
        stage.sync()
        stage.holds(stage.saved())


@check("contract", "generator")
@pytest.mark.parametrize(("held", "served"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_weights_are_served_in_the_dtype_asked_for(stages: Stages, held: str, served: str) -> None:
    stage = synced(stages, trainer={"dtype": held}, generator={"dtype": served})
    stage.train()
    stage.scramble()
    stage.sync()
    stage.holds(stage.saved())
    dtypes = {box.dtype for boxes in stage.served() for box in boxes if len(box.region.shape) == 2}
    expect("matrices are served in the dtype of the options", {served}, dtypes)


@check("contract", "generator", needs=["generator.several_engines"])
def test_engines_serve_the_same(stages: Stages) -> None:
    stage = synced(stages, engines=2)
    assert stage.session.attached is not None
    names = stage.session.attached.sinks
    expect("the ranks of all engines have names of their own", len(names), len(set(names)))
    stage.train()
    stage.scramble()
    stage.sync()
    stage.holds(stage.saved())
    one, other = (stage.engine_scores(stage.sequences(), engine) for engine in range(2))
    _same(one, other, "two engines were given the same weights")
    texts = [[c.token_ids for c in stage.generate(_PROMPTS, engine)] for engine in range(2)]
    expect("two engines say the same greedily", *texts)


@check("contract", "generator")
def test_an_engine_can_be_closed(stages: Stages) -> None:
    stage = stages.fresh()
    stage.train()
    stage.sync()
    (engine,) = stage.engines
    engine.ask("close", None, seconds=20.0)


def synced(stages: Stages, **scene: Any) -> Stage:
    """A stage whose engines have just been given weights that they had not."""
    stage = stages(**scene)
    stage.train()
    stage.sync()
    return stage


class _Reversing:
    """A trainer rank that describes its tensors in the reverse order."""

    actor = None

    def __init__(self, party: Party) -> None:
        self.name, self._party = party.name, party

    def call(self, method: str, payload: bytes, tensors: dict[str, Any] | None = None) -> Future[list[bytes]]:
        begun = self._party.call(method, payload, tensors)
        if method != "layout":
            return begun
        described = result(begun.result(60)[0], Described)
        layout = Layout(described.layout.tensors[::-1], described.layout.regions)
        done: Future[list[bytes]] = Future()
        done.set_result([answer(lambda: Described(described.name, layout))])
        return done

    def tensors(self, version: int, slot: int, sink: str, tensor_transport: str | None) -> Any:
        return self._party.tensors(version, slot, sink, tensor_transport)


def _published(stage: Stage) -> list[TensorMeta]:
    return list({t.name: t for described in stage.layouts() for t in described.layout.tensors}.values())


def _record(stage: Stage, tensors: Sequence[TensorMeta]) -> list[Described]:
    """What each rank of the first engine answers; begin a new epoch when done, since the plan of this one is void."""
    return [result(reply, Described) for reply in _ranks(stage, "record", Record(list(tensors)))]


def _ranks(stage: Stage, method: str, message: object = Nothing()) -> list[bytes]:
    return stage.engines[0].party.call(method, msgspec.msgpack.encode([pack(message)])).result(60)


def _regions(ranks: Iterable[Described]) -> list[str]:
    return sorted(str(region) for described in ranks for region in described.layout.regions)


def _within(inner: Region, outer: Region) -> bool:
    return inner.tensor == outer.tensor and (inner == outer or inner.intersect(outer) == inner)


def _wanted(stage: Stage, temperature: float = 1.0) -> np.ndarray[Any, Any]:
    return stage.trainer_scores(stage.sequences(temperature=temperature))


def _agrees(stage: Stage, temperature: float = 1.0) -> None:
    sequences = stage.sequences(temperature=temperature)
    apart = float(np.abs(_wanted(stage, temperature) - stage.engine_scores(sequences))[sequences.completion_mask_BT()].max())
    what = f"log-probs are those of the trainer after version {stage.version}, at temperature {temperature:g}"
    holds(apart < TOLERANCE, what, f"less than {TOLERANCE:g} apart", f"{apart:.3g}")


def _moved(stage: Stage, before: np.ndarray[Any, Any]) -> None:
    moved = float(np.abs(_wanted(stage) - before).max())
    holds(moved > 100 * TOLERANCE, "the trainer's log-probs have moved", f"more than {100 * TOLERANCE:g}", f"{moved:.3g}")


def _same(before: np.ndarray[Any, Any], after: np.ndarray[Any, Any], why: str) -> None:
    apart = float(np.abs(before - after).max())
    holds(apart < _SAME, f"log-probs are the same after {why}", f"less than {_SAME:g} apart", f"{apart:.3g}")
