"""A sync in single steps, copies of other sizes than the plan's, and what lies in the arenas: for checks of a transport."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import msgspec
import torch

from rlbridge.errors import RlbridgeError
from rlbridge.plugins import registry
from rlbridge.roles.transport import Copy, TransportOptions
from rlbridge.sync import session
from rlbridge.sync.calls import gather
from rlbridge.sync.messages import (
    Digests,
    Installed,
    Nothing,
    Publish,
    Published,
    Pull,
    Pulled,
    Send,
    Sent,
    Timed,
    TransportSpec,
    Update,
    Verify,
    Wait,
    pack,
)
from rlbridge.sync.publisher import open_transport
from rlbridge.sync.subscriber import Subscriber
from rlbridge.weights.arena import Arena
from rlbridge.weights.plan import Part, Run, runs
from rlbridge_conformance.members import Member
from rlbridge_conformance.probes import subscribers
from rlbridge_conformance.stage import Stage

_SECONDS = 30.0
_PAINT = 0xA5
_TAIL = 4096

Cut = Callable[[Sequence[Part]], list[Run]]


@dataclass(frozen=True)
class Flight:
    """A published version, and the buffer of the sources that it lies in."""

    version: int
    slot: int


class ByHand:
    """An epoch whose versions the caller moves step by step, so that two may be on their way at once."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self._sinks = list(stage.session.attach().sinks)

    def publish(self) -> Flight:
        """The trainers' current weights as the next version."""
        self.stage.version += 1
        message = pack(Publish(self.stage.version, self._sinks))
        published = self._ask(self.stage.trainers, "publish", message, Published)
        return Flight(self.stage.version, published[0][0].slot)

    def digests(self, flight: Flight) -> list[bytes]:
        """What each source says that it has published."""
        found = self._ask(self.stage.trainers, "digests", pack(Wait(flight.version, _SECONDS)), Digests)
        return [replies[0].joined for replies in found]

    def begin(self, flight: Flight) -> None:
        """Let every engine begin to receive a version."""
        pull = _each(Pull(flight.version, flight.slot, _SECONDS))
        futures = [e.party.call("start_pull", pull, self._carried(flight, e)) for e in self.stage.engines]
        gather([e.party for e in self.stage.engines], futures, [Nothing] * len(futures), "wire", _limit())

    def arrive(self, flight: Flight) -> list[Pulled]:
        """Let the sources send what has been begun, and wait until every engine rank has it."""
        members = [*self.stage.trainers, *self.stage.engines]
        send, wait = pack(Send(flight.version, flight.slot, _SECONDS)), _each(Wait(flight.version, _SECONDS))
        futures = [t.party.call("send", send) for t in self.stage.trainers]
        futures += [e.party.call("wait_pull", wait) for e in self.stage.engines]
        kinds = [Sent] * len(self.stage.trainers) + [Pulled] * len(self.stage.engines)
        replies = gather([m.party for m in members], futures, kinds, "wire", _limit())
        return [pulled for ranks in replies[len(self.stage.trainers) :] for pulled in ranks]

    def verify(self, flight: Flight, digests: list[bytes] | None = None) -> None:
        """Hold what lies in the sinks' arenas to the digests of the sources.

        Raises:
            DigestError: it is not what was published.
        """
        message = _each(Verify(flight.version, self.digests(flight) if digests is None else digests))
        self._ask(self.stage.engines, "verify", message, Timed)

    def install(self, flight: Flight) -> None:
        """Let every engine serve a version that was verified."""
        self._ask(self.stage.engines, "update", pack(Update(flight.version, _SECONDS)), Installed)

    def _carried(self, flight: Flight, engine: Member) -> dict[str, Any] | None:
        """What Ray brings to an engine, if the transport is one that Ray carries."""
        triple = self.stage.triple
        backend = registry().load("transport", triple.transport.name)
        if not backend.moves_ray_objects:
            return None
        wire = backend.ray_tensor_transport(transport_options(self.stage))
        sink = next(name for name in self._sinks if name.startswith(f"{engine.name}."))
        return {t.name: t.party.tensors(flight.version, flight.slot, sink, wire) for t in self.stage.trainers}

    def _ask(self, members: Sequence[Member], method: str, payload: bytes, kind: type[Any]) -> list[list[Any]]:
        futures = [member.party.call(method, payload) for member in members]
        return gather([m.party for m in members], futures, [kind] * len(futures), method, _limit())


def _each(message: object) -> bytes:
    """One message for all ranks of an engine."""
    return msgspec.msgpack.encode([pack(message)])


def _limit() -> float:
    return time.monotonic() + 2 * _SECONDS


def transport_options(stage: Stage) -> TransportOptions:
    """The options of a stage's transport, the scene's and the user's."""
    found: TransportOptions = stage.triple.validated(
        "transport", stage.triple.transport.with_options(stage.scene.transport).options
    )
    return found


# Copies


@contextlib.contextmanager
def copies(cut: Cut) -> Iterator[None]:
    """Let epochs that begin within move the plan's bytes by other copies."""
    with mock.patch.object(session, "runs", cut):
        yield


def one_a_tensor(parts: Sequence[Part]) -> list[Run]:
    """A copy for each part of a tensor; the plan's own join neighbours and the gaps between them."""
    return [Run(part.source, part.source_offset, part.offset, part.nbytes) for part in parts]


def shredded(sizes: Sequence[int]) -> Cut:
    """The plan's copies, cut into copies of those sizes in turn."""

    def cut(parts: Sequence[Part]) -> list[Run]:
        turns = itertools.cycle(sizes)
        return [piece for run in runs(parts) for piece in _pieces(run, turns)]

    return cut


def _pieces(run: Run, sizes: Iterator[int]) -> Iterator[Run]:
    done = 0
    while done < run.nbytes:
        nbytes = min(next(sizes), run.nbytes - done)
        yield Run(run.source, run.source_offset + done, run.offset + done, nbytes)
        done += nbytes


# Run in a member's process


def flip_published(host: Any, slot: int) -> None:
    """Flip a bit in the middle of what a trainer rank has published in a buffer."""
    segments = host.published._slots[slot].segments
    flat = max(segments, key=torch.Tensor.numel).view(-1).view(torch.uint8)
    flat[len(flat) // 2] ^= 1


def flip_weight(host: Any, name: str) -> None:
    """Flip the lowest bit of one element in the middle of the reference trainer's replica of a tensor."""
    flat = host.trainer.tensors[name].view(-1)
    flat[len(flat) // 2 : len(flat) // 2 + 1].view(torch.uint8)[0] ^= 1


def paint_arenas(host: Any) -> int:
    """Fill the arenas of an engine with a pattern. Returns their bytes."""
    arenas = [_arena(subscriber) for subscriber in subscribers(host)]
    for arena in arenas:
        arena.fill_(_PAINT)
    return sum(arena.numel() for arena in arenas)


def painted(host: Any) -> int:
    """How many bytes of an engine's arenas have that pattern."""
    return sum(int((_arena(subscriber) == _PAINT).sum()) for subscriber in subscribers(host))


def paint_gaps(host: Any) -> int:
    """Fill what lies between the tensors in an engine's arenas with the pattern. Returns how many bytes that are."""
    gaps = [gap for subscriber in subscribers(host) for gap in _gaps(subscriber)]
    for gap in gaps:
        gap.fill_(_PAINT)
    return sum(gap.numel() for gap in gaps)


def painted_gaps(host: Any) -> int:
    """How many bytes between the tensors have that pattern."""
    return sum(int((gap == _PAINT).sum()) for subscriber in subscribers(host) for gap in _gaps(subscriber))


def _arena(subscriber: Subscriber) -> torch.Tensor:
    assert subscriber._arena is not None
    return subscriber._arena.tensor


def _gaps(subscriber: Subscriber) -> list[torch.Tensor]:
    assert subscriber._share is not None
    spans = sorted((part.offset, part.offset + part.nbytes) for part in subscriber._share.parts)
    ends = [0, *(stop for _, stop in spans)]
    starts = [*(start for start, _ in spans), subscriber._share.arena_bytes]
    return [_arena(subscriber)[end:start] for end, start in zip(ends, starts, strict=True) if start > end]


def idle_source(_host: Any, spec: TransportSpec) -> int:
    """What an end does that has nothing to give: the count of tensors that it lets Ray carry."""
    end = open_transport(spec, "trainer[9]", "source", 1, "cpu")
    end.open([Arena(0).tensor])
    end.connect({}, [])
    carried = len(end.tensors(1, 0, "generator[0].rank[0]")) if end.moves_ray_objects else 0
    end.send(1, 0, time.monotonic() + 10)
    end.close()
    return carried


def idle_sink(_host: Any, spec: TransportSpec) -> tuple[int, bool]:
    """What an end does that has nothing to get: the bytes that it says it received, and whether it says that it is settled."""
    end = open_transport(spec, "generator[9].rank[0]", "sink", 1, "cpu")
    end.open([Arena(0).tensor])
    end.connect({}, [])
    received = end.receive(1, 0, {}, time.monotonic() + 10)
    settled = end.settled(peers_closed=False)
    end.close()
    return received, settled


def open_and_close(_host: Any, spec: TransportSpec, side: Any) -> None:
    """What becomes of an end whose peers were never found."""
    end = open_transport(spec, "unconnected", side, 1, "cpu")
    end.open([Arena(4096).tensor])
    end.close()


LENT = 4 << 20
"""Bytes that `lend` gives out."""


def lend(host: Any, spec: TransportSpec) -> bytes:
    """Open a source end over memory full of a pattern, and keep it. Returns its address."""
    memory = Arena(LENT).tensor.fill_(_PAINT)
    end = open_transport(spec, "lender", "source", 1, "cpu")
    host.lent = (end, memory)
    return end.open([memory])


def borrow(host: Any, spec: TransportSpec, address: bytes, seconds: float) -> str:
    """Open a sink end, and fetch what is lent: how many bytes of the pattern arrived, or the error, as a text."""
    memory = Arena(LENT).tensor
    end = open_transport(spec, "borrower", "sink", 1, "cpu")
    host.lent = (end, memory)
    end.open([memory])
    end.connect({"lender": address}, [Copy("lender", "borrower", 0, 0, 0, 0, 0, LENT)])
    return borrow_again(host, seconds)


def borrow_again(host: Any, seconds: float) -> str:
    """Fetch it by the same end, and say the same."""
    end, memory = host.lent
    memory.zero_()
    try:
        end.receive(1, 0, {}, time.monotonic() + seconds)
    except RlbridgeError as error:
        return f"{type(error).__name__}: {error}"
    tail = int((memory[-_TAIL:] == _PAINT).sum())  # first, as what comes last
    return f"{min(int((memory == _PAINT).sum()), LENT - _TAIL + tail)} bytes"


def let_go(host: Any) -> None:
    """Close the end of `lend` or `borrow`, if it is open."""
    end, _ = getattr(host, "lent", (None, None))
    if end is not None:
        end.close()
        host.lent = (None, None)
