from __future__ import annotations

import logging
import pickle

import msgspec
import pytest

from rlbridge.errors import DigestError, RlbridgeError
from rlbridge.sync.messages import Nothing, State, Wait, answer, longest_wait, pack, result, unpack


def test_a_message_comes_back_as_it_was() -> None:
    assert unpack(pack(Wait(3, 1.5, "abc.2")), Wait) == Wait(3, 1.5, "abc.2")
    assert result(answer(lambda: State("ready", 4)), State) == State("ready", 4)


def test_a_call_that_waits_for_bytes_says_how_long_at_most() -> None:
    payload = msgspec.msgpack.encode([pack(Wait(3, 1.5)), pack(Wait(3, 900.0))])
    assert longest_wait("wait_pull", payload) == 900.0
    assert longest_wait("verify", payload) == 0.0


def test_our_error_crosses_whole_and_without_a_log_entry(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> object:
        raise DigestError("a byte is wrong", todo="sync again", peer="trainer[1]", version=3, phase="verify", tensor="q")

    with pytest.raises(DigestError) as caught:
        result(answer(fail), Nothing)
    assert caught.value.where == {"peer": "trainer[1]", "version": "3", "phase": "verify", "tensor": "q"}
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert not caplog.records


def test_another_error_crosses_as_text_and_leaves_its_traceback_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> object:
        raise ZeroDivisionError("by zero")

    with caplog.at_level(logging.ERROR), pytest.raises(RlbridgeError, match="ZeroDivisionError: by zero"):
        result(answer(fail), Nothing)
    assert caplog.records[0].exc_info is not None
    assert caplog.records[0].exc_info[0] is ZeroDivisionError
