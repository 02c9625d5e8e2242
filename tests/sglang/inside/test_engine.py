"""One engine a model: what it says, and that it says it with the weights of the last sync."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import numpy as np
import pytest

from rlbridge.errors import DataError, DeadlineError, LayoutError, SyncError
from rlbridge.roles.batch import Completion, Sampling, pad_sequences
from rlbridge.sync.messages import Described, Record, pack, result
from rlbridge.weights.layout import TensorMeta
from tests.sglang.inside import models
from tests.sglang.inside.bridge import Bridge

TOLERANCE = 5e-5
PROMPTS = [[5, 9, 17], [8, 23, 31, 44], [50, 2, 45], [14, 39, 27, 60, 71]]
LONG = [[(7 * i * i + 3 * row * i + 5) % 90 + 2 for i in range(70 + row)] for row in range(3)]
_PARTS = (0.3, 0.5, 0.15, 0.7, 0.05, 0.0, 0.2, 0.4)
"""When an update is begun, in parts of the request's time: on a busy machine it comes late, and some requests end early."""


@pytest.fixture(scope="module", params=[*((kind, 1) for kind in models.KINDS), ("llama", 2)], ids=str)
def bridge(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bridge]:
    kind, ranks = request.param
    made = Bridge(tmp_path_factory.mktemp("models") / kind, kind, tensor_parallel=ranks)
    yield made
    made.close()


def test_tokens_and_log_probs_are_those_of_transformers_after_every_sync(bridge: Bridge) -> None:
    for seed in range(3):
        models.move(bridge.model, seed)
        bridge.sync()
        for prompt, said in zip(PROMPTS, say(bridge, PROMPTS), strict=True):
            tokens, logprobs = models.greedy(bridge.model, prompt, 12)
            assert said.token_ids == tokens
            assert np.abs(np.subtract(said.logprobs, logprobs)).max() <= TOLERANCE
            assert said.versions == [bridge.version] * len(tokens)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7}, {"temperature": 0.7, "top_k": 8, "top_p": 0.9}], ids=str)
def test_log_probs_of_samples_are_scores_before_any_cut(bridge: Bridge, sampling: dict[str, Any]) -> None:
    settings = {"temperature": 1.0, **sampling}
    said = say(bridge, PROMPTS, seed=3, **settings)
    sequences = pad_sequences(PROMPTS, [c.token_ids for c in said], temperature=settings["temperature"])
    wanted, mask = models.scores(bridge.model, sequences), sequences.completion_mask_BT()
    found = bridge.generator.score(sequences)
    assert found.dtype == np.float32
    assert np.abs(found - wanted).max() <= TOLERANCE
    assert max(np.abs(np.subtract(c.logprobs, w[m])).max() for c, w, m in zip(said, wanted, mask, strict=True)) <= TOLERANCE


def test_a_seed_fixes_a_call_and_calls_without_one_differ(bridge: Bridge) -> None:
    first = say(bridge, PROMPTS, temperature=1.0, seed=7)
    assert first == say(bridge, PROMPTS, temperature=1.0, seed=7)
    assert first != say(bridge, PROMPTS, temperature=1.0, seed=8)
    assert len({tuple(c.token_ids) for c in say(bridge, PROMPTS[:1] * 8, temperature=1.0)}) > 4
    assert say(bridge, PROMPTS, temperature=1.0) != say(bridge, PROMPTS, temperature=1.0)


def test_scoring_at_a_temperature_leaves_requests_beside_it_alone(bridge: Bridge) -> None:
    alone = say(bridge, LONG, temperature=1.0, seed=5, max_tokens=60)
    sequences = pad_sequences(PROMPTS, [[3, 4, 5]] * len(PROMPTS), temperature=3.0)
    with ThreadPoolExecutor(1) as pool:
        beside = pool.submit(say, bridge, LONG, temperature=1.0, seed=5, max_tokens=60)
        while not beside.done():
            assert np.abs(bridge.generator.score(sequences) - models.scores(bridge.model, sequences)).max() <= TOLERANCE
    for one, other in zip(alone, beside.result(), strict=True):
        assert one.token_ids == other.token_ids
        assert np.abs(np.subtract(one.logprobs, other.logprobs)).max() <= TOLERANCE


def test_a_sync_over_scrambled_parameters_restores_every_digest(bridge: Bridge) -> None:
    bridge.sync()
    before = bridge.digests()
    bridge.scramble()
    scrambled = bridge.digests()
    assert all(before[i : i + 16] != scrambled[i : i + 16] for i in range(0, len(before), 16))
    bridge.sync()
    assert bridge.digests() == before
    assert say(bridge, PROMPTS[:1])[0].token_ids == models.greedy(bridge.model, PROMPTS[0], 12)[0]


def test_a_warm_prefix_is_read_anew_because_the_cache_is_dropped(bridge: Bridge, monkeypatch: pytest.MonkeyPatch) -> None:
    def apart() -> float:
        say(bridge, LONG, max_tokens=1)
        models.move(bridge.model, 17 + bridge.version)
        bridge.sync()
        said = say(bridge, LONG, max_tokens=8)
        wanted = models.scores(bridge.model, pad_sequences(LONG, [c.token_ids for c in said]))
        return max(float(np.abs(w[w != 0] - c.logprobs).max()) for c, w in zip(said, wanted, strict=True))

    assert apart() <= TOLERANCE
    with monkeypatch.context() as patched:
        patched.setattr(bridge.generator, "invalidate_caches", lambda: None)
        assert apart() > 100 * TOLERANCE
    assert apart() <= TOLERANCE


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_held_requests_go_on_with_the_new_weights(bridge: Bridge, temperature: float) -> None:
    """Each token is one of its version's, after all that stands before it."""
    old = models.checkpoint(bridge.model)
    for part in _PARTS:
        old = {name: tensor.clone() for name, tensor in models.checkpoint(bridge.model).items()}
        start = time.monotonic()
        say(bridge, PROMPTS, max_tokens=80, temperature=temperature, seed=11)
        seconds = time.monotonic() - start
        with ThreadPoolExecutor(1) as pool:
            begun = pool.submit(bridge.engine.generate, PROMPTS, Sampling(80, temperature, seed=11))
            time.sleep(seconds * part)
            models.move(bridge.model, 40 + bridge.version)
            bridge.sync(pause="keep")
            said = begun.result(60)
        if any(len(set(c.versions)) == 2 for c in said):
            break
    else:
        pytest.fail("no update met a running request")
    new = bridge.version
    sequences = pad_sequences(PROMPTS, [c.token_ids for c in said], temperature=temperature or 1.0)
    by_version = {new: models.scores(bridge.model, sequences)}
    current = {name: tensor.clone() for name, tensor in models.checkpoint(bridge.model).items()}
    load(bridge, old)
    by_version[new - 1] = models.scores(bridge.model, sequences)
    load(bridge, current)
    bridge.sync(pause="wait")
    assert np.abs(by_version[new] - by_version[new - 1]).max() > 100 * TOLERANCE
    for row, completion in enumerate(said):
        assert completion.versions == sorted(completion.versions)
        first = len(PROMPTS[row])
        wanted = [by_version[v][row, first + i] for i, v in enumerate(completion.versions)]
        assert np.abs(np.subtract(wanted, completion.logprobs)).max() <= TOLERANCE


def test_greedy_text_over_an_update_is_that_of_each_version(bridge: Bridge) -> None:
    for part, prompt in itertools.product(_PARTS, PROMPTS):
        with ThreadPoolExecutor(1) as pool:
            before, _ = models.greedy(bridge.model, prompt, 80)
            start = time.monotonic()
            say(bridge, [prompt], max_tokens=80)
            begun, seconds = pool.submit(say, bridge, [prompt], max_tokens=80), time.monotonic() - start
            time.sleep(seconds * part)
            models.move(bridge.model, 80 + bridge.version)
            bridge.sync(pause="keep")
            (said,) = begun.result(60)
        count = said.versions.count(bridge.version - 1)
        if 0 < count < len(said.token_ids):
            after, _ = models.greedy(bridge.model, prompt + before[:count], 80 - count)
            assert said.token_ids == before[:count] + after
            bridge.sync(pause="wait")
            return
    pytest.fail("no update met the request")


def test_a_pause_that_aborts_ends_requests_with_what_they_have(bridge: Bridge) -> None:
    whole = say(bridge, LONG, max_tokens=200)
    with ThreadPoolExecutor(1) as pool:
        begun = pool.submit(say, bridge, LONG, max_tokens=200)
        until_it_runs(bridge)
        bridge.generator.pause("abort")
        try:
            ended = begun.result(20)
        finally:
            bridge.generator.resume()
    for one, other in zip(whole, ended, strict=True):
        assert one.token_ids[: len(other.token_ids)] == other.token_ids
        assert len(other.token_ids) == len(other.logprobs) == len(other.versions)
    assert [c.token_ids for c in say(bridge, LONG, max_tokens=200)] == [c.token_ids for c in whole]


def test_a_pause_that_waits_lets_calls_end_and_none_begin(bridge: Bridge) -> None:
    whole = say(bridge, LONG, max_tokens=100)
    with ThreadPoolExecutor(2) as pool:
        begun = pool.submit(say, bridge, LONG, max_tokens=100)
        until_it_runs(bridge)
        bridge.generator.pause("wait")
        assert begun.result(20) == whole  # though nobody has resumed
        later = pool.submit(say, bridge, LONG, max_tokens=2)
        time.sleep(0.3)
        assert not later.done()
        bridge.generator.resume()
        assert [c.token_ids for c in later.result(20)] == [c.token_ids[:2] for c in whole]


def test_any_thread_may_call(bridge: Bridge) -> None:
    sequences = pad_sequences(PROMPTS, [[3, 4, 5]] * len(PROMPTS))
    wanted, scores = say(bridge, PROMPTS), bridge.generator.score(sequences)
    errors: list[BaseException] = []

    def call() -> None:
        try:
            for _ in range(3):
                assert [c.token_ids for c in say(bridge, PROMPTS)] == [c.token_ids for c in wanted]
                assert np.abs(bridge.generator.score(sequences) - scores).max() <= TOLERANCE
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []


def test_completions_end_where_they_should(bridge: Bridge) -> None:
    (full,) = say(bridge, PROMPTS[:1], max_tokens=10)
    stop = next((t for t in full.token_ids[1:] if t != full.token_ids[0]), full.token_ids[0])
    cut = full.token_ids[: full.token_ids.index(stop) + 1]
    (stopped,) = say(bridge, PROMPTS[:1], max_tokens=10, stop_token_ids=(stop,))
    assert (stopped.token_ids, stopped.finish_reason) == (cut, "stop")
    assert len(stopped.logprobs) == len(cut)
    (none,) = say(bridge, PROMPTS[:1], max_tokens=0)
    assert (none.token_ids, none.finish_reason) == ([], "length")
    ended = [c for c in say(bridge, PROMPTS * 4, max_tokens=150, temperature=8.0, seed=2) if c.finish_reason == "stop"]
    assert ended
    assert all(c.token_ids.index(1) == len(c.token_ids) - 1 for c in ended)


def test_a_stop_string_ends_a_completion(bridge: Bridge) -> None:
    (full,) = say(bridge, PROMPTS[:1], max_tokens=10, temperature=5.0, seed=1)
    letter = next(t for t in full.token_ids if 2 <= t < models.VOCABULARY - 6)
    (stopped,) = say(bridge, PROMPTS[:1], max_tokens=10, temperature=5.0, seed=1, stop=(chr(ord("!") + letter - 2),))
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == full.token_ids[: full.token_ids.index(letter) + 1]


@pytest.mark.parametrize(
    "prompt", [[], [models.VOCABULARY], [-1], list(range(2, 90)) * 20], ids=["empty", "over", "under", "long"]
)
def test_a_prompt_that_cannot_be_read_is_refused(bridge: Bridge, prompt: list[int]) -> None:
    with pytest.raises(DataError):
        say(bridge, [PROMPTS[0], prompt])
    assert say(bridge, PROMPTS[:1])


@pytest.mark.parametrize("wrong", ["surplus", "missing", "shape", "longer"])
def test_another_models_tensors_are_refused(bridge: Bridge, wrong: str) -> None:
    down = "model.layers.1.mlp.down_proj.weight"
    gate = "model.layers.1.mlp.gate_proj.weight"
    published = bridge.published()
    changed, named = {
        "surplus": ([*published, TensorMeta("model.layers.7.mlp.up_proj.weight", (80, 64), "float32")], "model.layers.7.mlp"),
        "missing": ([m for m in published if m.name != gate], "gate_up_proj"),
        "shape": ([TensorMeta(m.name, (65, 80), m.dtype) if m.name == down else m for m in published], down),
        "longer": ([TensorMeta(m.name, (199, 64), m.dtype) if m.name == gate else m for m in published], gate),
    }[wrong]
    reply = bridge.engine.handle("record", msgspec.msgpack.encode([pack(Record(changed))]))[0]
    with pytest.raises(LayoutError, match=named):
        result(reply, Described)
    bridge.session.close()
    bridge.sync(pause="wait")


def test_an_update_that_sglang_refuses_is_an_error(bridge: Bridge) -> None:
    control = bridge.generator._control
    refused = pytest.raises(SyncError, match="refused begin_weight_update: a weight-update session is already open")
    with control.updating(), refused, control.updating():
        pytest.fail("it was not refused")


def test_a_call_waits_for_the_end_of_a_pause_no_longer_than_it_may(bridge: Bridge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridge.generator, "_options", bridge.generator._options.model_copy(update={"pause_seconds": 0.2}))
    bridge.generator.pause("keep")
    try:
        with pytest.raises(DeadlineError, match=r"paused \(keep\)"):
            say(bridge, PROMPTS)
    finally:
        bridge.generator.resume()


def test_a_pause_that_does_not_come_to_an_end_is_undone(bridge: Bridge, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [c.token_ids for c in say(bridge, LONG, max_tokens=200)]
    with ThreadPoolExecutor(1) as pool, monkeypatch.context() as hurry:
        begun = pool.submit(say, bridge, LONG, max_tokens=200)
        until_it_runs(bridge)
        hurry.setattr(bridge.generator, "_options", bridge.generator._options.model_copy(update={"pause_seconds": 0.0}))
        with pytest.raises(DeadlineError, match="running requests did not end"):
            bridge.generator.pause("wait")
    assert [c.token_ids for c in begun.result(20)] == whole
    assert [c.token_ids for c in say(bridge, LONG, max_tokens=200)] == whole


def say(bridge: Bridge, prompts: list[list[int]], **sampling: Any) -> list[Completion]:
    """Completions, greedy unless `sampling` says otherwise."""
    return bridge.generator.generate(prompts, Sampling(**{"max_tokens": 12, "temperature": 0.0, **sampling}))


def until_it_runs(bridge: Bridge) -> None:
    """Until a call of `say` has begun, and a little longer."""
    while not bridge.generator._running:
        time.sleep(0.005)
    time.sleep(0.05)


def load(bridge: Bridge, tensors: dict[str, Any]) -> None:
    """Put other values into the model."""
    for name, tensor in models.checkpoint(bridge.model).items():
        tensor.copy_(tensors[name])
