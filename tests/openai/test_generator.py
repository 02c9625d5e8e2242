"""The generator against a stand-in: what is sent, what is made of the answers, and what of the lack of them."""

from __future__ import annotations

import pickle
import threading
import time
import traceback
from typing import Any

import msgspec
import pytest

from rlbridge.errors import ConfigError, DataError, DeadlineError, PeerLostError, RlbridgeError, to_wire
from rlbridge.roles.batch import Completion, Sampling, pad_sequences
from rlbridge.sync.messages import answer
from tests.openai.server_process import generator_of
from tests.openai.stand_in import FACTS, Answer, Request, StandIn, after, completion, first

PROMPTS = [[5, 9, 12], [7], [4, 30], [20, 21, 22, 23]]
SAMPLING = Sampling(max_tokens=3)
PATH = "/v1/completions"
KEY = "sk-SECRET-of-the-tests-0123"


def test_completions_come_in_order_though_the_first_takes_longest(server: StandIn) -> None:
    def route(request: Any) -> Any:
        time.sleep(0.2 if request.json()["prompt"] == PROMPTS[0] else 0)
        return 200, completion([request.json()["prompt"][0]])

    server.routes[PATH] = route
    generator = generator_of(server.url)
    assert [c.token_ids for c in generator.generate(PROMPTS, SAMPLING)] == [[5], [7], [4], [20]]


def test_what_is_sent_is_all_of_the_sampling(server: StandIn) -> None:
    sampling = Sampling(7, 0.5, 0.9, 20, stop=("a",), stop_token_ids=(9,), seed=3)
    generator_of(f"{server.url}/v1").generate([[5, 9], [5, 9]], sampling)
    one, other = [request.json() for request in sorted(server.of(PATH), key=lambda r: r.json()["seed"])]
    assert one.pop("seed") != other.pop("seed")
    assert one == other
    wanted = {"model": "served", "prompt": [5, 9], "max_tokens": 7, "top_p": 0.9, "top_k": 20, "stop": ["a"]}
    assert wanted.items() <= one.items()
    assert one["stop_token_ids"] == [1, 9]
    assert (one["temperature"], one["vllm_xargs"]) == (1.0, {"rlbridge_temperature": 0.5})
    server.seen.clear()
    generator_of(server.url).generate([[5]], Sampling(7, 0.0))
    assert server.of(PATH)[0].json()["temperature"] == 0
    assert not {"seed", "vllm_xargs"} & server.of(PATH)[0].json().keys()


def test_no_more_requests_are_under_way_than_the_limit(server: StandIn) -> None:
    server.routes[PATH] = after(0.05, (200, completion([3])))
    generator = generator_of(server.url, concurrency=3)
    server.most = 0
    generator.generate([[5]] * 12, SAMPLING)
    assert server.most == 3


def test_the_tokens_api_tells_the_version_of_each_token(server: StandIn) -> None:
    content = [{"token_id": t, "logprob": -0.5} for t in (3, 4, 5)]
    spans = [{"version": "6", "start": 0, "end": 1}, {"version": "7", "start": 1, "end": 3}]
    choice = {"token_ids": [3, 4, 5], "logprobs": {"content": content}, "finish_reason": "length", "weight_versions": spans}
    server.routes["/inference/v1/generate"] = lambda request: (200, {"choices": [choice]})
    server.facts = msgspec.structs.replace(FACTS, apis=["completions", "tokens"])
    generator = generator_of(server.url)
    generator.version = 5
    assert generator.generate([[5]], SAMPLING) == [Completion([3, 4, 5], [-0.5] * 3, [6, 7, 7], "length")]


def test_an_sglang_is_asked_in_its_own_words(server: StandIn) -> None:
    spans = [{"version": "6", "start": 0, "end": 1}, {"version": "7", "start": 1, "end": 3}]
    meta = {
        "output_token_logprobs": [[-0.5, token, None] for token in (3, 4, 5)],
        "finish_reason": {"type": "length"},
        "weight_versions": spans,
    }
    server.routes["/generate"] = lambda request: (200, {"output_ids": [3, 4, 5], "meta_info": meta})
    server.facts = msgspec.structs.replace(FACTS, server="SGLang", apis=["tokens"])
    generator = generator_of(server.url)
    sampling = Sampling(7, 0.5, 0.9, stop=("a",), stop_token_ids=(9,), seed=3)
    assert generator.generate([[5, 9]], sampling) == [Completion([3, 4, 5], [-0.5] * 3, [6, 7, 7], "length")]
    (sent,) = [request.json() for request in server.of("/generate")]
    assert sent["input_ids"] == [5, 9]
    told = sent["sampling_params"]
    assert 0 <= told.pop("sampling_seed") < 2**31
    assert (told["max_new_tokens"], told["temperature"], told["top_p"], told["top_k"]) == (7, 0.5, 0.9, -1)
    assert (told["stop"], told["stop_token_ids"], told["no_stop_trim"]) == (["a"], [9], True)

    aborted = {"output_token_logprobs": [], "finish_reason": {"type": "abort", "message": "Abort before prefill"}}
    server.routes["/generate"] = lambda request: (200, {"output_ids": [7], "meta_info": aborted})
    assert generator.generate([[5]], SAMPLING) == [Completion([], [], [], "abort")]


def test_an_sglang_scores_at_the_temperature_of_the_request(server: StandIn) -> None:
    told = [[None, 5, None], [-0.1, 6, None], [-0.2, 7, None]]
    server.routes["/generate"] = lambda request: (200, {"output_ids": [], "meta_info": {"input_token_logprobs": told}})
    server.facts = msgspec.structs.replace(FACTS, server="SGLang", apis=["tokens"])
    generator = generator_of(server.url)
    scores_BT = generator.score(pad_sequences([[5]], [[6, 7]], temperature=2.0))
    assert scores_BT.tolist() == [[0.0, pytest.approx(-0.1), pytest.approx(-0.2)]]
    assert server.of("/generate")[0].json()["sampling_params"]["temperature"] == 2.0
    assert not [request for request in server.seen if request.path.endswith("score_at")]
    with pytest.raises(RlbridgeError, match="no input_token_logprobs of every token"):
        generator.score(pad_sequences([[5]], [[6, 8]], temperature=2.0))


def test_completions_carry_the_version_at_which_they_were_asked_for(server: StandIn) -> None:
    generator = generator_of(server.url)
    generator.version = 5
    assert generator.generate([[5]], SAMPLING)[0].versions == [5, 5, 5]
    assert "version=5" in server.of("/v1/rlbridge/version")[0].query


def test_a_completion_of_which_nobody_can_say_the_version_is_asked_for_again(server: StandIn) -> None:
    generator = generator_of(server.url)

    def route(request: Any) -> Any:
        if generator.version < 2:
            generator.version += 1
        return 200, completion([3])

    server.routes[PATH] = route
    assert generator.generate([[5]], SAMPLING)[0].versions == [2]
    assert len(server.of(PATH)) == 3


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_a_request_is_repeated_while_the_server_cannot(server: StandIn, status: int) -> None:
    server.routes[PATH] = first(2, (status, {"error": "not now"}), lambda request: (200, completion([3])))
    assert generator_of(server.url).generate([[5]], SAMPLING)[0].token_ids == [3]
    assert len(server.of(PATH)) == 3


def test_a_request_is_repeated_when_the_connection_breaks(server: StandIn) -> None:
    server.routes[PATH] = first(2, None, lambda request: (200, completion([3])))
    assert generator_of(server.url).generate([[5]], SAMPLING)[0].token_ids == [3]


def test_a_server_is_left_alone_for_as_long_as_it_asks(server: StandIn) -> None:
    server.routes[PATH] = first(1, (429, {}, {"Retry-After": "0.6"}), lambda request: (200, completion([3])))
    start = time.monotonic()
    generator_of(server.url).generate([[5]], SAMPLING)
    assert time.monotonic() - start >= 0.6


def test_a_server_that_goes_on_failing_is_given_up(server: StandIn) -> None:
    generator = generator_of(server.url, retry_seconds=0.5)
    server.routes[PATH] = lambda request: (503, {"error": "no room"})
    with pytest.raises(DeadlineError, match=r"failed for 0\.5 s at /v1/completions; at last it answered 503: .*no room"):
        generator.generate(PROMPTS, SAMPLING)


def test_a_server_that_does_not_answer_ends_the_call_at_its_deadline(server: StandIn) -> None:
    generator = generator_of(server.url, request_seconds=0.5)
    server.routes[PATH] = after(5, (200, completion([3])))
    with pytest.raises(DeadlineError, match=r"did not answer a request to /v1/completions in time"):
        generator.generate(PROMPTS, SAMPLING)


def test_a_server_that_is_gone_is_named(server: StandIn) -> None:
    generator = generator_of(server.url, retry_seconds=0.3)
    server.stop()
    for call in (lambda: generator.generate(PROMPTS, SAMPLING), generator.resume, lambda: generator.on_each_rank("state", b"")):
        with pytest.raises(PeerLostError, match=r"which is generator\[0\], is gone") as raised:
            call()
        assert raised.value.where["peer"] == server.url
    with pytest.raises(ConfigError, match=f"no server answers at {server.url}"):
        generator_of(server.url, retry_seconds=0.3)


def test_a_server_that_was_started_anew_is_not_taken_for_the_one_that_was_synced(server: StandIn) -> None:
    generator = generator_of(server.url)
    generator.generate(PROMPTS, SAMPLING)
    server.instance = "another"
    with pytest.raises(PeerLostError, match="was started anew, or another run has opened it"):
        generator.generate(PROMPTS, SAMPLING)


def test_a_call_of_a_sync_that_may_have_begun_is_not_repeated(server: StandIn) -> None:
    generator = generator_of(server.url, retry_seconds=1.0)
    path = "/v1/rlbridge/ranks/install"
    server.routes[path] = lambda request: None
    with pytest.raises(PeerLostError, match="the connection broke"):
        generator.on_each_rank("install", b"")
    assert len(server.of(path)) == 1
    server.routes[path] = first(1, (503, {}), lambda request: (200, answer(lambda: [b"done"])))
    assert generator.on_each_rank("install", b"payload") == [b"done"]
    assert server.of(path)[-1].body == b"payload"


def test_an_error_in_the_server_arrives_as_it_was_raised(server: StandIn) -> None:
    def failing() -> None:
        raise DeadlineError("a rank is asleep", phase="install")

    generator = generator_of(server.url)
    server.routes["/v1/rlbridge/ranks/install"] = lambda request: (200, answer(failing))
    with pytest.raises(DeadlineError, match=r"a rank is asleep \[role generator, rank generator\[0\], phase install\]"):
        generator.on_each_rank("install", b"")


MALFORMED: dict[str, Any] = {
    "no json": b"<html>hello</html>",
    "no choices": {"choices": []},
    "another type": ["choices"],
    "no ids": {"choices": [{"text": "abc", "logprobs": {"token_logprobs": [-0.5]}, "finish_reason": "stop"}]},
    "no log-probs": {"choices": [{"token_ids": [3], "logprobs": None, "finish_reason": "stop"}]},
    "too few": {"choices": [{"token_ids": [3, 4], "logprobs": {"token_logprobs": [-0.5]}, "finish_reason": "stop"}]},
    "no number": {"choices": [{"token_ids": [3], "logprobs": {"token_logprobs": [None]}, "finish_reason": "stop"}]},
    "vLLM's for none": {"choices": [{"token_ids": [3], "logprobs": {"token_logprobs": [-9999.0]}, "finish_reason": "stop"}]},
    "an error as reason": {"choices": [{"token_ids": [3], "logprobs": {"token_logprobs": [-0.5]}, "finish_reason": "error"}]},
    "ids that are words": {"choices": [{"token_ids": ["a"], "logprobs": {"token_logprobs": [-0.5]}, "finish_reason": "stop"}]},
}


@pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED)
def test_an_answer_that_cannot_be_used_is_refused(server: StandIn, body: Any) -> None:
    generator = generator_of(server.url)
    server.routes[PATH] = lambda request: (200, body)
    with pytest.raises(RlbridgeError, match="the server's answer to /v1/completions cannot be used: "):
        generator.generate([[5]], SAMPLING)


def test_an_answer_that_cannot_be_unpacked_is_none(server: StandIn) -> None:
    generator = generator_of(server.url, retry_seconds=0.2)
    server.routes[PATH] = lambda request: (200, b"no gzip", {"Content-Encoding": "gzip"})
    with pytest.raises(PeerLostError, match="the connection broke"):
        generator.generate([[5]], SAMPLING)


def test_what_a_server_refuses_is_not_repeated(server: StandIn) -> None:
    generator = generator_of(server.url)
    server.routes[PATH] = lambda request: (400, {"error": "top_p must be in (0, 1]"})
    with pytest.raises(DataError, match=r"refuses a request to /v1/completions with 400: .*top_p must be"):
        generator.generate([[5]], SAMPLING)
    assert len(server.of(PATH)) == 1


def test_an_abort_ends_what_has_not_begun_and_what_the_server_answers_with_an_error(server: StandIn) -> None:
    aborted = threading.Event()

    def answer(_: Request) -> Answer:
        aborted.wait(30)
        return 500, {"error": "Did not output logprobs"}

    server.routes[PATH] = answer
    generator = generator_of(server.url, concurrency=2, retry_seconds=20.0)
    found: list[Completion] = []
    thread = threading.Thread(target=lambda: found.extend(generator.generate([[5]] * 6, SAMPLING)))
    thread.start()
    limit = time.monotonic() + 30
    while len(server.of(PATH)) < 2 and time.monotonic() < limit:
        time.sleep(0.01)
    generator.pause("abort")
    aborted.set()
    thread.join(30)
    assert found == [Completion([], [], [], "abort")] * 6
    assert len(server.of(PATH)) == 2


def test_the_key_reaches_the_server_and_nothing_else(server: StandIn, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    caplog.set_level("DEBUG")
    generator = generator_of(server.url, api_key_variable="MY_KEY")
    generator.generate([[5]], SAMPLING)
    assert {request.headers["authorization"] for request in server.seen} == {f"Bearer {KEY}"}

    def echo(status: int) -> Any:
        return lambda request: (status, {"error": f"what did you mean by {request.headers}"})

    calls = {400: DataError, 401: ConfigError, 403: ConfigError, 418: DataError, 503: DeadlineError, 200: RlbridgeError}
    generator = generator_of(server.url, api_key_variable="MY_KEY", retry_seconds=0.2)
    for status, kind in calls.items():
        server.routes[PATH] = echo(status)
        with pytest.raises(kind) as raised:
            generator.generate([[5]], SAMPLING)
        error = raised.value
        shown = "".join(traceback.format_exception(error)) + repr(error) + repr(to_wire(error)) + repr(pickle.dumps(error))
        assert KEY not in shown
        assert error.__cause__ is None
    server.routes["/v1/rlbridge/resume"] = lambda request: (200, str(request.headers).encode())
    with pytest.raises(RlbridgeError) as raised:
        generator.resume()
    assert KEY not in "".join(traceback.format_exception(raised.value))
    held = [vars(generator), vars(generator._client), vars(generator._client._http), generator._client._http.headers]
    assert KEY not in repr(held)
    assert KEY not in msgspec.json.encode(generator._options.model_dump()).decode()
    assert KEY not in caplog.text
