"""The driver's side of a sync: a state machine over publishers and engines that it reaches by calls with deadlines."""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import wait
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, cast

import msgspec

from rlbridge.errors import LayoutError, LeaseError, StaleVersionError, SyncError, TransportError
from rlbridge.plugins import registry
from rlbridge.rdma.counters import Counted
from rlbridge.roles.generator import PauseMode
from rlbridge.roles.transport import Copy, Transport, TransportOptions, WireEvidence
from rlbridge.sync.calls import GRACE_SECONDS, Party, gather
from rlbridge.sync.epoch import token
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
    Sent,
    Timed,
    TransportSpec,
    Update,
    Verify,
    Wait,
    pack,
)
from rlbridge.sync.report import AttachReport, SyncReport
from rlbridge.sync.wire import require_rdma
from rlbridge.weights.plan import Plan, compile_plan, runs

_log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class SyncOptions:
    """How a session syncs; see the `sync` section of the config for the words.

    A rank gives up at the deadline and says why; only if it is silent for `late_seconds` more, the driver says that it is.
    """

    publish: Literal["snapshot", "barrier"] = "snapshot"
    cast: Literal["generator", "refuse"] = "generator"
    deadline_seconds: float = 60.0
    lease_seconds: float = 120.0
    setup_seconds: float = 300.0
    late_seconds: float = 5.0
    pause: PauseMode = "wait"


@dataclass
class _Flight:
    """A version on its way: published, perhaps pulled, not yet installed."""

    version: int
    slot: int
    start: float
    limit: float
    phases: dict[str, float]
    nbytes: int = 0
    evidence: list[WireEvidence] = field(default_factory=list)
    ports: dict[str, Counted] = field(default_factory=dict)
    pulled: bool = False


class SyncSession:
    """Carries versions of the weights from trainer ranks to engines.

    `sync` is all of it. `publish`, `pull` and `install` are its three steps, for a caller that does something in between: after
    `publish` the trainers may train, until `install` the engines serve what they have.

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
        self.version = 0
        self.attached: AttachReport | None = None
        self._session = uuid.uuid4().hex[:8]
        self._spec = transport
        self._class: type[Transport[Any]] = registry().load("transport", transport.backend)
        self._transport_options = registry().options_model("transport", transport.backend).model_validate(transport.options)
        self._plan: Plan | None = None
        self._flight: _Flight | None = None
        self._ranks: list[list[str]] = []  # the sinks' names, by engine
        self._undo: Callable[[], None] | None = None

    def attach(self) -> AttachReport:
        """Begin a new epoch: layouts, plan, arenas, registration, connection.

        Raises:
            LayoutError: what the trainers publish is not what the engines need.
            TransportError: the transport cannot be set up, or does not reach every rank of an engine.
            DeadlineError: a party did not answer; it is named.
        """
        self._plan = self._flight = None
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
        self._check_ranks()
        clock.lap("plan")
        report = self._open(plan, [d.name for d in described], limit, clock)
        self._plan, self.attached = plan, report
        return report

    def replace(self, party: Party) -> None:
        """Put `party` in the place of the one that has its name; the next sync begins a new epoch.

        The process that it replaces must have ended: one that is only stopped could still write into an engine's memory.

        Raises:
            SyncError: the session has no party of that name.
        """
        for parties in (self.trainers, self.engines):
            for index, old in enumerate(parties):
                if old.name == party.name:
                    parties[index] = party
                    self._plan = self._flight = None
                    return
        raise SyncError(f"the session has no party {party.name!r}", todo="its parties keep their names when they are replaced")

    def sync(self, version: int) -> SyncReport:
        """Publish the trainers' current weights as `version` and bring every engine to serve it.

        After an error the engines serve what they served before, or refuse to serve; the next `sync` begins a new epoch. A
        version that no engine had wholly received may be synced again.

        Raises:
            SyncError: names the peer, the version, the phase and, where there is one, the tensor.
        """
        try:
            self.publish(version)
        except LeaseError as error:
            if "expelled" not in error.where:
                raise
            self.publish(version)
        self._pull(self._flown(version))
        return self.install(version)

    def publish(self, version: int) -> None:
        """Make `version` readable: the trainers' current weights, of which this is a copy unless they are read in place.

        Raises:
            StaleVersionError: `version` is not newer than the last one.
            LeaseError: a buffer holds a version that a subscriber has not acknowledged.
        """
        if version <= self.version:
            raise StaleVersionError(
                f"version {version} is not newer than version {self.version}", version=version, phase="snapshot",
                todo="versions only grow",
            )  # fmt: skip
        if self._plan is None:
            self.attach()
        start = time.monotonic()
        limit = start + self.options.deadline_seconds
        with self._fatal():
            message = Publish(version, self._sinks(), self._token())
            published = [p[0] for p in self._all(self.trainers, "publish", message, Published, "snapshot", limit, version)]
            slots = {p.slot for p in published}
            if len(slots) != 1:
                raise SyncError(f"the trainer ranks put the version into different buffers: {sorted(slots)}", version=version)
            seconds = max(p.seconds for p in published)
            self._flight = _Flight(version, slots.pop(), start, limit, {"snapshot": seconds})

    def pull(self, version: int) -> None:
        """Bring the bytes of the published `version` into every engine's arena and verify them there.

        Raises:
            DeadlineError: a peer did not answer in time; its arena is quarantined.
            PeerLostError: a process is gone.
            DigestError: the bytes are not those that were published.
        """
        flight = self._flown(version)
        flight.limit = time.monotonic() + self.options.deadline_seconds
        self._pull(flight)

    def install(self, version: int) -> SyncReport:
        """Bring every engine to serve the pulled `version`.

        Raises:
            SyncError: an engine could not; it refuses to serve, or serves what it served.
        """
        flight = self._flown(version)
        if not flight.pulled:
            raise SyncError(f"version {version} has not been pulled", version=version, phase="install")
        self.version = version
        seconds = self.options.deadline_seconds
        with self._fatal():
            # The update has a deadline of its own: cutting it off would leave the engine dirty for want of milliseconds.
            # And no engine is left alone with it because another one has failed.
            update = Update(version, seconds, self._token(), self.options.pause)
            installed = self._all(
                self.engines, "update", update, Installed, "install",
                time.monotonic() + seconds + self.options.late_seconds, version, grace=None,
            )  # fmt: skip
        self._flight = None
        flight.phases |= {
            "install": max((i[0].install for i in installed), default=0.0),
            "pause": max((i[0].pause for i in installed), default=0.0),
        }
        return SyncReport(
            version,
            self.epoch,
            time.monotonic() - flight.start,
            flight.nbytes,
            flight.phases,
            True,
            " + ".join(sorted({f"{e.backend} over {e.wire}" for e in flight.evidence})),
            flight.evidence,
            flight.ports,
        )

    def close(self) -> None:
        """End the epoch on every party that still answers, and wait for them, though not for long."""
        self._plan = self._flight = None
        try:
            futures = {t.call("close", pack(Nothing())): t.name for t in self.trainers}
            futures |= {e.call("close", _each([Nothing()])): e.name for e in self.engines}
            done, late = wait(futures, timeout=self.options.late_seconds)
            for future in [*done, *late]:
                if future in late or future.exception() is not None:
                    _log.info("%s did not answer when the session was closed", futures[future])
        finally:
            if self._undo is not None:
                self._undo()
                self._undo = None

    def _pull(self, flight: _Flight) -> None:
        version = flight.version
        with self._fatal():
            received = self._move(flight)
            epoch, limit = self._token(), flight.limit
            asked = Wait(version, max(limit - time.monotonic(), 0.0), epoch)
            hashed = self._all(self.trainers, "digests", asked, Digests, "verify", limit + self.options.late_seconds, version)
            verify = Verify(version, [d[0].joined for d in hashed], epoch)
            verified = self._all(self.engines, "verify", [verify], Timed, "verify", limit, version)
            # What has arrived whole no longer needs the trainer's copy, whatever becomes of the install.
            acknowledge = Acknowledge(version, self._sinks(), epoch)
            self._all(self.trainers, "acknowledge", acknowledge, Nothing, "verify", limit, version)
        flight.nbytes = sum(p.nbytes for p in received)
        flight.phases |= {
            "wire": max((p.seconds for p in received), default=0.0),
            "verify": max((t.seconds for ranks in verified for t in ranks), default=0.0),
        }
        flight.pulled = True

    @contextlib.contextmanager
    def _fatal(self) -> Iterator[None]:
        """An error ends the epoch: the next sync begins with fresh arenas."""
        try:
            yield
        except BaseException:
            self._plan = self._flight = None
            raise

    def _flown(self, version: int) -> _Flight:
        if self._flight is None or self._flight.version != version:
            raise SyncError(f"version {version} is not published", version=version, todo="call publish first")
        return self._flight

    def _sinks(self) -> list[str]:
        return [name for ranks in self._ranks for name in ranks]

    def _token(self) -> str:
        return token(self._session, self.epoch)

    def _check_ranks(self) -> None:
        if len(set(self._sinks())) != len(self._sinks()):
            raise LayoutError(
                f"two engine ranks have one name: {sorted(self._sinks())}",
                phase="plan",
                todo='a rank is named after its engine and its number: "generator[0].rank[1]"',
            )
        for engine, names in zip(self.engines, self._ranks, strict=True):
            if self._class.moves_ray_objects and len(names) > 1:
                raise TransportError(
                    f"the transport {self._spec.backend!r} lets Ray move the tensors, and reaches engines of one rank only:"
                    f" {engine.name} has {len(names)}",
                    phase="plan",
                    todo="take a transport that moves the bytes itself, for example nixl, or an engine of one rank",
                )

    def _open(self, plan: Plan, sources: list[str], limit: float, clock: _Clock) -> AttachReport:
        sinks = self._sinks()
        lease = self.options.lease_seconds
        opened = self._scatter(
            self.trainers,
            "open",
            [
                pack(OpenSource(self.epoch, self._spec, self.options.publish, lease, share, self._session))
                for share in plan.sources
            ],
            Opened,
            "register",
            limit,
        )
        shares = iter(plan.sinks)
        payloads = [
            _each([OpenSink(self.epoch, self._spec, next(shares), self._session) for _ in ranks]) for ranks in self._ranks
        ]
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
        epoch = self._token()
        by_source, by_sink = _by(copies, "source"), _by(copies, "sink")
        self._scatter_all(
            [pack(Connect(*_side(sink_addresses, by_source.get(name, []), "sink"), epoch)) for name in sources],
            [
                _each([Connect(*_side(source_addresses, by_sink.get(name, []), "source"), epoch) for name in names])
                for names in self._ranks
            ],
            "connect",
            limit,
        )
        clock.lap("connect")
        return AttachReport(
            self.epoch,
            sources,
            sinks,
            sum(len(s.segments) for s in plan.sources),
            len(copies),
            plan.bytes,
            dict(
                zip(
                    [*sources, *sinks], [s.arena_bytes for s in plan.sources] + [s.arena_bytes for s in plan.sinks], strict=True
                )
            ),
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

    def _move(self, flight: _Flight) -> list[Pulled]:
        """Both ends at once: the sinks begin to receive, the sources send, and all are waited for together."""
        version, slot, epoch = flight.version, flight.slot, self._token()
        pull = _each([Pull(version, slot, self._left(flight), epoch)])
        if self._class.moves_ray_objects:
            wire = self._class.ray_tensor_transport(self._transport_options)
            begun = [
                engine.call("start_pull", pull, {t.name: t.tensors(version, slot, names[0], wire) for t in self.trainers})
                for engine, names in zip(self.engines, self._ranks, strict=True)
            ]
        else:
            begun = [engine.call("start_pull", pull) for engine in self.engines]
        gather(self.engines, begun, [Nothing] * len(begun), "wire", flight.limit, version)
        seconds = self._left(flight)
        futures = [party.call("send", pack(Send(version, slot, seconds, epoch))) for party in self.trainers]
        futures += [engine.call("wait_pull", _each([Wait(version, seconds, epoch)])) for engine in self.engines]
        kinds = [Sent] * len(self.trainers) + [Pulled] * len(self.engines)
        limit = flight.limit + self.options.late_seconds
        replies = gather([*self.trainers, *self.engines], futures, kinds, "wire", limit, version)
        known = [r.evidence for ranks in replies for r in ranks if r.evidence is not None]
        flight.evidence = [evidence for evidence in known if evidence.wire]
        names = [name for ranks in self._ranks for name in ranks]
        pulled = dict(zip(names, (p for ranks in replies[len(self.trainers) :] for p in ranks), strict=True))
        flight.ports = {name: p.ports for name, p in pulled.items() if p.ports is not None}
        if cast("TransportOptions", self._transport_options).require == "rdma":
            require_rdma(version, pulled, flight.evidence)
        return list(pulled.values())

    @staticmethod
    def _left(flight: _Flight) -> float:
        return max(flight.limit - time.monotonic(), 0.001)

    def _all(
        self,
        parties: Sequence[Party],
        method: str,
        message: Any,
        kind: type[T],
        phase: str,
        limit: float,
        version: int | None = None,
        *,
        grace: float | None = GRACE_SECONDS,
    ) -> list[list[T]]:
        """The same call to every party at once; a list is for an engine's ranks, anything else for a single receiver."""
        payload = _each(message) if isinstance(message, list) else pack(message)
        futures = [party.call(method, payload) for party in parties]
        return gather(parties, futures, [kind] * len(futures), phase, limit, version, grace=grace)

    def _scatter(
        self, parties: Sequence[Party], method: str, payloads: Sequence[bytes], kind: type[T], phase: str, limit: float
    ) -> list[list[T]]:
        futures = [party.call(method, payload) for party, payload in zip(parties, payloads, strict=True)]
        return gather(parties, futures, [kind] * len(futures), phase, limit)

    def _scatter_all(self, sources: Sequence[bytes], engines: Sequence[bytes], method: str, limit: float) -> None:
        """The same call to both sides at once, since connecting may need both."""
        parties = [*self.trainers, *self.engines]
        futures = [p.call(method, payload) for p, payload in zip(parties, [*sources, *engines], strict=True)]
        gather(parties, futures, [Timed] * len(futures), method, limit)


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


def _by(copies: Sequence[Copy], end: str) -> Mapping[str, list[Copy]]:
    found: dict[str, list[Copy]] = {}
    for copy in copies:
        found.setdefault(getattr(copy, end), []).append(copy)
    return found


def _side(addresses: Mapping[str, bytes], copies: list[Copy], end: str) -> tuple[dict[str, bytes], list[Copy]]:
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
