"""Level contract, the generator: what it says, with which weights, and what becomes of requests when weights change."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

import numpy as np

from rlbridge.roles.batch import Completion, Sampling, encode
from rlbridge.sync.messages import TransportSpec, result
from rlbridge.sync.session import SyncSession
from rlbridge_conformance.checks import Mismatch, check, expect, holds
from rlbridge_conformance.inside import move, pause, resume
from rlbridge_conformance.run import Stages
from rlbridge_conformance.stage import Stage
from rlbridge_conformance.suite.completions import TOLERANCE, close, joined

_SHORT = [[5, 9, 17], [8, 23, 31], [50, 2, 45], [14, 39, 27]]
"""Each is shorter than the blocks of prefix caches: no check but that of the cache depends on one."""

_LONG = [[(7 * i * i + 3 * row * i + 5) % 62 + 2 for i in range(40 + row)] for row in range(3)]
_TOKENS = 60
"""Of a completion that is interrupted."""

_TRIES = 8
_ANSWER_SECONDS = 20.0


@check("contract", "generator")
def test_greedy_text_follows_the_weights(stages: Stages) -> None:
    """A to B and back to A: each time as an engine that has just loaded what the trainer exported."""
    stage = _synced(stages)
    state = stage.directory / f"state-{stage.version}"
    stage.on_trainers("save_state", str(state))
    text_a = stage.fresh_text(stage.save(), _SHORT)
    expect("the greedy text is that of a fresh engine with A", text_a, _text(stage))
    stage.trainers[0].apply(move, "")
    text_b = stage.fresh_text(stage.save(), _SHORT)
    holds(text_a != text_b, "other weights say something else", "another text", text_b)
    stage.sync()
    expect("the greedy text is that of a fresh engine with B, after A", text_b, _text(stage))
    stage.on_trainers("load_state", str(state))
    stage.sync()
    expect("the greedy text is that of a fresh engine with A, after B", text_a, _text(stage))


@check("contract", "generator")
def test_a_warm_prefix_is_read_anew(stages: Stages) -> None:
    """Seen by sampled log-probs: a score does not go through a prefix cache."""
    stage = _synced(stages)
    for _ in range(3):
        for _ in range(2):
            warm = stage.generate(_LONG, temperature=1.0, seed=1)
        sequences = joined(_LONG, warm)
        before = stage.engine_scores(sequences)
        stage.trainers[0].apply(move, "")
        stage.sync()
        _apart(before, stage.engine_scores(sequences), "the update moves the log-probs of what was said before")
        said = stage.generate(_LONG, temperature=1.0, seed=1)
        close(stage, joined(_LONG, said), said, f"prompts that were read before version {stage.version}")


@check("contract", "generator")
def test_log_probs_of_text_are_its_scores(stages: Stages) -> None:
    """Before top-k and top-p, and at the temperature of the sampling."""
    stage = _synced(stages)
    cases: list[tuple[float, dict[str, Any]]] = [(1.0, {}), (0.7, {}), (0.7, {"top_k": 8, "top_p": 0.9})]
    for temperature, cuts in cases:
        for prompt in _SHORT:
            said = stage.generate([prompt], temperature=temperature, seed=3, **cuts)
            what = f"a completion at temperature {temperature:g} with {cuts or 'no cuts'}"
            close(stage, joined([prompt], said, temperature), said, what)


@check("contract", "generator")
def test_a_batch_says_what_each_prompt_says_alone(stages: Stages) -> None:
    stage = _synced(stages)
    prompts = [*_SHORT, _SHORT[0], _SHORT[1][:2], [2, 2, 2], _SHORT[2]]
    stops = tuple(dict.fromkeys(tokens[2 + 3 * i] for i, tokens in enumerate(_text(stage)[:3]) if len(tokens) > 2 + 3 * i))
    alone = [stage.generate([prompt], stop_token_ids=stops)[0].token_ids for prompt in prompts]
    lengths = [len(tokens) for tokens in alone]
    holds(lengths != sorted(lengths), "prompts have completions of unequal lengths", "not in their order", lengths)
    together = [completion.token_ids for completion in stage.generate(prompts, stop_token_ids=stops)]
    expect("completions of a batch are those of each prompt alone, in order", alone, together)


@check("contract", "generator")
def test_a_seed_fixes_what_is_sampled(stages: Stages) -> None:
    stage = _synced(stages)
    first = _text(stage, temperature=1.0, seed=7)
    other = _text(stage, temperature=1.0, seed=8)
    expect("the same seed gives the same text", first, _text(stage, temperature=1.0, seed=7))
    holds(first != other, "another seed gives another text", "another text", other)


@check("contract", "generator")
def test_cuts_leave_the_likeliest_tokens(stages: Stages) -> None:
    stage = _synced(stages)
    greedy = _text(stage)
    for cut in ({"top_k": 1}, {"top_p": 1e-6}):
        expect(f"sampling with {cut} is greedy", greedy, _text(stage, temperature=2.0, seed=5, **cut))


@check("contract", "generator")
def test_completions_end_where_they_should(stages: Stages) -> None:
    stage = _synced(stages)
    full = stage.generate(_SHORT[:1], max_tokens=8)[0]
    stop = next((token for token in full.token_ids[1:-1] if token != full.token_ids[0]), full.token_ids[0])
    cut = full.token_ids[: full.token_ids.index(stop) + 1]
    stopped = stage.generate(_SHORT[:1], max_tokens=8, stop_token_ids=(stop,))[0]
    expect(f"a completion ends with the stop token {stop}", (cut, "stop"), (stopped.token_ids, stopped.finish_reason))
    (one,) = stage.generate(_SHORT[:1], max_tokens=1)
    expect("a completion ends after max_tokens", (full.token_ids[:1], "length"), (one.token_ids, one.finish_reason))
    ends = 0
    for completion in stage.generate(_SHORT * 3, max_tokens=100, temperature=8.0, seed=2):
        ended = completion.finish_reason == "stop"
        ends += ended
        expect("nothing follows the model's own stop token", ended, 1 in completion.token_ids)
        holds(1 not in completion.token_ids[:-1], "it is the last", "token 1 at the end alone", completion.token_ids)
        holds(ended or len(completion.token_ids) == 100, "others have max_tokens", 100, len(completion.token_ids))
        expect("there is a log-prob for each token", len(completion.token_ids), len(completion.logprobs))
    holds(ends > 0, "some of 12 completions of 100 tokens, hardly of unequal odds, meet the stop token", "at least 1", ends)


@check("contract", "generator")
def test_tokens_carry_the_version_that_made_them(stages: Stages) -> None:
    stage = _synced(stages)
    samplings: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 1.0, "seed": 1}, {"temperature": 1.0}]
    for sampling in samplings:
        stage.train()
        stage.sync()
        for completion in stage.generate(_SHORT, **sampling):
            expect(f"every token at {sampling} is of the version served",
                   [stage.version] * len(completion.token_ids), completion.versions)  # fmt: skip


@check("contract", "generator")
def test_pausing_twice_is_harmless(stages: Stages) -> None:
    stage = _synced(stages)
    before, claims = _text(stage), stage.triple.claims("generator")
    modes = ["wait", *(mode for mode in ("keep", "abort") if claims.claims(f"pause_{mode}"))]
    (engine,) = stage.engines
    for mode in modes:
        for function, *args in ((pause, mode), (pause, mode), (resume,), (resume,)):
            engine.apply(function, *args, seconds=_ANSWER_SECONDS)
        packed = encode(Sampling(max_tokens=12, temperature=0.0))
        after = engine.ask("generate", list[Completion], _SHORT, packed, seconds=_ANSWER_SECONDS)
        expect(f"the text after pausing ({mode}) and resuming twice", before, [c.token_ids for c in after])


@check("contract", "generator", needs=["generator.pause_keep"])
def test_a_pause_that_waits_lets_requests_end(stages: Stages) -> None:
    stage = _synced(stages)
    (engine,) = stage.engines
    for turn in range(_TRIES):
        full, seconds = _timed(stage)
        begun = _begin(stage)
        time.sleep(seconds / (turn + 2))
        met = not begun.done()
        engine.apply(pause, "wait", seconds=_ANSWER_SECONDS)
        try:
            ended = _ended(begun, "requests end though nobody resumes")
            expect("they end as without a pause", full, [c.token_ids for c in ended])
            later = _begin(stage, tokens=2)
            expect("no request begins in a pause", False, _settles(later, max(seconds, 0.5)))
        finally:
            engine.apply(resume, seconds=_ANSWER_SECONDS)
        said = _ended(later, "a request that waited ends")
        expect("it begins when the pause is over", [tokens[:2] for tokens in full], [c.token_ids for c in said])
        if met:
            return
    raise Mismatch("a pause that waits meets requests", "a request that is under way", "none")


@check("contract", "generator", needs=["generator.pause_abort"])
def test_a_pause_that_aborts_loses_no_token(stages: Stages) -> None:
    stage = _synced(stages)
    (engine,) = stage.engines
    full, seconds = _timed(stage)
    for turn in range(_TRIES):
        begun = _begin(stage)
        time.sleep(seconds * (turn + 1) / (_TRIES + 1))
        engine.apply(pause, "abort", seconds=_ANSWER_SECONDS)
        try:
            ended = _ended(begun, "requests end when they are aborted")
        finally:
            engine.apply(resume, seconds=_ANSWER_SECONDS)
        for tokens, completion in zip(full, ended, strict=True):
            got, count = completion.token_ids, len(completion.token_ids)
            expect("an aborted completion begins as the whole one", tokens[:count], got)
            lengths = (len(completion.logprobs), len(completion.versions))
            expect("there is a log-prob and a version for each token", (count, count), lengths)
            holds(got == tokens or completion.finish_reason == "abort", "it says so", "abort", completion.finish_reason)
        if any(c.token_ids and c.finish_reason == "abort" for c in ended):
            expect("the engine goes on after an abort", full, _text(stage, max_tokens=_TOKENS))
            return
    raise Mismatch("a pause that aborts meets requests, and keeps their tokens", "tokens of an aborted request", "none")


@check("contract", "generator", needs=["generator.pause_keep"])
def test_held_requests_go_on_with_the_new_weights(stages: Stages) -> None:
    """An update in the middle of a greedy and of a sampled text, against each version by itself."""
    stage = _synced(stages)
    for temperature in (0.0, 1.0):
        for turn in range(_TRIES):
            state = stage.directory / f"state-{stage.version}"
            stage.on_trainers("save_state", str(state))
            said = _interrupted(stage, temperature, (turn + 1) / (_TRIES + 1))
            if any(len(set(completion.versions)) == 2 for completion in said):
                break
        else:
            raise Mismatch("requests are held over an update", "tokens of both versions", [c.versions for c in said])
        old, new = stage.version - 1, stage.version
        for completion in said:
            expect("versions never fall", sorted(completion.versions), completion.versions)
            expect("tokens are of either version", set(), set(completion.versions) - {old, new})
        if temperature:
            _holds_log_probs(stage, said, str(state))
        else:
            _holds_tokens(stage, said, str(state))


@check("contract", "generator")
def test_generation_goes_on_while_bytes_arrive(stages: Stages) -> None:
    """Over a wire so slow that a call must end before the bytes are there."""
    stage = _synced(stages)
    spans = []
    for _ in range(2):
        start = time.monotonic()
        _text(stage)
        spans.append(time.monotonic() - start)
    wanted = max(6 * min(spans), 0.2)
    assert stage.session.attached is not None
    reads = max(stage.session.attached.bytes // 4096, 1)
    for turn in range(4):
        seconds = wanted * 4**turn
        slow = {"bucket_bytes": 4096, "delay_seconds": seconds / reads}
        if _served_meanwhile(stage, slow, seconds):
            return
    raise Mismatch("an engine generates while bytes arrive", "completions before the last byte", "none")


def _served_meanwhile(stage: Stage, wire: dict[str, Any], seconds: float) -> bool:
    """Bring the next version over a wire that takes at least `seconds`; whether text came before all of it was there.

    Each text must be of the old version. The first is asked for when bytes are under way, and may yet have slipped in before
    an engine that waits began to: two are wanted.
    """
    options = stage.triple.validated("transport", wire)
    spec = TransportSpec(stage.triple.transport.name, options.model_dump(mode="json"))
    unhurried = dataclasses.replace(stage.session.options, deadline_seconds=30 + 4 * seconds)
    session = SyncSession(stage.session.trainers, stage.session.engines, spec, unhurried)
    stage.train()
    stage.version += 1
    session.sync(stage.version)
    before = _text(stage)
    stage.train()
    saved = stage.saved()
    stage.version += 1
    session.publish(stage.version)
    with ThreadPoolExecutor(1) as pool:
        pulled = pool.submit(session.pull, stage.version)
        meanwhile = 0
        time.sleep(seconds / 4)
        while not pulled.done():
            said = stage.generate(_SHORT)
            expect("what is said while bytes arrive is of the old version", before, [c.token_ids for c in said])
            expect("and stamped so", {stage.version - 1}, {v for c in said for v in c.versions})
            meanwhile += not pulled.done()
        pulled.result()
    session.install(stage.version)
    stage.holds(saved)
    stage.session.attach()
    return meanwhile > 1


def _interrupted(stage: Stage, temperature: float, part: float) -> list[Completion]:
    """Completions of `_SHORT`, with an update after that part of the usual time; requests are held while it is installed."""
    _, seconds = _timed(stage, temperature)
    stage.trainers[0].apply(move, "")
    stage.version += 1
    stage.session.publish(stage.version)
    stage.session.pull(stage.version)
    begun = _begin(stage, temperature)
    time.sleep(seconds * part)
    with stage.syncing(pause="keep"):
        stage.session.install(stage.version)
    return _ended(begun, "requests that were held end after the update")


def _holds_tokens(stage: Stage, said: Sequence[Completion], state: str) -> None:
    """Each span is what its version says greedily after all that stands before it."""
    old = stage.version - 1
    counts = [completion.versions.count(old) for completion in said]
    after: list[list[int]] = []
    for prompt, completion, count in zip(_SHORT, said, counts, strict=True):
        left = [prompt + completion.token_ids[:count]] if count < len(completion.token_ids) else []
        after += [c.token_ids for c in stage.generate(left, max_tokens=_TOKENS - count)] if left else [[]]
    stage.on_trainers("load_state", state)
    stage.sync()
    whole = _text(stage, max_tokens=_TOKENS)
    for completion, count, first, second in zip(said, counts, whole, after, strict=True):
        expect("greedy text over an update is that of each version", first[:count] + second, completion.token_ids)
    changed = any(first[count:] != second for first, count, second in zip(whole, counts, after, strict=True) if second)
    holds(changed, "the old version would have gone on otherwise", "another text", whole)


def _holds_log_probs(stage: Stage, said: Sequence[Completion], state: str) -> None:
    """Each token's log-prob is what its version scores it with after all that stands before it."""
    sequences, new = joined(_SHORT, said), stage.version
    scores = {new: stage.engine_scores(sequences)}
    stage.on_trainers("load_state", state)
    stage.sync()
    scores[new - 1] = stage.engine_scores(sequences)
    _apart(scores[new - 1], scores[new], "the versions score the text differently")
    for row, completion in enumerate(said):
        first = len(_SHORT[row])
        wanted = [float(scores[version][row, first + i]) for i, version in enumerate(completion.versions)]
        apart = max((abs(a - b) for a, b in zip(wanted, completion.logprobs, strict=True)), default=0.0)
        what = "log-probs over an update are those of each token's version"
        holds(apart < TOLERANCE, what, f"less than {TOLERANCE:g} apart", f"{apart:.3g}")


def _synced(stages: Stages) -> Stage:
    """The stage of all of these checks, its engine just given weights that it had not."""
    stage = stages()
    stage.train()
    stage.sync()
    return stage


def _text(stage: Stage, **sampling: Any) -> list[list[int]]:
    return [completion.token_ids for completion in stage.generate(_SHORT, **sampling)]


def _timed(stage: Stage, temperature: float = 0.0) -> tuple[list[list[int]], float]:
    """The whole text of what `_begin` begins, and the seconds that it takes when nothing is in its way."""
    spans = []
    for _ in range(2):
        start = time.monotonic()
        text = [c.token_ids for c in _ended(_begin(stage, temperature), "a call of generate ends")]
        spans.append(time.monotonic() - start)
    return text, min(spans)


def _begin(stage: Stage, temperature: float = 0.0, *, tokens: int = _TOKENS) -> Future[bytes]:
    packed = encode(Sampling(max_tokens=tokens, temperature=temperature, seed=4))
    return stage.engines[0].begin("generate", _SHORT, packed)


def _ended(begun: Future[bytes], what: str) -> list[Completion]:
    try:
        found: list[Completion] = result(begun.result(_ANSWER_SECONDS), list[Completion])
        return found
    except FutureTimeoutError as error:
        raise Mismatch(what, "an end", f"none within {_ANSWER_SECONDS:g} s") from error


def _settles(begun: Future[bytes], seconds: float) -> bool:
    try:
        begun.result(seconds)
    except FutureTimeoutError:
        return False
    return True


def _apart(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any], what: str) -> None:
    apart = float(np.abs(one - other).max())
    holds(apart > 50 * TOLERANCE, what, f"more than {50 * TOLERANCE:g} apart", f"{apart:.3g}")
