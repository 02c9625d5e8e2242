"""What the control in a server asks of vLLM's engine; real ones are in test_servers."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from rlbridge.errors import ConfigError, DeadlineError, PeerLostError, SyncError
from rlbridge.sync.messages import Wait, pack
from rlbridge_openai.messages import INSTANCE_HEADER, Open
from rlbridge_openai.routes import Session, check_stranger
from rlbridge_openai.vllm_server import Control, _Calls, _has_key


class Engine:
    """Records what it is asked. Ranks answer what is done aside at the third look, one before the other."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.polls: dict[int, int] = {}
        self.asleep = self.paused = self.stuck = False
        self.engine_core = self
        self.vllm_config = SimpleNamespace(model_config=SimpleNamespace(model="a/model"))

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        if self.stuck:
            await asyncio.sleep(30)
        if method == "rlbridge_poll":
            (ticket,) = args
            self.polls[ticket] = self.polls.get(ticket, 0) + 1
            seen = 0 if self.asleep else self.polls[ticket]
            return [b"zero" if seen > 1 else None, b"one" if seen > 2 else None]
        self.calls.append((method, args))
        return [b"zero", b"one"]

    async def pause_scheduler_async(self, mode: str, clear_cache: bool) -> None:
        self.calls.append(("pause", (mode, clear_cache)))
        self.paused = True
        if mode == "wait":
            await asyncio.sleep(30)

    async def resume_generation(self) -> None:
        self.calls.append(("resume", ()))
        self.paused = False

    async def reset_encoder_cache(self) -> None:
        self.calls.append(("reset", ()))

    async def reset_prefix_cache(self, **options: bool) -> bool:
        assert options == {"reset_running_requests": True, "reset_connector": True}
        return True

    async def is_paused(self) -> bool:
        return self.paused

    async def update_weight_version(self, version: str) -> None:
        self.calls.append(("version", (version,)))


def calls_of(engine: Engine) -> _Calls:
    return _Calls(Session(), SimpleNamespace(engine_client=engine))


def ask(calls: _Calls, call: str, method: str = "", body: bytes = b"", **query: str) -> Any:
    return asyncio.run(calls.answer(call, method, query, body))


def test_what_concerns_the_parameters_is_done_between_steps_and_all_else_aside() -> None:
    engine = Engine()
    calls = calls_of(engine)
    for method in ("install", "check", "live_digests", "scramble"):
        assert ask(calls, "ranks", method, b"payload") == [b"zero", b"one"]
    assert engine.calls == [("rlbridge_handle", (m, b"payload")) for m in ("install", "check", "live_digests", "scramble")]
    engine.calls.clear()
    assert ask(calls, "ranks", "start_pull", b"payload") == [b"zero", b"one"]
    ((name, (ticket, method, payload, over)),) = engine.calls
    assert (name, method, payload, over) == ("rlbridge_begin", "start_pull", b"payload", [])
    assert engine.polls == {ticket: 3}
    ask(calls, "ranks", "verify")
    assert engine.calls[-1][1][3] == [ticket]


def test_a_rank_that_does_not_answer_is_not_waited_for_longer_than_asked() -> None:
    engine = Engine()
    calls = calls_of(engine)
    engine.asleep = True
    with pytest.raises(DeadlineError, match=r"a rank did not answer 'verify' within 0\.2 s"):
        ask(calls, "ranks", "verify", seconds="0.2")


@pytest.mark.parametrize("host", ["10.0.0.7", "2001:db8::7"])
def test_a_stranger_is_answered_where_the_server_asks_for_a_key(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RLBRIDGE_INSECURE", raising=False)
    for local in (None, "127.0.0.1", "::1"):
        check_stranger(local, False, "start it with one")
    with pytest.raises(ConfigError, match="asks for no key") as raised:
        check_stranger(host, False, "start it with one")
    assert "start it with one" in str(raised.value)
    check_stranger(host, True, "")
    monkeypatch.setenv("RLBRIDGE_INSECURE", "1")
    check_stranger(host, False, "")


def test_a_key_of_vllm_is_an_argument_or_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "")
    assert not _has_key(SimpleNamespace(api_key=None))
    assert _has_key(SimpleNamespace(api_key=["sk-0"]))
    monkeypatch.setenv("VLLM_API_KEY", "sk-0")
    assert _has_key(SimpleNamespace())


def test_a_pause_that_does_not_come_to_an_end_is_undone() -> None:
    engine = Engine()
    calls = calls_of(engine)
    with pytest.raises(DeadlineError, match=r"requests still ran 0\.1 s after the pause \(wait\)"):
        ask(calls, "pause", mode="wait", seconds="0.1")
    assert engine.calls == [("pause", ("wait", False)), ("resume", ())]


def test_the_next_run_finds_nothing_of_the_last_one() -> None:
    engine = Engine()
    calls = calls_of(engine)
    message = pack(Open("generator[0]", "auto"))
    opened = ask(calls, "open", body=message)
    assert opened.ranks == [b"zero", b"one"]
    first = list(engine.calls)
    assert first == [("rlbridge_open", ("generator[0]", "auto", "a/model")), ("version", ("0",))]
    ask(calls, "pause", mode="keep")
    engine.calls.clear()
    again = ask(calls, "open", body=message)
    assert again.instance != opened.instance
    with pytest.raises(PeerLostError, match="another run has opened this server"):
        calls._session.check(opened.instance)
    told = ["pause", "resume", "rlbridge_begin", "rlbridge_score_at", "reload_weights", "reset", "rlbridge_open", "version"]
    assert [name for name, _ in engine.calls] == told
    assert engine.calls[0][1][0] == "abort"
    assert engine.calls[2][1][1] == "close"


def test_a_pause_that_is_late_does_not_end_that_of_the_next_run() -> None:
    engine = Engine()
    calls = calls_of(engine)

    async def overtaken() -> None:
        late = asyncio.ensure_future(calls.answer("pause", "", {"mode": "wait", "seconds": "0.2"}, b""))
        await asyncio.sleep(0.05)
        calls._session.renew()
        with pytest.raises(DeadlineError):
            await late

    asyncio.run(overtaken())
    assert engine.calls == [("pause", ("wait", False))]


def test_ranks_that_are_stuck_are_not_waited_for_longer_than_asked() -> None:
    """And not by vLLM's own timeout, after which the next call would be given the answers of this one."""
    engine = Engine()
    engine.stuck = True
    with pytest.raises(DeadlineError, match=r"the ranks did not answer 'rlbridge_handle' within 0\.1 s"):
        ask(calls_of(engine), "ranks", "install", seconds="0.1")


def test_a_wait_for_bytes_may_take_as_long_as_it_says() -> None:
    engine = Engine()
    calls = calls_of(engine)
    engine.asleep = True
    payload = msgspec.msgpack.encode([pack(Wait(1, 0.3))])
    with pytest.raises(DeadlineError, match=r"a rank did not answer 'wait_pull' within 0\.4 s"):
        ask(calls, "ranks", "wait_pull", payload, seconds="0.1")


def test_an_unknown_call_is_told() -> None:
    with pytest.raises(SyncError, match="is its rlbridge another version"):
        ask(calls_of(Engine()), "dance")


def test_every_answer_names_the_process_and_other_connections_pass() -> None:
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})
        await send({"type": "http.response.body", "body": b""})

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {}

    asyncio.run(Control(app)({"type": "http"}, receive, send))
    names = dict(sent[0]["headers"])
    assert names[b"a"] == b"b"
    assert len(names[INSTANCE_HEADER.encode()]) == 16
    assert sent[1] == {"type": "http.response.body", "body": b""}
