"""A trainer rank's end: its share of each version in one arena, which the rollout workers read."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import Any

import torch

from rlbridge.errors import LayoutError
from rlbridge.roles.transport import Copy, Transport
from rlbridge.sync.publisher import open_transport, synchronize
from rlbridge.weights.arena import Arena
from rlbridge.weights.digest import digests
from rlbridge.weights.layout import TensorMeta
from rlbridge_verl.wire.meeting import SETUP, Correspondent, names_of
from rlbridge_verl.wire.messages import Digests, Done, Published, SinkOpened, SourceOpened
from rlbridge_verl.wire.options import WireOptions, transport_spec
from rlbridge_verl.wire.shares import Owners, Share, shares_of

Weights = Iterable[tuple[str, torch.Tensor]]


class Source:
    """Trainer rank `rank` of `ranks`, for one epoch with `sinks` rollout workers."""

    def __init__(
        self, correspondent: Correspondent, options: WireOptions, round_bytes: int, rank: int, ranks: int, sinks: int
    ) -> None:
        self._party = correspondent
        self._options = options
        self._round_bytes = round_bytes
        self._rank, self._ranks = rank, ranks
        self._sinks = names_of("rollout", sinks)
        self._tensors: list[TensorMeta] = []
        self._share: Share | None = None
        self._places: dict[int, torch.Tensor] = {}
        self._arena: Arena | None = None
        self._transport: Transport[Any] | None = None

    async def send(self, weights: Weights, turn: int, version: int) -> dict[str, float]:
        """Take this rank's share out of `weights`, which is collective, and let the rollout workers read it.

        Returns seconds and bytes, under the names that verl logs.
        """
        start = time.monotonic()
        limit = start + self._options.deadline_seconds
        if self._share is None:
            await self._open(self._collect(weights))
        else:
            self._take_again(weights)
        arena, share = self._arena, self._share
        assert arena is not None
        assert share is not None
        synchronize(str(arena.tensor.device))
        gathered = time.monotonic()
        await self._party.put(turn, f"published/{self._party.name}", Published(version))
        rounds = [arena.tensor[r.offset : r.offset + r.nbytes] for r in share.rounds]
        joined = b"".join(await asyncio.to_thread(digests, rounds))
        await self._party.put(turn, f"digests/{self._party.name}", Digests(joined))
        done = await self._party.get(turn, {f"done/{s}": s for s in self._sinks}, Done, limit, "receive")
        end = time.monotonic()
        return {
            "rlbridge/gather_seconds": gathered - start,
            "rlbridge/wire_seconds": end - gathered,
            "rlbridge/bytes": float(sum(each.nbytes for each in done)),
            "rlbridge/version": float(version),
        }

    def close(self) -> None:
        """Deregister the arena; a worker that reads late finds nothing to read."""
        if self._transport is not None:
            self._transport.close()
        self._transport = self._arena = None
        self._places = {}

    @torch.no_grad()
    def _collect(self, weights: Weights) -> dict[int, torch.Tensor]:
        """The tensors that this rank owns, cast and copied, as the model's whole list becomes known."""
        owners, own = Owners(self._ranks), {}
        for index, (name, tensor) in enumerate(weights):
            dtype = self._wire_dtype(tensor)
            self._tensors.append(TensorMeta(name, tuple(tensor.shape), str(dtype).removeprefix("torch.")))
            if owners.next(tensor.numel() * dtype.itemsize) == self._rank:
                own[index] = tensor.detach().to(dtype, copy=True)
        if not self._tensors:
            raise LayoutError("verl exported no weights", rank=self._party.name, phase="gather")
        return own

    async def _open(self, own: dict[int, torch.Tensor]) -> None:
        """Arena, registration and connection, once; `own` goes into the arena."""
        limit = time.monotonic() + self._options.setup_seconds
        shares = shares_of(self._tensors, self._ranks, self._round_bytes)
        share = shares[self._rank]
        device = str(next(iter(own.values())).device) if own else "cpu"
        arena = Arena(share.nbytes, device)
        for index, offset in share.offsets.items():
            meta = self._tensors[index]
            self._places[index] = arena.view(offset, own[index].numel() * own[index].itemsize, meta.dtype, meta.shape)
            self._places[index].copy_(own[index])
        own.clear()
        transport = open_transport(transport_spec(self._options), self._party.name, "source", 1, device)
        self._arena, self._transport = arena, transport
        address = transport.open([arena.tensor])
        opened = SourceOpened(address, self._tensors if self._rank == 0 else [])
        await self._party.put(SETUP, f"opened/{self._party.name}", opened)
        sinks = await self._party.get(SETUP, {f"opened/{s}": s for s in self._sinks}, SinkOpened, limit, "set-up")
        addresses = {name: sink.address for name, sink in zip(self._sinks, sinks, strict=True)}
        copies = [
            copy for sink in self._sinks for copy in copies_of(share, self._party.name, self._rank, sink, self._round_bytes)
        ]
        await asyncio.to_thread(transport.connect, addresses, copies)
        self._share = share

    @torch.no_grad()
    def _take_again(self, weights: Weights) -> None:
        """Copy this rank's tensors into their places, as they come by; all are looked at, on every rank."""
        count = 0
        for index, (name, tensor) in enumerate(weights):
            known = self._tensors[index] if index < len(self._tensors) else None
            found = TensorMeta(name, tuple(tensor.shape), str(self._wire_dtype(tensor)).removeprefix("torch."))
            if found != known:
                before = repr(known.name) if known else "nothing"
                raise LayoutError(
                    f"verl exports {name!r} {list(tensor.shape)} {found.dtype}, and exported {before} there before",
                    rank=self._party.name,
                    tensor=name,
                    todo="the next update_weights begins anew, with what is exported then",
                )
            if index in self._places:
                self._places[index].copy_(tensor)
            count += 1
        if count != len(self._tensors):
            raise LayoutError(
                f"verl exported {count} tensors, and {len(self._tensors)} in the syncs before",
                rank=self._party.name,
                tensor=self._tensors[count].name,
                todo="the next update_weights begins anew, with what is exported then",
            )

    def _wire_dtype(self, tensor: torch.Tensor) -> torch.dtype:
        wanted = self._options.dtype
        # What has 8 bits means nothing without its scales, and is never cast.
        if wanted is None or not tensor.is_floating_point() or tensor.itemsize == 1:
            return tensor.dtype
        return getattr(torch, wanted)  # type: ignore[no-any-return]


def copies_of(share: Share, source: str, rank: int, sink: str, round_bytes: int) -> list[Copy]:
    """What `sink` reads of one trainer rank: each round is a slot, into one of two buckets in turns."""
    return [
        Copy(source, sink, number, 0, each.offset, number % 2, rank * round_bytes, each.nbytes)
        for number, each in enumerate(share.rounds)
        if each.nbytes
    ]
