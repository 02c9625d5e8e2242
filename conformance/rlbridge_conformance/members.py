"""One trainer rank or engine of a stage, in a plain process or in a Ray actor: the same calls to either."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

import ray

from rlbridge.cluster.party import ActorParty
from rlbridge.errors import DeadlineError, RlbridgeError
from rlbridge.sync.calls import Party
from rlbridge.sync.messages import result
from rlbridge_conformance.faults.signals import send
from rlbridge_conformance.hosts import GeneratorHost, TrainerHost, host
from rlbridge_conformance.nursery import Nursery
from rlbridge_conformance.processes import ProcessParty

ANSWER_SECONDS = 60.0
"""The longest that a call of the suite may take."""


class Member(ABC):
    """A party of the session, and what else the suite asks of it."""

    name: str

    @property
    @abstractmethod
    def party(self) -> Party:
        """How the session reaches it."""

    @property
    @abstractmethod
    def pid(self) -> int:
        """Its process."""

    @abstractmethod
    def begin(self, method: str, *args: Any) -> Future[Any]:
        """Call a method of the actor; do not wait."""

    @abstractmethod
    def end(self) -> None:
        """End the process, whatever state it is in."""

    def ask(self, method: str, kind: Any, *args: Any, seconds: float = ANSWER_SECONDS) -> Any:
        """Call a method of the actor whose answer is `kind`.

        Raises:
            DeadlineError: it did not answer within `seconds`.
            RlbridgeError: what it raised.
        """
        return self.answer(self.begin(method, *args), kind, method, seconds=seconds)

    def answer(self, future: Future[Any], kind: Any, what: str, *, seconds: float = ANSWER_SECONDS) -> Any:
        """What `ask` returns, of a call that was begun."""
        try:
            return result(future.result(seconds), kind)
        except FutureTimeoutError as error:
            raise DeadlineError(f"{what} did not answer within {seconds:.0f} s", peer=self.name) from error

    def apply(self, function: Callable[..., Any], *args: Any, seconds: float = ANSWER_SECONDS) -> Any:
        """What `function` returns of the host, in its process.

        Raises:
            DeadlineError: it did not answer within `seconds`.
        """
        try:
            return self.begin("apply", function, *args).result(seconds)
        except FutureTimeoutError as error:
            raise DeadlineError(f"{function.__name__} did not end within {seconds:.0f} s", peer=self.name) from error

    def signal(self, number: signal.Signals) -> None:
        """Send the process a signal, if it still is there."""
        with contextlib.suppress(ProcessLookupError):
            send(self.pid, number)


class ProcessMember(Member):
    """A member in a plain process, forked off a clean one."""

    def __init__(
        self,
        kind: type[TrainerHost] | type[GeneratorHost],
        name: str,
        backend: str,
        protocol: str,
        env: Mapping[str, str],
        nursery: Nursery,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        self.name = name
        build = functools.partial(host, kind, backend, protocol, dict(env), prepare)
        self._party = ProcessParty(name, build, nursery)

    @property
    def party(self) -> Party:
        return self._party

    @property
    def pid(self) -> int:
        return self._party.pid

    def begin(self, method: str, *args: Any) -> Future[Any]:
        return self._party.begin(method, *args)

    def end(self) -> None:
        self._party.stop()


class ActorMember(Member):
    """A member that is a Ray actor."""

    def __init__(
        self, kind: type[TrainerHost] | type[GeneratorHost], name: str, backend: str, protocol: str, options: Mapping[str, Any]
    ) -> None:
        self.name = name
        declared: dict[str, Any] = {"enable_tensor_transport": True}
        if kind is GeneratorHost:
            declared["concurrency_groups"] = {"sync": 2, "control": 2}
        self._actor = ray.remote(**declared)(kind).options(**options).remote(backend, protocol)
        self._party = ActorParty(name, self._actor)
        self._pid: int | None = None

    @property
    def party(self) -> Party:
        return self._party

    @property
    def pid(self) -> int:
        if self._pid is None:
            self._pid = int(self.apply(_pid))
        return self._pid

    def begin(self, method: str, *args: Any) -> Future[Any]:
        return self._party.future(getattr(self._actor, method).remote(*args))

    def end(self) -> None:
        self.signal(signal.SIGCONT)
        ray.kill(self._actor)


def _pid(_host: Any) -> int:
    return os.getpid()


def errors_of(call: Callable[[], Any]) -> RlbridgeError | None:
    """The error of ours that `call` raises, or None."""
    try:
        call()
    except RlbridgeError as error:
        return error
    return None
