"""Engines whose weights are copied into place: what they say, and that they say it with the weights of the last sync."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from rlbridge.errors import DataError
from rlbridge.roles.batch import pad_sequences
from tests.vllm.inside import models
from tests.vllm.inside.bridge import Bridge

TOLERANCE = 5e-5
PROMPTS = [[5, 9, 17], [8, 23, 31, 44], [50, 2, 45], [14, 39, 27, 60, 71]]
LONG = [[(7 * i * i + 3 * row * i + 5) % 90 + 2 for i in range(260 + row)] for row in range(2)]
"""Longer than the blocks of the prefix cache, which on a CPU are of 128 tokens."""

ENGINES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen3, two ranks": ("qwen3", {"tensor_parallel": 2}),
    "one kv head on two ranks, in process": ("qwen3-one-kv-head", {"tensor_parallel": 2, "engine": "in_process"}),
    "qwen2-tied, in process": ("qwen2-tied", {"engine": "in_process"}),
}
"""A rank in this process comes last: what its kernels leave of OpenMP here, a forked process may wait for."""


@pytest.fixture(scope="module", params=ENGINES)
def bridge(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bridge]:
    kind, options = ENGINES[request.param]
    made = Bridge(tmp_path_factory.mktemp("models") / kind, kind, **options)
    yield made
    made.close()


def test_a_replay_over_scrambled_parameters_restores_what_vllm_loaded(bridge: Bridge) -> None:
    assert set(bridge.generator.installs) == {"direct"}
    loaded = bridge.checksums()
    bridge.sync()
    bridge.scramble()
    assert all(now[name] != was[name] for was, now in zip(loaded, bridge.checksums(), strict=True) for name in was)
    bridge.sync()
    assert bridge.checksums() == loaded


def test_tokens_and_log_probs_are_those_of_transformers_after_every_sync(bridge: Bridge) -> None:
    for seed in range(3):
        models.move(bridge.model, seed)
        bridge.sync()
        for prompt, said in zip(PROMPTS, bridge.say(PROMPTS), strict=True):
            tokens, logprobs = models.greedy(bridge.model, prompt, 12)
            assert said.token_ids == tokens
            assert np.abs(np.subtract(said.logprobs, logprobs)).max() <= TOLERANCE
            assert said.versions == [bridge.version] * len(tokens)


def test_a_prefix_is_read_anew_after_a_sync(bridge: Bridge) -> None:
    for seed in range(2):
        models.move(bridge.model, seed)
        bridge.sync()
        for _ in range(2):
            for prompt, said in zip(LONG, bridge.say(LONG, max_tokens=3), strict=True):
                tokens, logprobs = models.greedy(bridge.model, prompt, 3)
                assert said.token_ids == tokens
                assert np.abs(np.subtract(said.logprobs, logprobs)).max() <= TOLERANCE


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7}, {"temperature": 0.7, "top_k": 8, "top_p": 0.9}], ids=str)
def test_log_probs_of_samples_are_scores_before_any_cut(bridge: Bridge, sampling: dict[str, Any]) -> None:
    settings = {"temperature": 1.0, **sampling}
    said = bridge.say(PROMPTS, seed=3, **settings)
    sequences = pad_sequences(PROMPTS, [c.token_ids for c in said], temperature=settings["temperature"])
    wanted, mask = models.scores(bridge.model, sequences), sequences.completion_mask_BT()
    found = bridge.engine.score(sequences)
    assert found.dtype == np.float32
    assert np.abs(found - wanted).max() <= TOLERANCE
    assert max(np.abs(np.subtract(c.logprobs, w[m])).max() for c, w, m in zip(said, wanted, mask, strict=True)) <= TOLERANCE


def test_temperatures_of_one_engine_do_not_mix(bridge: Bridge) -> None:
    said = {t: bridge.say(PROMPTS[:1], temperature=t, seed=5, max_tokens=6) for t in (0.5, 2.0, 0.5)}
    for temperature, (completion,) in said.items():
        sequences = pad_sequences(PROMPTS[:1], [completion.token_ids], temperature=temperature)
        wanted = models.scores(bridge.model, sequences)[sequences.completion_mask_BT()]
        assert np.abs(np.subtract(completion.logprobs, wanted)).max() <= TOLERANCE


def test_a_seed_fixes_a_call_and_calls_without_one_differ(bridge: Bridge) -> None:
    first = [c.token_ids for c in bridge.say(PROMPTS, temperature=1.0, seed=7)]
    assert first == [c.token_ids for c in bridge.say(PROMPTS, temperature=1.0, seed=7)]
    assert first != [c.token_ids for c in bridge.say(PROMPTS, temperature=1.0, seed=8)]
    assert bridge.say(PROMPTS, temperature=1.0) != bridge.say(PROMPTS, temperature=1.0)
    same = bridge.say([PROMPTS[0]] * 4, temperature=1.0, seed=7)
    assert len({tuple(c.token_ids) for c in same}) == 4


def test_completions_end_where_they_should(bridge: Bridge) -> None:
    (whole,) = bridge.say(PROMPTS[:1], max_tokens=20, temperature=1.5, seed=1)
    stop = whole.token_ids[6]
    cut = whole.token_ids[: whole.token_ids.index(stop) + 1]
    (stopped,) = bridge.say(PROMPTS[:1], max_tokens=20, temperature=1.5, seed=1, stop_token_ids=(stop,))
    assert (stopped.token_ids, stopped.finish_reason, len(stopped.logprobs)) == (cut, "stop", len(cut))
    letter = chr(ord("!") + stop - 2)
    (by_text,) = bridge.say(PROMPTS[:1], max_tokens=20, temperature=1.5, seed=1, stop=(letter,))
    assert (by_text.token_ids, by_text.finish_reason, len(by_text.versions)) == (cut, "stop", len(cut))
    (none,) = bridge.say(PROMPTS[:1], max_tokens=0)
    assert (none.token_ids, none.finish_reason) == ([], "length")
    (full,) = bridge.say([[7] * (models.LENGTH - 4)], max_tokens=20, temperature=1.0, seed=1)
    assert (len(full.token_ids), full.finish_reason) == (4, "length")


def test_a_sequence_as_long_as_the_engine_takes_is_scored(bridge: Bridge) -> None:
    prompt = [(5 * i) % 90 + 2 for i in range(models.LENGTH - 6)]
    sequences = pad_sequences([prompt, prompt[:9]], [[9, 8, 7, 6, 5, 4], [3, 4]], temperature=0.8)
    assert np.abs(bridge.engine.score(sequences) - models.scores(bridge.model, sequences)).max() <= TOLERANCE
    assert bridge.engine.score(sequences.rows(slice(0, 0))).shape == (0, models.LENGTH)


@pytest.mark.parametrize(
    ("prompt", "told"),
    [([], "prompt 1 has no tokens"), ([5] * models.LENGTH, "has 512 tokens"), ([5, models.VOCABULARY], "the token 100")],
)
def test_a_prompt_that_cannot_be_generated_from_is_named(bridge: Bridge, prompt: list[int], told: str) -> None:
    with pytest.raises(DataError, match=told):
        bridge.say([PROMPTS[0], prompt])
    assert len(bridge.say(PROMPTS[:1])[0].token_ids) > 0
