"""The contract of a transport: it moves bytes between blocks of memory and knows nothing of models.

Once an epoch, on both sides and in this order: `open` (register the blocks, give out an address), `connect` (learn the peers'
addresses and the copies of every version to come). Then for each version, while the session holds the deadline:

- a one-sided READ: `send` does nothing, `receive` fetches;
- a one-sided WRITE: `send` writes into the sinks, `receive` waits for the sources' completion notes;
- a transport that moves Ray objects: what `tensors` returns at the source, Ray delivers to `receive`.

`receive` runs on a thread of its own, so an engine goes on generating while bytes arrive.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

import msgspec
from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    import torch

Side = Literal["source", "sink"]


class TransportOptions(BaseModel):
    """What every transport understands. A backend's own options model derives from it and adds its own keys."""

    model_config = ConfigDict(extra="forbid", validate_default=True)

    backend: str = Field(
        "nixl", description="Name of the transport backend, or auto: the first that works here, printed with the reason."
    )
    require: Literal["any", "rdma"] = Field(
        "any",
        description="rdma: every sync has to go by RDMA, by what the transport reports and by what the RDMA ports have counted,"
        " or the run fails.",
    )


class Copy(msgspec.Struct, frozen=True):
    """`nbytes` bytes from the source's block to the sink's block; offsets in bytes.

    `slot` is the source's buffer that holds a version (0 or 1 with a double buffer): a sync uses the copies of one slot.
    """

    source: str
    sink: str
    slot: int
    source_block: int
    source_offset: int
    sink_block: int
    sink_offset: int
    nbytes: int


class WireEvidence(msgspec.Struct, frozen=True):
    """What carried the bytes, and how that is known. `wire` is for example "cma" or "tcp"; "unknown" is an honest answer.

    `rdma` is whether that wire is RDMA; None: the transport does not know.
    """

    backend: str
    wire: str
    known_from: str
    bytes_moved: int = 0
    rdma: bool | None = None


class TransportContext(msgspec.Struct, frozen=True):
    """Who this end is: its name in the session ("trainer[1]", "generator[0].rank[1]"), its side, the epoch, its device."""

    name: str
    side: Side
    epoch: int
    device: str
    options: dict[str, Any]


O = TypeVar("O", bound=TransportOptions)  # noqa: E741  (the options model of a backend)


class Transport(ABC, Generic[O]):
    """One end of the wire, in a trainer rank or in an engine rank, for one epoch."""

    moves_ray_objects: ClassVar[bool] = False
    """True where `tensors` gives out what Ray carries; False where the transport moves the bytes itself."""

    @classmethod
    def unavailable(cls, options: O, device: str) -> str | None:
        """Why this transport cannot work on this machine, or None. Called in the driver before anything is placed."""
        return None

    @classmethod
    def ray_tensor_transport(cls, options: O) -> str | None:
        """What `@ray.method(tensor_transport=...)` is to carry `send`'s tensors with; None is the object store."""
        return None

    @classmethod
    def rendezvous(cls, options: O, actors: Sequence[Any], deadline_seconds: float) -> Callable[[], None] | None:
        """Called in the driver once an epoch, with the Ray actors of both sides, where the transport needs a group of them.

        Returns what undoes it, if anything has to be.
        """
        return None

    @abstractmethod
    def __init__(self, context: TransportContext, options: O) -> None: ...

    @abstractmethod
    def open(self, blocks: Sequence[torch.Tensor]) -> bytes:
        """Register flat uint8 `blocks` for the epoch. Returns the address that the peers' `connect` is given."""

    @abstractmethod
    def connect(self, peers: Mapping[str, bytes], copies: Sequence[Copy]) -> None:
        """Prepare all transfers of the epoch: `peers` are addresses by name, `copies` those that this end takes part in."""

    def send(self, version: int, slot: int, deadline: float) -> None:  # a READ has nothing to send
        """Source side of a one-sided WRITE: move version `version` out of buffer `slot` to every sink before `deadline`.

        `deadline` is in the seconds of `time.monotonic`.
        """

    def tensors(self, version: int, slot: int, sink: str) -> list[torch.Tensor]:
        """Source side of a transport that moves Ray objects: what `sink` gets, one tensor a copy, in the order of `copies`."""
        raise TypeError(f"{type(self).__name__} moves no Ray objects")

    @abstractmethod
    def receive(self, version: int, slot: int, tensors: Mapping[str, list[torch.Tensor]], deadline: float) -> int:
        """Sink side: return the bytes received once all of `version` is in the blocks.

        After a deadline it must not return before the transfer can no longer write, unless the transport says so by raising:
        the subscriber keeps the blocks in quarantine until `settled`.

        Raises:
            DeadlineError: not all had arrived; names the peers that are missing.
            PeerLostError: a peer is gone.
        """

    def settled(self, peers_closed: bool) -> bool:
        """Whether nothing can still write into this end's blocks.

        `peers_closed`: every peer has closed its end of the epoch, or is gone. Where the peers act, that settles it; where
        this end does, only the end of its own transfers, however late an answer may come.
        """
        return True

    @abstractmethod
    def evidence(self) -> WireEvidence:
        """What carried the bytes since `connect`, and how that is known."""

    @abstractmethod
    def close(self) -> None:
        """Deregister the blocks and drop the peers."""
