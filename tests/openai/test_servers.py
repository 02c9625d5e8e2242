"""The backend on real servers of vLLM and SGLang. Every test but the last two leaves one as it can be used by the next."""

from __future__ import annotations

import copy
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlbridge.errors import ConfigError, DataError, PeerLostError
from rlbridge.roles.batch import Completion, Sampling, pad_sequences
from rlbridge.sync.session import SyncSession
from rlbridge_openai.generator import OpenAIGenerator
from rlbridge_openai.start import START, START_SGLANG
from tests.openai.server_process import KEY, LONGEST, Bridge, ServerProcess, SglangProcess, generator_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PROMPTS = [[5, 9, 12], [7], [4, 30, 31, 32, 6, 8, 9], [20, 21, 22, 23]]
TOLERANCE = 5e-5


@pytest.fixture(scope="module", autouse=True)
def key() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", KEY)
        yield


@pytest.fixture
def bridge(real: ServerProcess, request: pytest.FixtureRequest) -> Iterator[Bridge]:
    found = Bridge(real, api=getattr(request, "param", "tokens"))
    yield found
    found.close()


each_api = pytest.mark.parametrize("bridge", ["tokens", "completions"], indirect=True)
"""SGLang has one of them; the other is refused at the start."""


@pytest.fixture(autouse=True)
def skip_what_a_server_has_not(kind: type[ServerProcess], request: pytest.FixtureRequest) -> None:
    if kind is SglangProcess and "completions" in request.node.callspec.params.values():
        pytest.skip("SGLang's completions tell no token ids")


def logprobs(model: Any, tokens: list[int], temperature: float = 1.0) -> np.ndarray[Any, Any]:
    """Of each token after the first, by transformers."""
    with torch.no_grad():
        logits_TV = model(torch.tensor([tokens])).logits[0, :-1].float() / temperature
    return logits_TV.log_softmax(-1).gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0].numpy()


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    with torch.no_grad():
        while len(tokens) < len(prompt) + count and (len(tokens) == len(prompt) or tokens[-1] != 1):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def agrees(model: Any, completions: list[Completion], temperature: float = 1.0) -> None:
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        wanted = logprobs(model, prompt + completion.token_ids, temperature)[len(prompt) - 1 :]
        np.testing.assert_allclose(completion.logprobs, wanted, atol=TOLERANCE, rtol=0)


@each_api
def test_tokens_and_logprobs_are_those_of_transformers_before_and_after_a_sync(bridge: Bridge) -> None:
    session = bridge.session()
    for version in (1, 2):
        bridge.change(version)
        report = session.sync(version)
        assert "nixl" in str(report)
        said = bridge.engine.generate(PROMPTS, Sampling(max_tokens=12, temperature=0.0))
        assert [c.token_ids for c in said] == [greedy(bridge.model, prompt, 12) for prompt in PROMPTS]
        assert {v for c in said for v in c.versions} == {version}
        agrees(bridge.model, said)
        for temperature in (1.0, 0.7):
            sampled = bridge.engine.generate(PROMPTS, Sampling(12, temperature, top_k=20, top_p=0.9, seed=3))
            agrees(bridge.model, sampled, temperature)
            scores_BT = bridge.engine.score(pad_sequences(PROMPTS, [c.token_ids for c in sampled], temperature=temperature))
            for prompt, completion, row_T in zip(PROMPTS, sampled, scores_BT, strict=True):
                end = len(prompt) + len(completion.token_ids)
                np.testing.assert_allclose(row_T[len(prompt) : end], completion.logprobs, atol=TOLERANCE, rtol=0)
                assert not row_T[: len(prompt)].any()
                assert not row_T[end:].any()


@pytest.mark.parametrize("api", ["tokens", "completions"])
def test_a_seed_fixes_the_tokens_and_stops_are_kept_to(real: ServerProcess, api: str) -> None:
    generator = generator_of(real.url, api=api)
    drawn = [generator.generate(PROMPTS, Sampling(max_tokens=12, seed=seed)) for seed in (1, 1, 2)]
    tokens = [[c.token_ids for c in completions] for completions in drawn]
    assert tokens[0] == tokens[1] != tokens[2]
    first = tokens[0][0]
    stopped = generator.generate(PROMPTS[:1], Sampling(max_tokens=12, seed=1, stop_token_ids=(first[3],)))[0]
    assert stopped.token_ids == first[: first.index(first[3]) + 1]
    assert stopped.finish_reason == "stop"
    assert generator.generate(PROMPTS, Sampling(max_tokens=0)) == [Completion([], [], [], "length")] * len(PROMPTS)


def test_a_sequence_as_long_as_the_server_takes_is_scored(bridge: Bridge, real: ServerProcess) -> None:
    bridge.session().sync(1)
    rows = [[5] * 10, [7] * 30]
    longest = LONGEST if real.kind == "vLLM" else LONGEST - 7  # SGLang keeps those for itself
    completions = [[6 + n % 50 for n in range(longest - 10)], [8] * 5]
    for temperature in (1.0, 2.0):
        scores_BT = bridge.engine.score(pad_sequences(rows, completions, temperature=temperature))
        for prompt, completion, row_T in zip(rows, completions, scores_BT, strict=True):
            wanted = logprobs(bridge.model, prompt + completion, temperature)[len(prompt) - 1 :]
            np.testing.assert_allclose(row_T[len(prompt) : len(prompt) + len(completion)], wanted, atol=TOLERANCE, rtol=0)


MANY = [[n] for n in range(3, 60)]


def over_an_update(
    bridge: Bridge,
    session: SyncSession,
    happened: Callable[[list[Completion]], bool],
    change_to: Callable[[int], None] = lambda version: None,
) -> list[Completion]:
    """What is said while the next version is installed, which has been pulled before; again until it `happened` in time."""
    for _ in range(10):
        version = session.version + 1
        change_to(version)
        session.publish(version)
        session.pull(version)
        found: list[Completion] = []
        sampling = Sampling(max_tokens=120, seed=1)
        thread = threading.Thread(target=lambda f=found, s=sampling: f.extend(bridge.engine.generate(MANY, s)))
        thread.start()
        time.sleep(0.15)
        session.install(version)
        thread.join(60)
        assert len(found) == len(MANY)
        assert all(len(c.token_ids) == len(c.logprobs) == len(c.versions) for c in found)
        if happened(found):
            return found
    raise AssertionError("in ten attempts no request was running at the update")


def test_requests_that_are_held_over_a_sync_say_which_version_made_which_token(bridge: Bridge) -> None:
    session = bridge.session(pause="keep")
    session.sync(1)
    models = {1: copy.deepcopy(bridge.model)}

    def next_model(version: int) -> None:
        bridge.change(version)
        models[version] = copy.deepcopy(bridge.model)

    mixed = over_an_update(bridge, session, lambda said: any(len(set(c.versions)) > 1 for c in said), next_model)
    assert all(c.versions == sorted(c.versions) for c in mixed)
    for prompt, completion in zip(MANY, mixed, strict=True):
        wanted = {version: logprobs(model, prompt + completion.token_ids) for version, model in models.items()}
        told = [wanted[version][place] for place, version in enumerate(completion.versions)]
        np.testing.assert_allclose(completion.logprobs, told, atol=TOLERANCE, rtol=0)


@each_api
def test_requests_that_are_aborted_end_with_what_they_have(bridge: Bridge) -> None:
    session = bridge.session(pause="abort")
    session.sync(1)
    over_an_update(bridge, session, lambda said: "abort" in {c.finish_reason for c in said})
    assert bridge.engine.generate(PROMPTS, Sampling(max_tokens=3))[0].versions[0] == session.version


def test_holding_requests_needs_the_api_that_tells_versions(real: ServerProcess) -> None:
    if real.kind == "SGLang":
        pytest.skip("it has no other")
    generator = generator_of(real.url, api="completions")
    with pytest.raises(ConfigError, match=r"generator\.api=tokens"):
        generator.pause("keep")


def test_what_the_server_refuses_is_told_as_it_says_it(real: ServerProcess) -> None:
    generator = generator_of(real.url)
    with pytest.raises(DataError, match="top_p"):
        generator.generate(PROMPTS, Sampling(max_tokens=4, top_p=7.0))
    with pytest.raises(DataError, match="prompt 1 has no tokens"):
        generator.generate([[5], []], Sampling(max_tokens=4))
    with pytest.raises(DataError, match="the token 67"):
        generator.generate([[5, 67]], Sampling(max_tokens=4))
    with pytest.raises(DataError, match="prompt 0 has 128 tokens"):
        generator.generate([[5] * LONGEST], Sampling(max_tokens=4))


def test_the_control_asks_for_the_servers_key(real: ServerProcess) -> None:
    for call in ("facts", "resume", "ranks/state"):
        with pytest.raises(urllib.error.HTTPError) as raised:
            urllib.request.urlopen(f"{real.url}/v1/rlbridge/{call}", data=b"", timeout=20)
        assert raised.value.code == 401
        raised.value.close()


def test_the_next_run_begins_with_the_checkpoint_of_the_server(real: ServerProcess) -> None:
    left: list[tuple[Bridge, threading.Thread]] = []
    for seed in (21, 22):
        bridge = Bridge(real)
        agrees(bridge.model, bridge.engine.generate(PROMPTS, Sampling(max_tokens=12, temperature=0.0)))
        assert set(bridge.generator.installs) == {"direct"}
        bridge.change(seed)
        bridge.session().sync(1)
        agrees(bridge.model, bridge.engine.generate(PROMPTS, Sampling(max_tokens=12, temperature=0.0)))
        # As a run that is killed in mid-update would: nobody resumes what was under way.
        thread = threading.Thread(target=_error, args=(bridge.generator,))
        thread.start()
        time.sleep(0.3)
        bridge.generator.pause("keep")
        left.append((bridge, thread))
    generator = generator_of(real.url)
    assert {v for c in generator.generate(PROMPTS, Sampling(max_tokens=2)) for v in c.versions} == {0}
    for bridge, thread in left:
        with pytest.raises(PeerLostError, match="another run has opened it"):
            bridge.generator.resume()
        thread.join(60)
        assert not thread.is_alive()
        bridge.close()


def test_a_wrong_key_a_wrong_model_and_a_wrong_dtype_are_refused_at_the_start(
    real: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"it serves tiny, and generator\.model is huge"):
        generator_of(real.url, model="huge")
    with pytest.raises(ConfigError, match=r"its parameters are float32, and generator\.dtype is bfloat16"):
        generator_of(real.url, dtype="bfloat16")
    with pytest.raises(ConfigError, match="use control=auto"):
        generator_of(real.url, control="none")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-another-0123")
    with pytest.raises(ConfigError, match="it answered 401") as raised:
        generator_of(real.url)
    assert "sk-another" not in f"{raised.value!r} {raised.value}"
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ConfigError, match="OPENAI_API_KEY is not set"):
        generator_of(real.url)


def test_a_server_that_is_killed_is_named_within_bounds(real: ServerProcess) -> None:
    generator = generator_of(real.url)
    raised: list[BaseException] = []
    thread = threading.Thread(target=lambda: raised.append(_error(generator)))
    thread.start()
    time.sleep(0.3)
    real.kill()
    thread.join(30)
    assert isinstance(raised[0], PeerLostError)
    assert real.url in str(raised[0])
    assert "generator[0]" in str(raised[0])
    with pytest.raises(PeerLostError, match="is gone"):
        generator.on_each_rank("state", b"\x90")


def test_a_server_that_was_started_without_the_control_is_refused_with_what_to_do(real: ServerProcess, tmp_path: Path) -> None:
    # The module's own server has been killed: one at a time is enough for a small machine.
    with type(real)(real.python, tmp_path, plain=True) as plain, pytest.raises(ConfigError) as raised:
        generator_of(plain.url)
    message = str(raised.value)
    assert f"it is {'vLLM 0.' if real.kind == 'vLLM' else 'an SGLang server'}" in message
    assert "answered 404" in message
    assert {"vLLM": START, "SGLang": START_SGLANG}[real.kind] in message


def _error(generator: OpenAIGenerator) -> BaseException:
    try:
        while True:
            generator.generate(PROMPTS, Sampling(max_tokens=100))
    except BaseException as error:
        return error
