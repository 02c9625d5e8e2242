"""Trainer ranks and engines in processes of their own, with a session between them, and calls to single ranks."""

from __future__ import annotations

import functools
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import torch

from rlbridge.errors import PeerLostError
from rlbridge.sync.messages import TransportSpec, pack, result
from rlbridge.sync.session import SyncOptions, SyncSession
from rlbridge_conformance.processes import ProcessParty
from rlbridge_conformance.toy import ToyEngine, ToySource

MIB_ROWS = 256
"""Rows of the toy's "bulk" tensor in a MiB of float32."""


class _Host:
    """What runs in a process: one trainer rank or engine after the other, since UCX takes half a second to load."""

    def __init__(self) -> None:
        self._guest: Any = None

    def become(self, build: Callable[[], Any]) -> None:
        self._guest = build()

    def retire(self) -> bool:
        """End the guest. Whether nothing of it is left that could disturb the next one."""
        ends = self._guest.generator.subscribers if isinstance(self._guest, ToyEngine) else [self._guest.publisher]
        for end in ends:
            end.close()
        self._guest = None
        return not any(getattr(end, "_graveyard", None) for end in ends)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._guest, name)


_idle: list[ProcessParty] = []


def stop_idle() -> None:
    """End the processes that wait for a next test."""
    while _idle:
        _idle.pop().stop()


class Stage:
    """Parties and their session. Other sessions over the same parties are made with `session_with`.

    A `fresh` stage has processes of its own: for tests that patch what is in them, or measure them.
    """

    def __init__(
        self,
        ranks: int = 1,
        tps: tuple[int, ...] = (1,),
        *,
        flat: bool = False,
        dtype: torch.dtype = torch.float32,
        served: torch.dtype = torch.float32,
        bulk: int = 0,
        transport: dict[str, Any] | None = None,
        fresh: bool = False,
        **options: Any,
    ) -> None:
        self._fresh = fresh
        self._cast: list[ProcessParty] = []
        self._source = functools.partial(ToySource, ranks=ranks, flat=flat, dtype=dtype, bulk=bulk)
        self._engine = functools.partial(ToyEngine, dtype=served, bulk=bulk)
        self._tps = tps
        self.trainers = [self.new_trainer(rank) for rank in range(ranks)]
        self.engines = [self.new_engine(index) for index in range(len(tps))]
        self._transport = {"net_devices": "lo"} | (transport or {})
        self._options = {"deadline_seconds": 30.0, "setup_seconds": 30.0} | options
        self.session = self.session_with()

    def session_with(self, transport: dict[str, Any] | None = None, **options: Any) -> SyncSession:
        spec = TransportSpec("nixl", self._transport | (transport or {}))
        return SyncSession(self.trainers, self.engines, spec, SyncOptions(**self._options | options))

    @contextmanager
    def with_options(self, **options: Any) -> Iterator[None]:
        """The steps within have these options of a session: a deadline that is to run out is for nothing else."""
        usual, self.session.options = self.session.options, self.session_with(**options).options
        yield
        self.session.options = usual

    def new_trainer(self, rank: int) -> ProcessParty:
        return self._new(f"trainer[{rank}]", functools.partial(self._source, rank))

    def new_engine(self, index: int) -> ProcessParty:
        return self._new(f"generator[{index}]", functools.partial(self._engine, index, self._tps[index]))

    def load(self, seed: int) -> None:
        for trainer in self.trainers:
            trainer.do("load", seed)

    def sync(self, version: int) -> Any:
        """Load the seed that has the version's number, and bring it to the engines."""
        self.load(version)
        return self.session.sync(version)

    def serve(self, version: int, **kwargs: Any) -> bool:
        """Whether every engine serves the version, with the weights of its seed, bit for bit."""
        return all(e.do("matches", version, **kwargs) and e.do("served") == version for e in self.engines)

    def close(self) -> None:
        """Keep the processes that are in good health for another stage, and end the others."""
        for party in self._cast:
            if not self._fresh and _retired(party):
                _idle.append(party)
            else:
                party.stop()

    def _new(self, name: str, build: Callable[[], Any]) -> ProcessParty:
        party = _idle.pop() if _idle and not self._fresh else ProcessParty(name, _Host)
        party.name = name
        party.do("become", build)
        self._cast.append(party)
        return party


def _retired(party: ProcessParty) -> bool:
    try:
        return bool(party.do("retire", timeout=2.0))
    except (PeerLostError, TimeoutError):
        return False


def ask(party: ProcessParty, method: str, message: object, kind: type[Any], timeout: float = 20.0) -> Any:
    """One call of the protocol to one party, by hand: the first reply."""
    packed = pack(message)
    payload = msgspec.msgpack.encode([packed]) if party.name.startswith("generator") and method != "update" else packed
    return result(party.call(method, payload).result(timeout)[0], kind)


def stopped(party: ProcessParty) -> Any:
    """A context in which the party's process is stopped."""
    return _Stopped(party)


class _Stopped:
    def __init__(self, party: ProcessParty) -> None:
        self._party = party

    def __enter__(self) -> None:
        self._party.signal(signal.SIGSTOP)

    def __exit__(self, *error: object) -> None:
        self._party.signal(signal.SIGCONT)


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether the condition comes to hold."""
    limit = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > limit:
            return False
        time.sleep(0.003)
    return True
