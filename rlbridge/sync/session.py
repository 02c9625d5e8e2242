"""The driver's side of a sync: a state machine over publishers and engines that it reaches by calls with deadlines."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import msgspec

from rlbridge.errors import DeadlineError, LeaseError, RlbridgeError
from rlbridge.plugins import registry
from rlbridge.roles.transport import Copy, Transport, WireEvidence
from rlbridge.sync.messages import (
    Acknowledge,
    Connect,
    Described,
    Digests,
    Installed,
    Nothing,
    Opened,
    OpenSink,
    OpenSource,
    Publish,
    Published,
    Pull,
    Pulled,
    Record,
    Send,
    Timed,
    TransportSpec,
    Verify,
    Wait,
    pack,
    result,
)
from rlbridge.sync.report import AttachReport, SyncReport
from rlbridge.weights.plan import Plan, compile_plan, runs

T = TypeVar("T")


class Party(Protocol):
    """How the driver reaches a trainer rank or an engine. A call that finds the process gone fails with PeerLostError."""

    name: str

    def call(self, method: str, payload: bytes, tensors: dict[str, Any] | None = None) -> Future[list[bytes]]:
        """Call `handle`; the replies, one a rank. `tensors` are references that Ray resolves on the way."""

    def tensors(self, version: int, slot: int, sink: str, tensor_transport: str | None) -> Any:
        """A reference to what a transport that moves Ray objects sends to `sink`."""

    @property
    def actor(self) -> Any:
        """The Ray actor, where there is one."""


@dataclass(frozen=True)
class SyncOptions:
    """How a session syncs; see the `sync` section of the config for the words."""

    publish: Literal["snapshot", "barrier"] = "snapshot"
    cast: Literal["generator", "refuse"] = "generator"
    deadline_seconds: float = 60.0
    lease_seconds: float = 120.0
    setup_seconds: float = 300.0


class SyncSession:
    """Carries versions of the weights from trainer ranks to engines.

    Args:
        trainers: One party a trainer rank, in rank order.
        engines: One party an engine.
        transport: The transport's backend and options.
        options: Deadlines and modes.
    """

    def __init__(
        self, trainers: Sequence[Party], engines: Sequence[Party], transport: TransportSpec, options: SyncOptions
    ) -> None:
        self.trainers = list(trainers)
        self.engines = list(engines)
        self.options = options
        self.epoch = 0
        self.attached: AttachReport | None = None
        self._spec = transport
        self._class: type[Transport[Any]] = registry().load("transport", transport.backend)
        self._transport_options = registry().options_model("transport", transport.backend).model_validate(transport.options)
        self._plan: Plan | None = None
        self._ranks: list[list[str]] = []  # the sinks' names, by engine
        self._evidence: list[WireEvidence] = []
        self._undo: Callable[[], None] | None = None

    def attach(self) -> AttachReport:
        """Begin a new epoch: layouts, plan, arenas, registration, connection.

        Raises:
            LayoutError: what the trainers publish is not what the engines need.
            TransportError: the transport cannot be set up.
            DeadlineError: a party did not answer; it is named.
        """
        self._plan = None
        self.epoch += 1
        limit = time.monotonic() + self.options.setup_seconds
        clock = _Clock()
        described = [r[0] for r in self._all(self.trainers, "layout", Nothing(), Described, "plan", limit)]
        tensors = {t.name: t for d in described for t in d.layout.tensors}
        recorded = self._all(self.engines, "record", [Record(list(tensors.values()))], Described, "plan", limit)
        plan = compile_plan(
            [d.layout for d in described], [d.layout for ranks in recorded for d in ranks], cast=self.options.cast
        )
        self._ranks = [[d.name for d in ranks] for ranks in recorded]
        clock.lap("plan")
        self._open(plan, [d.name for d in described], limit, clock)
        self._plan = plan
        self._evidence = []
        return self.attached  # type: ignore[return-value]

    def sync(self, version: int) -> SyncReport:
        """Publish the trainers' current weights as `version` and bring every engine to serve it.

        After an error the engines serve what they served before, or refuse to serve; the next `sync` begins a new epoch.

        Raises:
            SyncError: names the peer, the version, the phase and, where there is one, the tensor.
        """
        if self._plan is None:
            self.attach()
        try:
            return self._sync(version)
        except LeaseError as error:
            self._plan = None
            if "expelled" not in error.where:
                raise
            self.attach()
            return self._sync(version)
        except BaseException:
            self._plan = None
            raise

    def close(self) -> None:
        """End the epoch on every party that still answers."""
        self._plan = None
        for party, payload in [*((t, pack(Nothing())) for t in self.trainers), *((e, _each([Nothing()])) for e in self.engines)]:
            party.call("close", payload)
        if self._undo is not None:
            self._undo()
            self._undo = None

    def _open(self, plan: Plan, sources: list[str], limit: float, clock: _Clock) -> None:
        sinks = [name for ranks in self._ranks for name in ranks]
        opened = self._scatter(
            self.trainers,
            "open",
            [
                pack(OpenSource(self.epoch, self._spec, self.options.publish, self.options.lease_seconds, share))
                for share in plan.sources
            ],
            Opened,
            "register",
            limit,
        )
        shares = iter(plan.sinks)
        payloads = [_each([OpenSink(self.epoch, self._spec, next(shares)) for _ in ranks]) for ranks in self._ranks]
        received = self._scatter(self.engines, "open", payloads, Opened, "register", limit)
        clock.lap("register")
        copies = _copies(plan, sources, sinks, [o[0].places for o in opened])
        source_addresses = {name: o[0].address for name, o in zip(sources, opened, strict=True)}
        sink_addresses = {
            name: o.address
            for names, answers in zip(self._ranks, received, strict=True)
            for name, o in zip(names, answers, strict=True)
        }
        self._rendezvous()
        connects = [
            pack(Connect(*_side(sink_addresses, [c for c in copies if c.source == name], "sink"))) for name in sources
        ]
        self._scatter_all(
            connects,
            [
                _each([Connect(*_side(source_addresses, [c for c in copies if c.sink == name], "source")) for name in names])
                for names in self._ranks
            ],
            "connect",
            limit,
        )
        clock.lap("connect")
        self.attached = AttachReport(
            self.epoch,
            sources,
            sinks,
            sum(len(s.segments) for s in plan.sources),
            len(copies),
            plan.bytes,
            {n: s.arena_bytes for n, s in [*zip(sources, plan.sources, strict=True), *zip(sinks, plan.sinks, strict=True)]},
            plan.casts,
            clock.laps,
        )

    def _rendezvous(self) -> None:
        if not self._class.moves_ray_objects:
            return
        if self._undo is not None:
            self._undo()
        actors = [party.actor for party in [*self.trainers, *self.engines]]
        self._undo = self._class.rendezvous(self._transport_options, actors, self.options.setup_seconds)

    def _sync(self, version: int) -> SyncReport:
        assert self._plan is not None
        seconds = self.options.deadline_seconds
        start = time.monotonic()
        limit = start + seconds
        sinks = [name for ranks in self._ranks for name in ranks]
        published = self._all(self.trainers, "publish", Publish(version, sinks), Published, "snapshot", limit, version)
        slot = published[0][0].slot
        pulled = self._move(version, slot, limit)
        hashed = self._all(self.trainers, "digests", Wait(version, limit - time.monotonic()), Digests, "verify", limit, version)
        verify = Verify(version, [d[0].joined for d in hashed])
        verified = self._all(self.engines, "verify", [verify], Timed, "verify", limit, version)
        # What has arrived whole no longer needs the trainer's copy, whatever becomes of the install.
        self._all(self.trainers, "acknowledge", Acknowledge(version, sinks), Nothing, "verify", limit, version)
        # The update is not bounded by the sync's deadline: cutting it off would leave the engine dirty for want of milliseconds.
        installed = self._all(
            self.engines, "update", Wait(version, seconds), Installed, "install", time.monotonic() + seconds, version
        )
        total = time.monotonic() - start
        if not self._evidence:
            self._evidence = self._gather_evidence(limit + seconds)
        return SyncReport(
            version,
            self.epoch,
            total,
            sum(p.nbytes for ranks in pulled for p in ranks),
            {
                "snapshot": max(p[0].seconds for p in published),
                "wire": max(p.seconds for ranks in pulled for p in ranks),
                "verify": max(t.seconds for ranks in verified for t in ranks),
                "install": max(i[0].install for i in installed),
                "pause": max(i[0].pause for i in installed),
            },
            True,
            " + ".join(sorted({f"{e.backend} over {e.wire}" for e in self._evidence})),
            self._evidence,
        )

    def _move(self, version: int, slot: int, limit: float) -> list[list[Pulled]]:
        seconds = max(limit - time.monotonic(), 0.001)
        pull = _each([Pull(version, slot, seconds)])
        if self._class.moves_ray_objects:
            wire = self._class.ray_tensor_transport(self._transport_options)
            begun = [
                engine.call("start_pull", pull, {t.name: t.tensors(version, slot, names[0], wire) for t in self.trainers})
                for engine, names in zip(self.engines, self._ranks, strict=True)
            ]
        else:
            begun = [engine.call("start_pull", pull) for engine in self.engines]
        self._gather(self.engines, begun, Nothing, "wire", limit, version)
        sends = [party.call("send", pack(Send(version, slot, seconds))) for party in self.trainers]
        waits = [e.call("wait_pull", _each([Wait(version, max(limit - time.monotonic(), 0.001))])) for e in self.engines]
        grace = limit + 5.0  # the party raises at `limit` itself, and says more than we could
        self._gather(self.trainers, sends, Timed, "wire", grace, version)
        return self._gather(self.engines, waits, Pulled, "wire", grace, version)

    def _gather_evidence(self, limit: float) -> list[WireEvidence]:
        found = self._all(self.engines, "evidence", [Nothing()], WireEvidence, "wire", limit)
        found += self._all(self.trainers, "evidence", Nothing(), WireEvidence, "wire", limit)
        return [e for ranks in found for e in ranks if e.wire]

    def _all(
        self, parties: Sequence[Party], method: str, message: Any, kind: type[T], phase: str, limit: float, version: int | None = None
    ) -> list[list[T]]:
        """The same call to every party at once; a list is for an engine's ranks, anything else for a single receiver."""
        payload = _each(message) if isinstance(message, list) else pack(message)
        return self._scatter(parties, method, [payload] * len(parties), kind, phase, limit, version)

    def _scatter(
        self, parties: Sequence[Party], method: str, payloads: Sequence[bytes], kind: type[T], phase: str, limit: float,
        version: int | None = None,
    ) -> list[list[T]]:
        futures = [party.call(method, payload) for party, payload in zip(parties, payloads, strict=True)]
        return self._gather(parties, futures, kind, phase, limit, version)

    def _scatter_all(self, sources: Sequence[bytes], engines: Sequence[bytes], method: str, limit: float) -> None:
        """The same call to both sides at once, since connecting may need both."""
        futures = [p.call(method, payload) for p, payload in zip(self.trainers, sources, strict=True)]
        futures += [p.call(method, payload) for p, payload in zip(self.engines, engines, strict=True)]
        self._gather([*self.trainers, *self.engines], futures, Timed, method, limit)

    def _gather(
        self, parties: Sequence[Party], futures: Sequence[Future[list[bytes]]], kind: type[T], phase: str, limit: float,
        version: int | None = None,
    ) -> list[list[T]]:
        results, errors = [], []
        for party, future in zip(parties, futures, strict=True):
            try:
                replies = future.result(timeout=max(limit - time.monotonic(), 0.0))
                results.append([result(reply, kind) for reply in replies])
            except FutureTimeoutError:
                errors.append(
                    DeadlineError(
                        f"{party.name} did not answer in time",
                        peer=party.name,
                        version=version,
                        phase=phase,
                        todo="is its process stopped or overloaded? the limit is sync.deadline_seconds",
                    )
                )
            except RlbridgeError as error:
                errors.append(error.at(peer=party.name, version=version, phase=phase))
        if errors:
            raise _worst(errors)
        return results


class _Clock:
    """Seconds between laps, by name."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name] = now - self._last
        self._last = now


def _each(messages: Sequence[object]) -> bytes:
    """A payload for the ranks of an engine: one message a rank, or one for all."""
    return msgspec.msgpack.encode([pack(message) for message in messages])


def _worst(errors: list[RlbridgeError]) -> RlbridgeError:
    """The error to raise of several: a lost peer explains the others' deadlines."""
    for kind in ("PeerLostError", "DigestError"):
        for error in errors:
            if type(error).__name__ == kind:
                return error
    specific = [e for e in errors if not isinstance(e, DeadlineError)]
    return (specific or errors)[0]


def _side(addresses: dict[str, bytes], copies: list[Copy], end: str) -> tuple[dict[str, bytes], list[Copy]]:
    """The addresses of those peers that `copies` name, and the copies."""
    names = {getattr(copy, end) for copy in copies}
    return {name: address for name, address in addresses.items() if name in names}, copies


def _copies(plan: Plan, sources: list[str], sinks: list[str], places: list[list[list[tuple[int, int]]]]) -> list[Copy]:
    """Every copy of the epoch, for each slot of the sources."""
    copies = []
    for sink, share in zip(sinks, plan.sinks, strict=True):
        for run in runs(share.parts):
            if not places[run.source]:
                copies += [
                    Copy(sources[run.source], sink, slot, slot, run.source_offset, 0, run.offset, run.nbytes) for slot in (0, 1)
                ]
        for part, slot in itertools.product(share.parts, range(max((len(p) for p in places), default=0))):
            if places[part.source]:
                block, offset = places[part.source][slot][part.segment]
                copies.append(Copy(sources[part.source], sink, slot, block, offset, 0, part.offset, part.nbytes))
    return copies


__all__ = ["Party", "SyncOptions", "SyncSession"]
