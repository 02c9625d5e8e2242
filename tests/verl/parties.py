"""The ends of verl's wire without verl and without Ray: each on a thread with a loop of its own, as a worker has one."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from rlbridge.errors import SyncError
from rlbridge_verl.wire.meeting import Correspondent, Meeting, names_of
from rlbridge_verl.wire.options import wire_options
from rlbridge_verl.wire.sink import Sink
from rlbridge_verl.wire.source import Source

Tensors = list[tuple[str, torch.Tensor]]


class _Handle:
    """What a Ray handle of a meeting place is to its correspondents."""

    def __init__(self, meeting: Meeting, loop: asyncio.AbstractEventLoop) -> None:
        for name in ("put", "get", "fail"):
            setattr(self, name, SimpleNamespace(remote=self._remote(getattr(meeting, name), loop)))

    @staticmethod
    def _remote(method: Callable[..., Coroutine[Any, Any, Any]], loop: asyncio.AbstractEventLoop) -> Callable[..., Any]:
        def remote(*arguments: Any) -> Any:
            future = asyncio.run_coroutine_threadsafe(method(*arguments), loop)
            return SimpleNamespace(future=lambda: future)

        return remote


class Parties:
    """Two trainer ranks and two rollout workers of one epoch, whose buckets hold `bucket_bytes`."""

    def __init__(self, loop: asyncio.AbstractEventLoop, pool: ThreadPoolExecutor, bucket_bytes: int, **options: Any) -> None:
        self._pool = pool
        self.turn = 0
        handle, known = _Handle(Meeting(), loop), wire_options({"transport_options": {"net_devices": "lo"}, **options})
        trainers, rollouts = names_of("trainer", 2), names_of("rollout", 2)
        self.sources = [Source(Correspondent(handle, name), known, bucket_bytes, trainers, rollouts) for name in trainers]
        self.sinks = [Sink(Correspondent(handle, name), known, bucket_bytes, trainers, "cpu") for name in rollouts]

    def send(self, weights: Sequence[Any], version: int) -> list[Future[dict[str, float]]]:
        """Begin the next sync on every trainer rank, each with its own `weights`."""
        self.turn += 1
        return [
            self._pool.submit(asyncio.run, source.send(each, self.turn, version))
            for source, each in zip(self.sources, weights, strict=True)
        ]

    def receive(self, version: int | None, taken: Callable[[str], None] = lambda _: None) -> list[Future[Tensors]]:
        """And on every rollout worker, which calls `taken` with the name of each tensor."""

        async def receive(sink: Sink) -> Tensors:
            tensors = []
            async for name, tensor in sink.receive(self.turn, version):
                tensors.append((name, tensor.clone()))
                taken(name)
            return tensors

        return [self._pool.submit(asyncio.run, receive(sink)) for sink in self.sinks]

    def fail(self, error: SyncError) -> None:
        """What a checkpoint engine does when its end has failed: nobody waits any longer."""
        self.sources[0]._party.fail(error)

    def sync(self, weights: Tensors, version: int) -> list[Tensors]:
        """What each rollout worker gets of one sync in which nothing goes wrong."""
        sent = self.send([weights, weights], version)
        received = [future.result() for future in self.receive(version)]
        assert all(future.result()["rlbridge/version"] == version for future in sent)
        return received


@contextmanager
def parties(bucket_bytes: int, **options: Any) -> Iterator[Parties]:
    """Parties that are closed at the end, when nobody waits any longer."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        with ThreadPoolExecutor(4) as pool:
            made = Parties(loop, pool, bucket_bytes, **options)
            try:
                yield made
            finally:
                made.fail(SyncError("the test is over"))
        assert all(sink.close() for sink in made.sinks)
        for source in made.sources:
            source.close()
            source._teller.shutdown()
        asyncio.run_coroutine_threadsafe(_others_done(), loop).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _others_done() -> None:
    """Messages are left without waiting for it, and the loop must not end before they are."""
    await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}))
