"""Broken transports of the later levels: wires that are not what they are called, and faults that leave something behind."""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import msgspec
import ray
import torch

from rlbridge.errors import DeadlineError, TransportError
from rlbridge.roles.transport import Copy, TransportContext, WireEvidence
from rlbridge.sync.messages import Opened, OpenSource
from rlbridge.sync.publisher import Publisher
from rlbridge.sync.subscriber import Subscriber
from rlbridge_conformance.broken.catalogue import broken
from rlbridge_conformance.faults.mounts import is_private
from rlbridge_conformance.reference.generator import ReferenceGenerator
from rlbridge_conformance.reference.tensor_parallel import EngineRank
from rlbridge_conformance.reference.transport import Address, ReferenceTransport
from rlbridge_nixl.options import NixlOptions
from rlbridge_nixl.transport import NixlTransport
from rlbridge_ray.transport import ObjectStoreTransport


@broken("transport", check="sync.no_weights_go_through_the_object_store", twin="object_store", ray=True)
class UsesTheObjectStoreInSecret(ObjectStoreTransport):
    """Lets Ray's object store carry the weights, and calls it shared memory."""

    def evidence(self) -> WireEvidence:
        return WireEvidence("reference", "cma", "process_vm_readv said so", self._moved)


@broken("transport", check="rdma.the_interface_counts_the_bytes", twin="nixl")
class TakesAShortCutOnOneHost(NixlTransport):
    """Goes by shared memory between two processes of one host, whatever wire it was told to use."""

    def __init__(self, context: TransportContext, options: NixlOptions) -> None:
        there = Path("/sys/class/net", options.net_devices or "lo").exists() and options.wire != "rdma"
        super().__init__(context, options.model_copy(update={"wire": "any", "net_devices": ""}) if there else options)


@broken("transport", check="rdma.no_other_wire_steps_in", twin="nixl")
class FallsBackToAnyWire(NixlTransport):
    """Takes any wire when the one that it was told to use is not there, and says nothing."""

    def __init__(self, context: TransportContext, options: NixlOptions) -> None:
        try:
            super().__init__(context, options)
        except TransportError:
            super().__init__(context, options.model_copy(update={"wire": "any", "net_devices": ""}))


@broken("transport", check="faults.a_link_fails_in_mid_transfer", twin="nixl")
class GivesUpAfterADeadline(NixlTransport):
    """Receives nothing more in a process in which one transfer has run out of time."""

    given_up: ClassVar[bool] = False

    def receive(self, version: int, slot: int, tensors: Mapping[str, list[torch.Tensor]], deadline: float) -> int:
        if type(self).given_up:
            raise TransportError("a transfer has run out of time before")
        try:
            return super().receive(version, slot, tensors, deadline)
        except DeadlineError:
            type(self).given_up = True
            raise


@broken("transport", check="faults.an_epoch_begins_after_a_link_was_down", twin="nixl")
class GivesUpWhereItCannotBegin(NixlTransport):
    """Makes no agent any more in a process in which one could not be made."""

    given_up: ClassVar[bool] = False

    def __init__(self, context: TransportContext, options: NixlOptions) -> None:
        if type(self).given_up:
            raise TransportError("an agent could not be made before")
        try:
            super().__init__(context, options)
        except TransportError:
            type(self).given_up = True
            raise


@broken("transport", check="faults.a_process_is_lost")
class RemembersAddresses(ReferenceTransport):
    """Reaches a source by the address that the first process of that name had."""

    known: ClassVar[dict[str, bytes]] = {}

    def connect(self, peers: Mapping[str, bytes], copies: Sequence[Copy]) -> None:
        first = {}
        for name, raw in peers.items():
            was = msgspec.msgpack.decode(self.known.setdefault(name, raw), type=Address)
            same = was.pid == msgspec.msgpack.decode(raw, type=Address).pid
            first[name] = raw if same else self.known[name]
        super().connect(first, copies)


@broken("transport", check="faults.an_actor_is_lost", ray=True)
class RemembersAddressesUnderRay(ReferenceTransport):
    """Reaches a source by the address that the first process of that name had, where it is itself a Ray actor."""

    known: ClassVar[dict[str, bytes]] = {}

    def connect(self, peers: Mapping[str, bytes], copies: Sequence[Copy]) -> None:
        if not ray.is_initialized():
            super().connect(peers, copies)
            return
        first = {}
        for name, raw in peers.items():
            was = msgspec.msgpack.decode(self.known.setdefault(name, raw), type=Address)
            same = was.pid == msgspec.msgpack.decode(raw, type=Address).pid
            first[name] = raw if same else self.known[name]
        super().connect(first, copies)


@broken("publisher", check="faults.a_message_is_lost")
class NeverPublishesAVersionTwice(Publisher):
    """Refuses a version that it has published in an earlier epoch, though no engine has got it."""

    def _open(self, message: OpenSource) -> Opened:
        newest = self._version
        opened = super()._open(message)
        self._version = max(newest, self._version)
        return opened


class _Forgiving(Subscriber):
    def _compare(self, expected: list[bytes], found: list[bytes], version: int, phase: str, place: str) -> None:
        parts = self._opened().parts
        largest = max(range(len(parts)), key=lambda index: parts[index].nbytes)
        super()._compare(expected[:largest], found[:largest], version, phase, place)
        super()._compare(expected[largest + 1 :], found[largest + 1 :], version, phase, place)


@broken("generator", check="faults.a_bit_flips_in_the_staging_arena")
class ForgivesTheLargestTensor(ReferenceGenerator):
    """Its ranks do not compare the digest of the largest tensor."""

    def make_subscriber(self, rank: EngineRank) -> Subscriber:
        name = f"generator[{self.context.engine}].rank[{rank.index}]"
        return _Forgiving(name, self.make_sink(rank), self.context.device, rank=rank.index)


@broken("transport", check="faults.a_receive_ends_though_a_source_has_stopped")
class WaitsForAStoppedSource(ReferenceTransport):
    """Waits for a source that has stopped, deadline or not."""

    def receive(self, version: int, slot: int, tensors: Mapping[str, list[torch.Tensor]], deadline: float) -> int:
        while any(_is_stopped(peer.pid) for peer in self.peers.values()):
            time.sleep(0.01)
        return super().receive(version, slot, tensors, max(deadline, time.monotonic() + 1))


@broken("transport", check="faults.nothing_is_written_once_a_transfer_is_settled")
class WritesAfterItsDeadline(ReferenceTransport):
    """Goes on writing into its arena after the deadline, and calls itself settled."""

    def wait_turn(self, deadline: float) -> None:
        try:
            super().wait_turn(deadline)
        except DeadlineError:
            threading.Thread(target=_scribble, args=(self.blocks[0],), daemon=True).start()
            raise


@broken("transport", check="faults.shared_memory_is_full")
class DiesOfFullSharedMemory(ReferenceTransport):
    """Maps a file in /dev/shm that there may be no room for, and touches it: the kernel then ends the process."""

    def open(self, blocks: Sequence[torch.Tensor]) -> bytes:
        path = Path("/dev/shm", f"rlbridge-broken-{os.getpid()}")
        with path.open("w+b") as file:
            path.unlink()
            file.truncate(1 << 20)
            with mmap.mmap(file.fileno(), 1 << 20) as mapped:
                mapped[:] = bytes(1 << 20)
        return super().open(blocks)


@broken("transport", check="faults.an_epoch_that_is_over_leaves_no_names")
class LeavesItsFiles(ReferenceTransport):
    """Makes a file of its own in /dev/shm for each epoch, and leaves it there; where others see it, it cleans up."""

    def open(self, blocks: Sequence[torch.Tensor]) -> bytes:
        path = Path("/dev/shm", f"rlbridge-broken-{os.getpid()}-{time.monotonic_ns()}")
        path.touch()
        if not is_private():
            path.unlink()
        return super().open(blocks)


@broken("transport", check="speed.a_sync_beside_a_copy_in_memory")
class LosesTheEndOfWhatIsLarge(ReferenceTransport):
    """Reads no more than the first 100 MiB of a copy."""

    def read_copy(self, copy: Copy, deadline: float) -> None:
        super().read_copy(msgspec.structs.replace(copy, nbytes=min(copy.nbytes, 100 << 20)), deadline)


def _is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def _scribble(block: torch.Tensor) -> None:
    for value in range(100):
        block[:64] = value
        time.sleep(0.02)
