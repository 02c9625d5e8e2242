"""A trainer rank's end: its stripes of each version in one arena, which the rollout workers read."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import msgspec
import torch

from rlbridge.errors import LayoutError
from rlbridge.roles.transport import Transport
from rlbridge.sync.publisher import open_transport, synchronize, use_device
from rlbridge.weights.arena import Arena
from rlbridge.weights.digest import digests
from rlbridge.weights.layout import DTYPE_BYTES, TensorMeta
from rlbridge_verl.wire.buckets import Packing, Piece, bytes_of, copies_of
from rlbridge_verl.wire.meeting import SETUP, Correspondent
from rlbridge_verl.wire.messages import Done, Filled, SinkOpened, SourceOpened
from rlbridge_verl.wire.options import WireOptions, transport_spec

Weights = Iterable[tuple[str, torch.Tensor]]


class Source:
    """The trainer rank `party.name` of `sources`, for one epoch with `sinks`. Buckets hold `bucket_bytes`."""

    def __init__(
        self, party: Correspondent, options: WireOptions, bucket_bytes: int, sources: Sequence[str], sinks: Sequence[str]
    ) -> None:
        self._party = party
        self._options = options
        self._bucket_bytes = bucket_bytes
        self._sources, self._sinks = sources, sinks
        self._rank = sources.index(party.name)
        self._packing = Packing(len(sources), bucket_bytes)
        self._tensors: list[TensorMeta] = []
        self._places: list[list[tuple[Piece, torch.Tensor]]] = []  # where this rank's pieces of each tensor go
        self._stripes: list[list[torch.Tensor]] = []  # this rank's, of each bucket
        self._device = "cpu"
        self._transport: Transport[Any] | None = None
        self._teller = ThreadPoolExecutor(1, thread_name_prefix="rlbridge-filled")

    async def send(self, weights: Weights, turn: int, version: int) -> dict[str, float]:
        """Take this rank's stripes out of `weights`, which is collective, and wait until every rollout worker has them.

        A bucket is read as soon as it is complete, while the next one is being gathered.

        Returns seconds and bytes, under the names that verl logs.
        """
        start = time.monotonic()
        setup = 0.0
        if self._transport is None:
            own = self._collect(weights)
            gathered = time.monotonic()
            await self._open(own)
            setup = time.monotonic() - gathered
            told = [self._tell(turn, version, number) for number in range(len(self._stripes))]
        else:
            told = [self._tell(turn, version, number) for number in self._refill(weights)]
            gathered = time.monotonic()
        for each in told:
            await asyncio.wrap_future(each)
        limit = start + setup + self._options.deadline_seconds
        done = await self._party.get(turn, {f"done/{sink}": sink for sink in self._sinks}, Done, limit, "receive")
        return {
            "rlbridge/gather_seconds": gathered - start,
            "rlbridge/setup_seconds": setup,
            "rlbridge/wire_seconds": time.monotonic() - gathered - setup,
            "rlbridge/bytes": float(sum(each.nbytes for each in done)),
            "rlbridge/version": float(version),
        }

    def close(self) -> bool:
        """Deregister the arena; a worker that reads late finds nothing to read. True: nobody writes into it."""
        self._teller.shutdown(wait=False, cancel_futures=True)
        if self._transport is not None:
            self._transport.close()
        self._transport, self._places, self._stripes = None, [], []
        return True

    @torch.no_grad()
    def _collect(self, weights: Weights) -> list[list[tuple[Piece, torch.Tensor]]]:
        """Copies of this rank's pieces of each tensor, as the model's whole list becomes known."""
        own: list[list[tuple[Piece, torch.Tensor]]] = []
        for name, tensor in weights:
            meta = self._described(name, tensor)
            pieces = self._packing.add(bytes_of(meta))
            self._tensors.append(meta)
            mine = [piece for piece in pieces if piece.rank == self._rank]
            own.append([(piece, _cut(piece, meta, tensor).to(getattr(torch, meta.dtype), copy=True)) for piece in mine])
        if not self._tensors:
            raise LayoutError("verl exported no weights", rank=self._party.name, phase="gather")
        return own

    async def _open(self, own: list[list[tuple[Piece, torch.Tensor]]]) -> None:
        """Arena, registration and connection, once; `own` goes into the arena."""
        limit = time.monotonic() + self._options.setup_seconds
        self._device = next((str(copy.device) for copies in own for _, copy in copies), "cpu")
        arena = Arena(self._packing.arena_bytes(self._rank), self._device)
        for meta, copies in zip(self._tensors, own, strict=True):
            self._places.append([])
            for piece, copy in copies:
                place = arena.view(piece.source_offset, piece.nbytes, meta.dtype, tuple(copy.shape))
                place.copy_(copy)
                self._places[-1].append((piece, place))
            copies.clear()
        self._stripes = [
            [arena.tensor[s.source_offset : s.source_offset + s.nbytes] for s in stripes if s.rank == self._rank]
            for stripes in self._packing.stripes
        ]
        transport = open_transport(transport_spec(self._options), self._party.name, "source", 1, self._device)
        try:
            await self._connect(transport, transport.open([arena.tensor]), limit)
        except BaseException:
            transport.close()
            raise
        self._transport = transport

    async def _connect(self, transport: Transport[Any], address: bytes, limit: float) -> None:
        listed = msgspec.msgpack.encode(self._tensors)
        opened = SourceOpened(
            address, self._bucket_bytes, hashlib.sha256(listed).digest(), self._tensors if self._rank == 0 else []
        )
        self._party.put(SETUP, f"opened/{self._party.name}", opened)
        sinks = await self._party.get(SETUP, {f"opened/{sink}": sink for sink in self._sinks}, SinkOpened, limit, "set-up")
        addresses = {name: sink.address for name, sink in zip(self._sinks, sinks, strict=True)}
        copies = [copy for sink in self._sinks for copy in copies_of(self._packing, self._sources, sink)]
        await asyncio.to_thread(transport.connect, addresses, [copy for copy in copies if copy.source == self._party.name])

    @torch.no_grad()
    def _refill(self, weights: Weights) -> Iterator[int]:
        """Copy this rank's pieces into their places as the tensors come by, and give out each bucket that is complete.

        All tensors are looked at, on every rank.
        """
        complete = [*self._packing.begins[1:], len(self._packing.stripes)]  # how many buckets are, after each tensor
        count = bucket = 0
        for count, (name, tensor) in enumerate(weights, start=1):
            known = self._tensors[count - 1] if count <= len(self._tensors) else None
            found = self._described(name, tensor)
            if known != found:
                there = f"{known.name!r} {list(known.shape)} {known.dtype}" if known else "nothing"
                raise self._changed(f"{name!r} {list(found.shape)} {found.dtype}, where there was {there}", name)
            for piece, place in self._places[count - 1]:
                place.copy_(_cut(piece, found, tensor))
            yield from range(bucket, complete[count - 1])
            bucket = complete[count - 1]
        if count != len(self._tensors):
            raise self._changed(f"{count} tensors, where there were {len(self._tensors)}", self._tensors[count].name)

    def _changed(self, what: str, tensor: str) -> LayoutError:
        return LayoutError(
            f"verl exports {what} in the syncs before",
            rank=self._party.name,
            phase="gather",
            tensor=tensor,
            todo="the next update_weights begins anew, with what is exported then",
        )

    def _tell(self, turn: int, version: int, bucket: int) -> Future[None]:
        """On a thread: let the rollout workers know that a bucket is complete here, and the digests of its stripes."""

        def tell() -> None:
            use_device(self._device)
            synchronize(self._device)
            filled = Filled(version, b"".join(digests(stripes)))
            self._party.put(turn, f"{bucket}/{self._party.name}", filled)

        stripes = self._stripes[bucket]
        return self._teller.submit(tell)

    def _described(self, name: str, tensor: torch.Tensor) -> TensorMeta:
        """The tensor as it travels."""
        dtype, wanted = str(tensor.dtype).removeprefix("torch."), self._options.dtype
        # What has 8 bits means nothing without its scales, and is never cast.
        if wanted is not None and tensor.is_floating_point() and tensor.itemsize > 1:
            dtype = wanted
        return TensorMeta(name, tuple(tensor.shape), dtype)


def _cut(piece: Piece, meta: TensorMeta, tensor: torch.Tensor) -> torch.Tensor:
    """The elements that are to fill a piece, in the tensor's own dtype."""
    itemsize = DTYPE_BYTES[meta.dtype]
    return tensor.detach().reshape(-1)[piece.start // itemsize : (piece.start + piece.nbytes) // itemsize]
