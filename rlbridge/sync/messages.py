"""What the session, the publishers and the subscribers say to one another: msgspec structs, never framework objects.

A message about a version carries the token of its epoch, so that a call that a stopped process answers too late, when the
session has long begun another epoch, is refused. An empty token stands for whichever epoch is open.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from rlbridge.errors import RlbridgeError, WireError, from_wire, to_wire
from rlbridge.rdma.counters import Counted
from rlbridge.roles.generator import PauseMode
from rlbridge.roles.transport import Copy, WireEvidence
from rlbridge.weights.layout import Layout, Region, TensorMeta
from rlbridge.weights.plan import SinkShare, SourceShare

T = TypeVar("T")
_log = logging.getLogger(__name__)

ASIDE = frozenset({"record", "open", "connect", "start_pull", "wait_pull", "verify", "close"})
"""The calls of a subscriber that leave the engine's parameters alone: they can be answered beside its steps."""


class Nothing(msgspec.Struct, frozen=True):
    """No arguments, or no answer."""


class TransportSpec(msgspec.Struct, frozen=True):
    """The backend's name and its options as plain data."""

    backend: str
    options: dict[str, Any]


class Described(msgspec.Struct, frozen=True):
    """A publisher's answer to `layout`, a subscriber's to `record`: its name in the session, and what it holds or needs."""

    name: str
    layout: Layout


class Record(msgspec.Struct, frozen=True):
    """What the trainer publishes."""

    tensors: list[TensorMeta]


class OpenSource(msgspec.Struct, frozen=True):
    """Start an epoch on a publisher. `publish` is "snapshot" (two arenas) or "barrier" (live storage)."""

    epoch: int
    transport: TransportSpec
    publish: str
    lease_seconds: float
    share: SourceShare
    session: str = ""


class OpenSink(msgspec.Struct, frozen=True):
    """Start an epoch on a subscriber."""

    epoch: int
    transport: TransportSpec
    share: SinkShare
    session: str = ""


class Opened(msgspec.Struct, frozen=True):
    """The transport's address here, and how long allocating and registering took.

    `places` is for sources only: for each slot, (block, byte offset) of each segment. Empty stands for "block = slot, offset as
    planned", which is what arenas have.
    """

    address: bytes
    seconds: float
    places: list[list[tuple[int, int]]] = []


class Connect(msgspec.Struct, frozen=True):
    """The peers of an epoch and every copy that this end takes part in."""

    peers: dict[str, bytes]
    copies: list[Copy]
    epoch: str = ""


class Publish(msgspec.Struct, frozen=True):
    """Make `version` readable by `sinks`."""

    version: int
    sinks: list[str]
    epoch: str = ""


class Published(msgspec.Struct, frozen=True):
    """Where the version lies, and the seconds that the copy took."""

    slot: int
    seconds: float


class Send(msgspec.Struct, frozen=True):
    """Move `version` to every sink, as far as the transport asks the source to act."""

    version: int
    slot: int
    seconds: float
    epoch: str = ""


class Sent(msgspec.Struct, frozen=True):
    """A version was handed to the transport in so many seconds, and what carried it where this end knows."""

    seconds: float
    evidence: WireEvidence | None = None


class Digests(msgspec.Struct, frozen=True):
    """One digest a segment, joined, and the seconds that hashing took."""

    joined: bytes
    seconds: float


class Acknowledge(msgspec.Struct, frozen=True):
    """`sinks` have all of `version`: its memory may be reused."""

    version: int
    sinks: list[str]
    epoch: str = ""


class Pull(msgspec.Struct, frozen=True):
    """Begin to receive `version` out of the sources' buffer `slot`, within `seconds`."""

    version: int
    slot: int
    seconds: float
    epoch: str = ""


class Wait(msgspec.Struct, frozen=True):
    """Wait at most `seconds` for what was begun for `version`."""

    version: int
    seconds: float
    epoch: str = ""


def longest_wait(method: str, payload: bytes) -> float:
    """Seconds that the ranks of an engine may wait for bytes in that call of `Subscriber.handle`, by its payload."""
    if method != "wait_pull":
        return 0.0
    waits = [unpack(message, Wait) for message in msgspec.msgpack.decode(payload, type=list[bytes])]
    return max((wait.seconds for wait in waits), default=0.0)


class Update(Wait, frozen=True):
    """Install `version` on every rank of an engine, whose running requests meanwhile are dealt with as `pause` says."""

    pause: PauseMode = "wait"


class Pulled(msgspec.Struct, frozen=True):
    """Bytes that arrived, in how many seconds, and what carried them; `ports`: what the host's RDMA ports counted meanwhile."""

    nbytes: int
    seconds: float
    evidence: WireEvidence | None = None
    ports: Counted | None = None


class Verify(msgspec.Struct, frozen=True):
    """The digests of `version` at the source arenas, one entry a trainer rank."""

    version: int
    digests: list[bytes]
    epoch: str = ""


class Timed(msgspec.Struct, frozen=True):
    """Something is done, in so many seconds."""

    seconds: float


class Installed(msgspec.Struct, frozen=True):
    """An engine serves a new version: seconds of the copy, of hashing the live parameters, and of the whole pause."""

    install: float
    check: float
    pause: float


class State(msgspec.Struct, frozen=True):
    """What an engine rank holds: "ready", "updating" or "dirty", and the version."""

    state: str
    version: int


class Read(msgspec.Struct, frozen=True):
    """Show `count` of the boxes that this rank serves, from the one numbered `first`. For tests: a whole model is much."""

    first: int
    count: int


class Box(msgspec.Struct, frozen=True):
    """A box of a checkpoint tensor as it is served: its bytes in row-major order."""

    region: Region
    dtype: str
    raw: bytes


class Held(msgspec.Struct, frozen=True):
    """Some of the `total` boxes that a rank serves."""

    total: int
    boxes: list[Box]


class Ok(msgspec.Struct, frozen=True, tag="ok"):
    """An answer."""

    payload: bytes


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """An error instead of an answer."""

    error: WireError


def pack(message: object) -> bytes:
    """A message as bytes."""
    return msgspec.msgpack.encode(message)


def unpack(payload: bytes, kind: type[T]) -> T:
    """The message that `pack` was given."""
    return msgspec.msgpack.decode(payload, type=kind)


def answer(call: Callable[[], object]) -> bytes:
    """The result of `call` as an `Ok`, or its error as a `Failed`: errors cross environments as ours."""
    try:
        return pack(Ok(pack(call())))
    except RlbridgeError as error:
        return pack(Failed(to_wire(error)))
    except Exception as error:
        _log.exception("an error that is none of rlbridge's own")
        return pack(Failed(to_wire(error)))


def result(reply: bytes, kind: type[T]) -> T:
    """What `answer` carried.

    Raises:
        RlbridgeError: the error that the other side raised.
    """
    message = msgspec.msgpack.decode(reply, type=Ok | Failed)
    if isinstance(message, Failed):
        raise from_wire(message.error)
    return unpack(message.payload, kind)
