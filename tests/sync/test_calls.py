from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from rlbridge.errors import DeadlineError, DigestError, PeerLostError, RlbridgeError, SyncError
from rlbridge.sync.calls import gather
from rlbridge.sync.messages import Nothing, State, answer


class Named:
    """What `gather` needs of a party."""

    def __init__(self, name: str) -> None:
        self.name = name


PARTIES: Any = [Named("trainer[0]"), Named("trainer[1]"), Named("generator[0]")]


def replied(*values: object) -> Future[list[bytes]]:
    future: Future[list[bytes]] = Future()
    future.set_result([answer(_call(value)) for value in values])
    return future


def lost(name: str) -> Future[list[bytes]]:
    future: Future[list[bytes]] = Future()
    future.set_exception(PeerLostError("gone", peer=name))
    return future


def test_replies_come_in_the_order_of_the_parties() -> None:
    futures = [replied(State("ready", n), State("ready", n + 10)) for n in range(3)]
    replies = gather(PARTIES, futures, [State] * 3, "plan", time.monotonic() + 1)
    assert [[s.version for s in ranks] for ranks in replies] == [[0, 10], [1, 11], [2, 12]]


def test_replies_that_are_there_count_even_after_the_limit() -> None:
    gather(PARTIES, [replied(Nothing()) for _ in PARTIES], [Nothing] * 3, "plan", time.monotonic() - 1)


def test_silence_is_an_error_that_names_all_who_are_silent() -> None:
    with pytest.raises(DeadlineError, match=r"trainer\[1\], generator\[0\] did not answer") as caught:
        gather(PARTIES, [replied(Nothing()), Future(), Future()], [Nothing] * 3, "snapshot", time.monotonic() + 0.05, 7)
    assert caught.value.where == {"peer": "trainer[1]", "version": "7", "phase": "snapshot"}


def test_a_lost_peer_is_told_long_before_the_others_deadlines() -> None:
    start = time.monotonic()
    with pytest.raises(PeerLostError) as caught:
        gather(PARTIES, [Future(), lost("trainer[1]"), Future()], [Nothing] * 3, "wire", start + 60, 3, grace=0.1)
    assert time.monotonic() - start < 2
    assert caught.value.where == {"peer": "trainer[1]", "version": "3", "phase": "wire"}


def test_an_update_waits_for_every_engine_though_one_has_failed() -> None:
    start = time.monotonic()
    with pytest.raises(SyncError, match="broke"):
        gather(PARTIES[:2], [replied(SyncError("broke")), Future()], [Nothing] * 2, "install", start + 0.3, grace=None)
    assert time.monotonic() - start >= 0.3


@pytest.mark.parametrize("reason", [PeerLostError("the reason"), DigestError("the reason"), SyncError("the reason")])
def test_the_error_that_explains_the_others_is_the_one_raised(reason: RlbridgeError) -> None:
    futures = [replied(DeadlineError("late")), replied(reason), replied(DeadlineError("late"))]
    with pytest.raises(type(reason), match="the reason") as caught:
        gather(PARTIES, futures, [Nothing] * 3, "wire", time.monotonic() + 1)
    assert caught.value.where["peer"] == "trainer[1]"


def test_what_a_rank_says_of_the_place_is_kept() -> None:
    error = DeadlineError("late", peer="trainer[0]", phase="wire", rank="generator[0].rank[1]")
    with pytest.raises(DeadlineError) as caught:
        gather(PARTIES[2:], [replied(error)], [Nothing], "verify", time.monotonic() + 1, 4)
    assert caught.value.where == {"peer": "trainer[0]", "phase": "wire", "rank": "generator[0].rank[1]", "version": "4"}


def _call(value: object) -> Callable[[], object]:
    def call() -> object:
        if isinstance(value, Exception):
            raise value
        return value

    return call
