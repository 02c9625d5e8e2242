"""All ranks of an engine, as the engine's process calls them."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from rlbridge.errors import SyncError
from rlbridge.sync.messages import longest_wait
from rlbridge_sglang.channel import Call, RankClient
from rlbridge_sglang.taken import checked

_BETWEEN_PASSES = ("install", "scramble")
"""What writes live parameters."""


class Ranks:
    """Calls every rank at once; answers come in rank order.

    Args:
        clients: One a rank.
        run: Lets the scheduler of every rank run the call of a ticket between two forward passes.
        seconds: The longest that a rank may take to answer, besides the waiting that a call asks for.
    """

    def __init__(self, clients: Sequence[RankClient], run: Callable[[int], None], seconds: float) -> None:
        self._clients, self._run, self._seconds = clients, run, seconds
        self._tickets = itertools.count(1)

    def on_each(self, method: str, payload: bytes, updating: Callable[[], AbstractContextManager[None]]) -> list[bytes]:
        """Whatever a session asks of the ranks; what writes live parameters runs between two forward passes.

        Args:
            method: As of `Subscriber.handle`.
            payload: Its arguments.
            updating: What an install is to be done in.

        Raises:
            PeerLostError: a rank is gone; it is named.
            DeadlineError: a rank did not answer in time; it is named.
            SyncError: the engine did not run the call, or refused an update.
        """
        if method == "record":
            return checked(payload, self.call(method, payload))
        if method not in _BETWEEN_PASSES:
            return self.call(method, payload)
        with updating() if method == "install" else contextlib.nullcontext():
            return self.call_between_passes(method, payload)

    def call(self, method: str, payload: bytes) -> list[bytes]:
        """`Subscriber.handle` in every rank, while its engine goes on.

        Raises:
            PeerLostError: a rank is gone; it is named.
            DeadlineError: a rank did not answer in time; it is named.
        """
        seconds = self._seconds + longest_wait(method, payload)
        with contextlib.ExitStack() as stack:
            call = Call(method, payload)
            answers = [stack.enter_context(client.calling(call, seconds)) for client in self._clients]
            return [answer() for answer in answers]

    def call_between_passes(self, method: str, payload: bytes) -> list[bytes]:
        """`Subscriber.handle` in every rank, on the scheduler's own thread: no forward pass reads the weights meanwhile.

        Raises:
            PeerLostError: a rank is gone; it is named.
            DeadlineError: a rank did not answer in time; it is named.
            SyncError: the engine did not run the call.
        """
        ticket = next(self._tickets)
        with contextlib.ExitStack() as stack:
            call = Call(method, payload, ticket, self._seconds)
            answers = [stack.enter_context(client.calling(call, self._seconds)) for client in self._clients]
            for announced in answers:
                announced()
            try:
                self._run(ticket)
            except AssertionError as error:  # how SGLang tells that a rank has raised
                raise SyncError(f"the engine did not run {method!r}: {error}", role="generator", phase=method) from error
            return [answer() for answer in answers]
