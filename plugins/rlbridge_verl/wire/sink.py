"""A rollout worker's end: two buckets, of which one is read into while verl takes tensors out of the other."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any

import torch

from rlbridge.errors import ConfigError, DigestError, LayoutError, StaleVersionError, SyncError
from rlbridge.roles.transport import Transport
from rlbridge.sync.publisher import open_transport, synchronize, use_device
from rlbridge.weights.arena import Arena
from rlbridge.weights.digest import BYTES, digests
from rlbridge.weights.layout import TensorMeta
from rlbridge_verl.wire.buckets import Packing, Part, bytes_of, copies_of, packing_of
from rlbridge_verl.wire.meeting import SETUP, Correspondent
from rlbridge_verl.wire.messages import Done, Filled, SinkOpened, SourceOpened
from rlbridge_verl.wire.options import WireOptions, transport_spec


class Sink:
    """A rollout worker, for one epoch with the trainer ranks `sources`. A bucket holds `bucket_bytes`."""

    def __init__(
        self, party: Correspondent, options: WireOptions, bucket_bytes: int, sources: Sequence[str], device: str
    ) -> None:
        self._party = party
        self._options = options
        self._bucket_bytes = bucket_bytes
        self._sources = sources
        self._device = device
        self._tensors: list[TensorMeta] = []
        self._packing = Packing(len(sources), bucket_bytes)
        self._buckets: list[torch.Tensor] = []
        self._transport: Transport[Any] | None = None
        self._pull_lock = threading.Lock()  # a thread goes on after its task has been given up

    async def receive(self, turn: int, version: int | None) -> AsyncGenerator[tuple[str, torch.Tensor], None]:
        """Every tensor of the version, once, in the trainer's order; it is valid until the next is asked for.

        None of its bytes is handed on before it is verified.

        Raises:
            StaleVersionError: the trainers publish another version.
            DigestError: the bytes are not those that were published.
        """
        limit = time.monotonic() + self._options.deadline_seconds
        if self._transport is None:
            limit += self._options.setup_seconds
            await self._open(limit)
        assembly, parts = _Assembly(self._tensors, self._device), self._packing.parts
        coming = asyncio.ensure_future(self._bring(turn, 0, version, limit))
        try:
            for number in range(len(parts)):
                version = await coming
                if number + 1 < len(parts):  # into the bucket whose tensors have all been taken
                    coming = asyncio.ensure_future(self._bring(turn, number + 1, version, limit))
                for name, tensor in assembly.tensors(self._buckets[number % 2], parts[number]):
                    yield name, tensor
        finally:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)
        synchronize(self._device)
        assert version is not None
        nbytes = sum(stripe.nbytes for stripes in self._packing.stripes for stripe in stripes)
        assert self._transport is not None
        self._party.put(turn, f"done/{self._party.name}", Done(version, nbytes, self._transport.evidence().wire))

    def close(self) -> bool:
        """End the epoch here. False if a late read may still write into the buckets: keep this object, and ask again."""
        if not self._pull_lock.acquire(blocking=False):
            return False
        try:
            if self._transport is not None:
                if not self._transport.settled(False):
                    return False
                self._transport.close()
            self._transport, self._buckets = None, []
            return True
        finally:
            self._pull_lock.release()

    async def _open(self, limit: float) -> None:
        names = {f"opened/{source}": source for source in self._sources}
        opened = await self._party.get(SETUP, names, SourceOpened, limit, "set-up")
        self._check_opened(opened)
        self._tensors = opened[0].tensors
        self._packing = packing_of(self._tensors, len(self._sources), self._bucket_bytes)
        size = max(stripe.offset + stripe.nbytes for stripes in self._packing.stripes for stripe in stripes)
        self._buckets = [Arena(size, self._device).tensor for _ in self._packing.parts[:2]]
        transport = open_transport(transport_spec(self._options), self._party.name, "sink", 1, self._device)
        try:
            self._party.put(SETUP, f"opened/{self._party.name}", SinkOpened(transport.open(self._buckets)))
            addresses = {name: source.address for name, source in zip(self._sources, opened, strict=True)}
            copies = copies_of(self._packing, self._sources, self._party.name)
            await asyncio.to_thread(transport.connect, addresses, copies)
        except BaseException:
            transport.close()
            raise
        self._transport = transport

    def _check_opened(self, opened: list[SourceOpened]) -> None:
        for name, each in zip(self._sources, opened, strict=True):
            if each.bucket_bytes != self._bucket_bytes:
                raise ConfigError(
                    f"{name} has buckets of {each.bucket_bytes} bytes, and this rollout worker of {self._bucket_bytes}",
                    rank=self._party.name,
                    todo="update_weights_bucket_megabytes has to be the same for all",
                )
            if each.listing != opened[0].listing:
                raise LayoutError(
                    f"verl exports other tensors on {name} than on {self._sources[0]}, or in another order",
                    rank=self._party.name,
                    peer=name,
                    phase="set-up",
                )

    async def _bring(self, turn: int, number: int, version: int | None, limit: float) -> int:
        """Read and verify a bucket, once the trainer ranks have filled it. Returns its version."""
        names = {f"{number}/{source}": source for source in self._sources}
        filled = await self._party.get(turn, names, Filled, limit, "publish")
        version = self._agreed([each.version for each in filled], version)
        await asyncio.to_thread(self._pull, number, [each.digests for each in filled], version, limit)
        return version

    def _pull(self, number: int, wanted: list[bytes], version: int, limit: float) -> None:
        with self._pull_lock:
            if self._transport is None:
                raise SyncError("this epoch has ended", rank=self._party.name, version=version, phase="wire")
            use_device(self._device)
            synchronize(self._device)  # verl may have queued copies out of this bucket, and a transport knows no streams
            self._transport.receive(version, number, {}, limit)
            self._verify(number, wanted, version)

    def _agreed(self, published: list[int], wanted: int | None) -> int:
        version = published[0] if wanted is None else wanted
        for name, each in zip(self._sources, published, strict=True):
            if each != version:
                raise StaleVersionError(
                    f"{name} publishes version {each}, and version {version} is asked for",
                    rank=self._party.name,
                    peer=name,
                    version=version,
                    phase="publish",
                )
        return version

    def _verify(self, number: int, wanted: list[bytes], version: int) -> None:
        bucket, stripes = self._buckets[number % 2], self._packing.stripes[number]
        found = digests([bucket[stripe.offset : stripe.offset + stripe.nbytes] for stripe in stripes])
        seen = [0] * len(self._sources)
        for stripe, digest in zip(stripes, found, strict=True):
            start = seen[stripe.rank]
            seen[stripe.rank] += BYTES
            if digest != wanted[stripe.rank][start : start + BYTES]:
                first = next(part for part in self._packing.parts[number] if part.offset + part.nbytes > stripe.offset)
                raise DigestError(
                    f"what came from {self._sources[stripe.rank]} is not what it published",
                    rank=self._party.name,
                    peer=self._sources[stripe.rank],
                    version=version,
                    phase="verify",
                    tensor=self._tensors[first.tensor].name,
                    todo="none of it was handed to the rollout, which may have earlier tensors of this version: sync again",
                )


class _Assembly:
    """Tensors out of buckets: views, but for the one that is too large for a bucket."""

    def __init__(self, tensors: list[TensorMeta], device: str) -> None:
        self._tensors = tensors
        self._device = device
        self._large: torch.Tensor | None = None

    def tensors(self, bucket: torch.Tensor, parts: Sequence[Part]) -> Iterator[tuple[str, torch.Tensor]]:
        """What is complete with this bucket."""
        for part in parts:
            meta, raw = self._tensors[part.tensor], bucket[part.offset : part.offset + part.nbytes]
            total = bytes_of(meta)
            if part.nbytes < total:
                if self._large is None:
                    self._large = torch.empty(total, dtype=torch.uint8, device=self._device)
                self._large[part.start : part.start + part.nbytes].copy_(raw)
                if part.start + part.nbytes < total:
                    continue
                raw, self._large = self._large, None
            yield meta.name, raw.view(getattr(torch, meta.dtype)).view(meta.shape)
