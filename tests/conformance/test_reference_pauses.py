"""Pauses of the reference generator: what becomes of requests that run, that wait and that come."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlbridge.errors import DeadlineError
from rlbridge.roles.batch import Completion, Sampling, pad_sequences
from rlbridge_conformance.reference.generator import ReferenceGenerator
from tests.conformance.reference_parties import make_generator

LONG = 200
"""Tokens of a completion that a test interrupts."""


def test_keep_holds_requests_and_they_go_on_with_new_weights(untied: Path) -> None:
    generator = make_generator(untied, token_seconds=0.002)
    with running(generator, [[5, 9, 11, 4, 8], [7, 7]]) as call:
        generator.pause("keep")
        held = [len(request.completion.token_ids) for request in generator.requests]
        time.sleep(0.05)
        assert held == [len(request.completion.token_ids) for request in generator.requests]
        for tensor in generator.ranks[0].parameters.values():
            tensor.mul_(1.2)
        generator.refresh(generator.ranks[0])
        generator.invalidate_caches()
        generator.version = 1
        generator.resume()
        completions = call()
    prompts = [[5, 9, 11, 4, 8], [7, 7]]
    scores_BT = generator.score(pad_sequences(prompts, [c.token_ids for c in completions]))
    for row, completion in enumerate(completions):
        first = completion.versions.index(1)
        assert completion.versions == [0] * first + [1] * (LONG - first)
        assert first == held[row]
        start = len(prompts[row]) + first
        np.testing.assert_allclose(scores_BT[row, start : len(prompts[row]) + LONG], completion.logprobs[first:], atol=1e-4)


def test_wait_lets_running_requests_end_and_others_wait(untied: Path) -> None:
    generator = make_generator(untied, batch=1, token_seconds=0.0005)
    with running(generator, [[5, 6], [7, 8]]) as call:
        generator.pause("wait")
        first, second = generator.requests
        assert (first.completion.finish_reason, len(first.completion.token_ids)) == ("length", LONG)
        time.sleep(0.02)
        assert (second.state, second.completion.token_ids) == ("waiting", [])
        generator.version = 1
        generator.resume()
        completions = call()
    assert [set(c.versions) for c in completions] == [{0}, {1}]


def test_abort_ends_requests_with_what_they_have(untied: Path) -> None:
    generator = make_generator(untied, batch=1, token_seconds=0.002)
    with running(generator, [[5, 6], [7, 8]]) as call:
        generator.pause("abort")
        completions = call()
    assert [c.finish_reason for c in completions] == ["abort", "abort"]
    assert 0 < len(completions[0].token_ids) < LONG
    assert completions[1].token_ids == []
    generator.resume()
    assert generator.generate([[5]], Sampling(3))[0].finish_reason == "length"


@pytest.mark.parametrize("mode", ["keep", "wait", "abort"])
def test_calls_in_a_pause_wait_for_its_end(untied: Path, mode: Any) -> None:
    generator = make_generator(untied, pause_seconds=0.1)
    generator.pause(mode)
    with pytest.raises(DeadlineError, match=f"paused \\({mode}\\), and no request could begin within 0.1 s"):
        generator.generate([[5]], Sampling(3))
    assert generator.requests == []
    generator.options = generator.options.model_copy(update={"pause_seconds": 30.0})
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(generator.generate, [[5]], Sampling(3))
        time.sleep(0.02)
        generator.version = 4
        generator.resume()
        assert call.result(30)[0].versions == [4, 4, 4]


def test_pause_that_waits_too_long_says_so(untied: Path) -> None:
    generator = make_generator(untied, pause_seconds=0.1, token_seconds=0.01)
    with running(generator, [[5]]) as call:
        with pytest.raises(DeadlineError, match="running requests did not end"):
            generator.pause("wait")
        generator.pause("abort")
        call()


class running:  # noqa: N801  (used as a function)
    """A call of `generate` on a thread of its own, some tokens on its way; gives what waits for its completions."""

    def __init__(self, generator: ReferenceGenerator, prompts: list[list[int]]) -> None:
        self._generator, self._prompts = generator, prompts
        self._found: list[Completion] = []

    def __enter__(self) -> Callable[[], list[Completion]]:
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        limit = time.monotonic() + 10
        while not (requests := self._generator.requests) or len(requests[0].completion.token_ids) < 3:
            assert time.monotonic() < limit
            time.sleep(0.001)
        return self._result

    def __exit__(self, *_: object) -> None:
        self._generator.pause("abort")
        self._thread.join(10)
        self._generator.resume()
        assert not self._thread.is_alive()

    def _run(self) -> None:
        self._found = self._generator.generate(self._prompts, Sampling(LONG, seed=1))

    def _result(self) -> list[Completion]:
        self._thread.join(20)
        assert self._found
        return self._found
