"""What the suite looks at inside a member's process: run there by `Member.apply`, so each takes the host first."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch

from rlbridge.weights.digest import digests
from rlbridge_conformance.checks import Mismatch, holds
from rlbridge_conformance.levels import Role

_LATE_SECONDS = 3.0


class Usage(msgspec.Struct, frozen=True):
    """What a process holds: bytes of memory, of Python's tensors and of shared memory; counts of the rest."""

    resident: int
    tensors: int
    shared: int
    descriptors: int
    threads: int
    mappings: int
    references: int


def usage(_host: Any) -> Usage:
    """What this process holds, after a collection of garbage."""
    gc.collect()
    return Usage(
        resident=int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
        tensors=sum(_storages().values()),
        shared=_shared_bytes(),
        descriptors=len(os.listdir("/proc/self/fd")),  # noqa: PTH208
        threads=threading.active_count(),
        mappings=len(Path("/proc/self/maps").read_text().splitlines()),
        references=_ray_references(),
    )


def no_growth(name: str, before: Usage, look: Callable[[], Usage], what: str, times: int, *, descriptors: int = 0) -> None:
    """Hold what a process holds not to grow with the number of `what`; what wobbles may do so by less than one unit for each.

    Args:
        look: What it holds now. It is asked again for a while: Ray lets go of objects some time after the last use.
        descriptors: How many more file descriptors are allowed all the same.

    Raises:
        Mismatch: something grew.
    """
    limit = time.monotonic() + _LATE_SECONDS
    while time.monotonic() < limit:
        with contextlib.suppress(Mismatch):
            return _holds_no_more(name, before, look(), what, times, descriptors)
        time.sleep(_LATE_SECONDS / 10)
    return _holds_no_more(name, before, look(), what, times, descriptors)


def _holds_no_more(name: str, before: Usage, after: Usage, what: str, times: int, descriptors: int) -> None:
    some = times * 3 // 4
    slacks = {"tensors": 4096, "shared": 0, "descriptors": 8 + descriptors, "threads": 4, "mappings": some, "references": some}
    for held, slack in slacks.items():
        was, now = getattr(before, held), getattr(after, held)
        holds(now - was <= slack, f"{name}: {held} after {times} more {what}", f"{was}, give or take {slack}", now)
    grown = (after.resident - before.resident) / 2**20
    holds(grown < 32, f"{name}: resident memory after {times} more {what}", "less than 32 MiB more", f"{grown:.1f} MiB more")


def registrations(host: Any, role: Role, count: Callable[[Any], int | None]) -> list[tuple[int, int | None]]:
    """The identity of each transport that is open in this process, and what `count` says of what it has registered."""
    return [(id(transport), count(transport)) for transport in open_transports(host, role)]


def open_transports(host: Any, role: Role) -> list[Any]:
    """The transports of the trainer rank, or of those ranks of the engine that live in its own process."""
    ends = [host.published] if role == "trainer" else subscribers(host)
    return [end._transport for end in ends if end._transport is not None]


def subscribers(_host: Any) -> list[Any]:
    """The subscribers of an engine whose ranks live in its own process: none of another engine's."""
    from rlbridge.sync.subscriber import Subscriber

    return sorted((o for o in gc.get_objects() if isinstance(o, Subscriber)), key=lambda s: s.name)


def _storages() -> dict[int, int]:
    found: dict[int, int] = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type == "cpu" and thing.layout == torch.strided:
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def _shared_bytes() -> int:
    """Shared memory of this process that has a name, and the files of this process under /dev/shm."""
    mapped = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "/dev/shm/" in line and "plasma" not in line:  # Ray's own store is one mapping of all that it may ever hold
            low, high = line.split()[0].split("-")
            mapped += int(high, 16) - int(low, 16)
    return mapped


def _ray_references() -> int:
    """Objects that Ray keeps for this process; 0 in a process that is not part of a cluster."""
    import ray

    if not ray.is_initialized():
        return 0
    return len(ray._private.worker.global_worker.core_worker.get_all_reference_counts())


def flip_staged(host: Any) -> None:
    """Flip a bit in the middle of the largest tensor that has arrived."""
    segments = [segment for subscriber in subscribers(host) for segment in subscriber._segments]
    flat = max(segments, key=torch.Tensor.numel).view(-1).view(torch.uint8)
    flat[len(flat) // 2] ^= 1


def pulling(host: Any) -> int:
    """Transfers that go on, of this epoch and of earlier ones."""
    receipts = [s._receipt for s in subscribers(host)] + [g.receipt for s in subscribers(host) for g in s._graveyard]
    return sum(receipt is not None and receipt.running for receipt in receipts)


def unsettled(host: Any) -> int:
    """Transports that say that something may still write into their arenas, of this epoch and of earlier ones."""
    transports = [s._transport for s in subscribers(host) if s._transport is not None]
    transports += [grave.transport for s in subscribers(host) for grave in s._graveyard]
    return sum(not transport.settled(peers_closed=False) for transport in transports)


def staged_digests(host: Any) -> list[bytes]:
    """What lies in every arena, of this epoch and of earlier ones."""
    arenas = [s._arena for s in subscribers(host)] + [grave.arena for s in subscribers(host) for grave in s._graveyard]
    return digests([arena.tensor for arena in arenas if arena is not None])


def object_store_bytes(_host: Any) -> int:
    """Bytes of Ray's object store that this process has written or read: the pages of its mapping that it has touched."""
    touched, plasma = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        word = line.split()[0]
        if "-" in word:  # a mapping's first line: its addresses, and at the end its file
            plasma = "plasma" in line
        elif plasma and word == "Rss:":
            touched += int(line.split()[1]) * 1024
    return touched


def subscribed(host: Any) -> int:
    """How many of an engine's ranks live in its own process."""
    return len(subscribers(host))
