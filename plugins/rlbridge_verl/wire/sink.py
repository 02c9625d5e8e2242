"""A rollout worker's end: two buckets, of which one is read into while verl takes tensors out of the other."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import torch

from rlbridge.errors import DigestError, StaleVersionError
from rlbridge.roles.transport import Transport
from rlbridge.sync.publisher import open_transport, synchronize
from rlbridge.weights.arena import Arena
from rlbridge.weights.digest import BYTES, digests
from rlbridge.weights.layout import TensorMeta
from rlbridge_verl.wire.meeting import SETUP, Correspondent, names_of
from rlbridge_verl.wire.messages import Digests, Done, Published, SinkOpened, SourceOpened
from rlbridge_verl.wire.options import WireOptions, transport_spec
from rlbridge_verl.wire.shares import Round, Share, bytes_of, shares_of
from rlbridge_verl.wire.source import copies_of


class Sink:
    """A rollout worker, for one epoch with `ranks` trainer ranks. A round of a bucket holds `round_bytes` of each of them."""

    def __init__(self, correspondent: Correspondent, options: WireOptions, round_bytes: int, ranks: int, device: str) -> None:
        self._party = correspondent
        self._options = options
        self._round_bytes = round_bytes
        self._sources = names_of("trainer", ranks)
        self._device = device
        self._tensors: list[TensorMeta] = []
        self._shares: list[Share] = []
        self._buckets: list[Arena] = []
        self._transport: Transport[Any] | None = None

    async def receive(self, turn: int, version: int | None) -> AsyncIterator[tuple[str, torch.Tensor]]:
        """Every tensor of the version, once, as soon as its bytes are verified; a tensor lives until the next is asked for.

        Raises:
            StaleVersionError: the trainers publish another version.
            DigestError: the bytes are not those that were published.
        """
        limit = time.monotonic() + self._options.deadline_seconds
        if self._transport is None:
            limit += self._options.setup_seconds
            await self._open(limit)
        transport = self._transport
        assert transport is not None
        published = await self._party.get(turn, self._names("published"), Published, limit, "publish")
        version = self._agreed([each.version for each in published], version)
        known = asyncio.ensure_future(self._party.get(turn, self._names("digests"), Digests, limit, "publish"))
        assembly = _Assembly(self._tensors, self._device)
        count = max(len(share.rounds) for share in self._shares)
        try:
            coming = asyncio.ensure_future(asyncio.to_thread(self._read, transport, version, 0, limit))
            for number in range(count):
                await coming
                wanted = await known
                await asyncio.to_thread(self._verify, [each.joined for each in wanted], number, version)
                if number + 1 < count:  # into the bucket whose tensors have all been taken
                    coming = asyncio.ensure_future(asyncio.to_thread(self._read, transport, version, number + 1, limit))
                for bucket, round_ in self._pieces(number):
                    for name, tensor in assembly.tensors(bucket, round_):
                        yield name, tensor
        finally:
            known.cancel()
            if not coming.done():  # it writes into a bucket of this epoch as long as it runs
                await asyncio.wait([coming])
        synchronize(self._device)
        nbytes = sum(each.nbytes for share in self._shares for each in share.rounds)
        await self._party.put(turn, f"done/{self._party.name}", Done(version, nbytes, transport.evidence().wire))

    def close(self) -> bool:
        """End the epoch here. False if a late read may still write into the buckets: keep this object, and ask again."""
        if self._transport is not None:
            if not self._transport.settled(False):
                return False
            self._transport.close()
        self._transport, self._buckets = None, []
        return True

    async def _open(self, limit: float) -> None:
        sources = await self._party.get(SETUP, self._names("opened"), SourceOpened, limit, "set-up")
        self._tensors = sources[0].tensors
        self._shares = shares_of(self._tensors, len(self._sources), self._round_bytes)
        size = len(self._sources) * self._round_bytes
        self._buckets = [Arena(size, self._device) for _ in range(2)]
        transport = open_transport(transport_spec(self._options), self._party.name, "sink", 1, self._device)
        self._transport = transport
        address = transport.open([bucket.tensor for bucket in self._buckets])
        await self._party.put(SETUP, f"opened/{self._party.name}", SinkOpened(address))
        addresses = {name: source.address for name, source in zip(self._sources, sources, strict=True)}
        copies = [
            copy
            for rank, (name, share) in enumerate(zip(self._sources, self._shares, strict=True))
            for copy in copies_of(share, name, rank, self._party.name, self._round_bytes)
        ]
        await asyncio.to_thread(transport.connect, addresses, copies)

    def _agreed(self, published: list[int], wanted: int | None) -> int:
        for name, version in zip(self._sources, published, strict=True):
            if version != (published[0] if wanted is None else wanted):
                raise StaleVersionError(
                    f"{name} publishes version {version}, and {published[0] if wanted is None else wanted} is asked for",
                    rank=self._party.name,
                    peer=name,
                    version=version,
                    phase="publish",
                )
        return published[0]

    @staticmethod
    def _read(transport: Transport[Any], version: int, number: int, limit: float) -> None:
        transport.receive(version, number, {}, limit)

    def _pieces(self, number: int) -> Iterator[tuple[torch.Tensor, Round]]:
        """What round `number` brought from each trainer rank: the bytes in the bucket, and what they are."""
        for rank, share in enumerate(self._shares):
            if number < len(share.rounds):
                round_, start = share.rounds[number], rank * self._round_bytes
                yield self._buckets[number % 2].tensor[start : start + round_.nbytes], round_

    def _verify(self, wanted: list[bytes], number: int, version: int) -> None:
        there = [(rank, share) for rank, share in enumerate(self._shares) if number < len(share.rounds)]
        found = digests([bucket for bucket, _ in self._pieces(number)])
        for (rank, share), digest in zip(there, found, strict=True):
            if digest != wanted[rank][number * BYTES : (number + 1) * BYTES]:
                raise DigestError(
                    f"round {number} from {self._sources[rank]} is not what was published",
                    rank=self._party.name,
                    peer=self._sources[rank],
                    version=version,
                    phase="verify",
                    tensor=self._tensors[share.rounds[number].chunks[0].tensor].name,
                    todo="nothing of it was handed to the rollout; sync again",
                )

    def _names(self, what: str) -> dict[str, str]:
        return {f"{what}/{name}": name for name in self._sources}


class _Assembly:
    """Tensors out of rounds: views of the bucket, but for those that came in several rounds."""

    def __init__(self, tensors: list[TensorMeta], device: str) -> None:
        self._tensors = tensors
        self._device = device
        self._parts: dict[int, tuple[torch.Tensor, int]] = {}  # the bytes so far, and how many are missing

    def tensors(self, bucket: torch.Tensor, round_: Round) -> Iterator[tuple[str, torch.Tensor]]:
        for chunk in round_.chunks:
            meta, at = self._tensors[chunk.tensor], chunk.offset - round_.offset
            raw, total = bucket[at : at + chunk.nbytes], bytes_of(meta)
            if chunk.nbytes < total:
                whole, missing = self._parts.pop(chunk.tensor, (None, total))
                if whole is None:
                    whole = torch.empty(total, dtype=torch.uint8, device=self._device)
                whole[chunk.start : chunk.start + chunk.nbytes].copy_(raw)
                if missing > chunk.nbytes:
                    self._parts[chunk.tensor] = (whole, missing - chunk.nbytes)
                    continue
                raw = whole
            yield meta.name, raw.view(getattr(torch, meta.dtype)).view(meta.shape)
