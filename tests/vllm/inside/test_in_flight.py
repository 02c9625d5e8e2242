"""Updates while requests run: each token is of the version that it says, and what follows is computed with the new weights."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from rlbridge.roles.batch import Completion
from tests.vllm.inside import models
from tests.vllm.inside.bridge import Bridge

TOLERANCE = 5e-5
PROMPTS = [[5, 9, 17], [8, 23, 31, 44], [50, 2, 45]]
TOKENS = 160
TRIES = 8

ENGINES: dict[str, dict[str, Any]] = {
    "async": {},
    "streamed": {"install": "streamed"},
    "two ranks": {"tensor_parallel": 2},
    "in process": {"engine": "in_process"},  # the last: see test_direct
}


@pytest.fixture(scope="module", params=ENGINES)
def bridge(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bridge]:
    made = Bridge(tmp_path_factory.mktemp("models") / "qwen3", "qwen3", **ENGINES[request.param])
    made.sync()
    made.say(PROMPTS)  # what the first call has to wait for is no measure of the others
    yield made
    made.close()


def test_requests_that_are_held_go_on_with_the_new_weights(bridge: Bridge) -> None:
    """Every token is what transformers says with the weights of its version after all that stands before it."""
    for turn in range(TRIES):
        said, (old, new) = _over_an_update(bridge, "keep", (turn + 1) / (TRIES + 1))
        if any(set(completion.versions) == {old, new} for completion in said):
            break
    else:
        pytest.fail("no update met a request")
    for prompt, completion in zip(PROMPTS, said, strict=True):
        assert completion.versions == sorted(completion.versions)
        kept = completion.versions.count(old)
        before = prompt + completion.token_ids[:kept]
        tokens, logprobs = models.greedy(bridge.model, before, 0 if before[-1] == models.EOS else TOKENS - kept)
        assert completion.token_ids[kept:] == tokens
        assert np.abs(np.subtract(completion.logprobs[kept:], logprobs)).max(initial=0) <= TOLERANCE
        models.move(bridge.model, bridge.version, back=True)
        tokens, logprobs = models.greedy(bridge.model, prompt, kept)
        models.move(bridge.model, bridge.version)
        assert completion.token_ids[:kept] == tokens
        assert np.abs(np.subtract(completion.logprobs[:kept], logprobs)).max(initial=0) <= TOLERANCE


def test_requests_that_are_aborted_keep_what_they_have(bridge: Bridge) -> None:
    for turn in range(TRIES):
        whole = bridge.say(PROMPTS, max_tokens=TOKENS)
        said, (old, _) = _over_an_update(bridge, "abort", (turn + 1) / (TRIES + 1))
        if any(completion.token_ids and completion.finish_reason == "abort" for completion in said):
            break
    else:
        pytest.fail("no update met a request")
    for completion, full in zip(said, whole, strict=True):
        count = len(completion.token_ids)
        assert completion.token_ids == full.token_ids[:count]
        assert (len(completion.logprobs), completion.versions) == (count, [old] * count)
        assert completion.finish_reason == ("abort" if count < len(full.token_ids) else full.finish_reason)
    assert len(bridge.say(PROMPTS, max_tokens=4)[0].token_ids) == 4


def test_a_pause_that_waits_lets_the_call_end_with_the_old_weights(bridge: Bridge) -> None:
    said, (old, _) = _over_an_update(bridge, "wait", 0.5)
    assert {version for completion in said for version in completion.versions} == {old}
    assert {version for completion in bridge.say(PROMPTS) for version in completion.versions} == {bridge.version}


def _over_an_update(bridge: Bridge, pause: str, part: float) -> tuple[list[Completion], tuple[int, int]]:
    """Greedy completions with an update after that part of the usual time, and the two versions.

    The trainer's weights are the new ones then.
    """
    start = time.monotonic()
    bridge.say(PROMPTS, max_tokens=TOKENS)
    usual = time.monotonic() - start
    models.move(bridge.model, bridge.version + 1)
    bridge.version += 1
    bridge.session.close()
    bridge.session = bridge.session_with(pause=pause)
    bridge.session.publish(bridge.version)
    bridge.session.pull(bridge.version)
    with ThreadPoolExecutor(1) as pool:
        begun: Future[list[Completion]] = pool.submit(bridge.say, PROMPTS, max_tokens=TOKENS)
        time.sleep(usual * part)
        bridge.session.install(bridge.version)
        return begun.result(120), (bridge.version - 1, bridge.version)
