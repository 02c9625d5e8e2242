"""Where the workers of a verl job leave messages: nobody waits for ever, and a failure reaches all."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from rlbridge_verl.wire.meeting import SETUP, Answer, Meeting


def held(with_meeting: Callable[[Meeting], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        return await with_meeting(Meeting())

    return asyncio.run(run())


def answer(raw: bytes) -> Answer:
    return msgspec.msgpack.decode(raw, type=Answer)


def test_who_waits_gets_all_once_all_are_there() -> None:
    async def talk(meeting: Meeting) -> bytes:
        waiting = asyncio.ensure_future(meeting.get(1, ["a", "b"], 30.0))
        await meeting.put(1, "a", b"1")
        await asyncio.sleep(0)
        assert not waiting.done()
        await meeting.put(1, "b", b"2")
        return await waiting

    assert answer(held(talk)) == Answer({"a": b"1", "b": b"2"})


def test_what_is_missing_at_the_deadline_is_missing_in_the_answer() -> None:
    async def talk(meeting: Meeting) -> bytes:
        await meeting.put(1, "a", b"1")
        return await meeting.get(1, ["a", "b"], 0.01)

    assert answer(held(talk)) == Answer({"a": b"1"})


def test_a_failure_wakes_all_and_the_first_one_stays() -> None:
    async def talk(meeting: Meeting) -> list[bytes]:
        waiting = asyncio.ensure_future(meeting.get(1, ["a"], 30.0))
        await asyncio.sleep(0)
        await meeting.fail(b"first")
        await meeting.fail(b"second")
        return [await waiting, await meeting.get(2, ["b"], 30.0)]

    assert [answer(raw).failure for raw in held(talk)] == [b"first", b"first"]


def test_a_new_sync_forgets_the_last_one_and_keeps_the_set_up() -> None:
    async def talk(meeting: Meeting) -> list[bytes]:
        await meeting.put(SETUP, "opened", b"0")
        await meeting.put(1, "a", b"1")
        await meeting.put(2, "a", b"2")
        return [await meeting.get(turn, [name], 0.0) for turn, name in ((SETUP, "opened"), (1, "a"), (2, "a"))]

    assert [answer(raw).found for raw in held(talk)] == [{"opened": b"0"}, {}, {"a": b"2"}]
