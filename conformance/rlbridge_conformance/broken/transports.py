"""Broken transports: bytes that do not arrive, or are not those of the version. The others are in `transports_ends`."""

from __future__ import annotations

import gc
import socket
import threading
import time
from collections.abc import Mapping, Sequence

import msgspec
import torch

from rlbridge.roles.transport import Copy
from rlbridge.sync.publisher import Publisher
from rlbridge_conformance.broken import transports_ends as transports_ends
from rlbridge_conformance.broken.catalogue import broken
from rlbridge_conformance.reference.transport import ReferenceTransport

_ALIGNED = 64
_MOMENT = 0.1


@broken("transport", check="contract.every_byte_arrives")
class LosesTheLastByte(ReferenceTransport):
    """Leaves the last byte of each version where it was."""

    def copies_of(self, slot: int) -> list[Copy]:
        wanted = super().copies_of(slot)
        return [*wanted[:-1], *(msgspec.structs.replace(last, nbytes=last.nbytes - 1) for last in wanted[-1:])]


@broken("transport", check="contract.every_byte_arrives")
class SkipsACopy(ReferenceTransport):
    """Leaves out one copy of several."""

    def copies_of(self, slot: int) -> list[Copy]:
        wanted = super().copies_of(slot)
        return wanted[:-1] if len(wanted) > 1 else wanted


@broken("transport", check="contract.every_byte_arrives")
class FlipsABit(ReferenceTransport):
    """Flips a bit of each version on the way."""

    def receive(self, version: int, slot: int, tensors: Mapping[str, list[torch.Tensor]], deadline: float) -> int:
        received = super().receive(version, slot, tensors, deadline)
        self.blocks[0][len(self.blocks[0]) // 2] ^= 1
        return received


@broken("transport", check="contract.every_byte_arrives")
class StartsLateInTheThirdRank(ReferenceTransport):
    """Reads out of the third trainer rank from one line of memory too far on."""

    def read_copy(self, copy: Copy, deadline: float) -> None:
        moved = _ALIGNED if copy.source == "trainer[2]" and copy.nbytes > _ALIGNED else 0
        shifted = msgspec.structs.replace(copy, source_offset=copy.source_offset + moved, nbytes=copy.nbytes - moved)
        super().read_copy(shifted, deadline)


@broken("transport", check="contract.every_byte_arrives")
class LeavesTheSecondEngineOut(ReferenceTransport):
    """Brings nothing to the second of two engines: it learns too late whom to read."""

    def copies_of(self, slot: int) -> list[Copy]:
        return [] if self.context.name.startswith("generator[1]") else super().copies_of(slot)


@broken("transport", check="contract.each_of_six_versions_is_its_own")
class IgnoresTheSlot(ReferenceTransport):
    """Reads each version out of the first buffer."""

    def copies_of(self, slot: int) -> list[Copy]:
        return super().copies_of(0)


@broken("transport", check="contract.each_of_six_versions_is_its_own")
class LosesCountOfTheSlots(ReferenceTransport):
    """From the fourth version of an epoch on, reads the buffer that holds the one before."""

    received = 0

    def receive(self, version: int, slot: int, tensors: Mapping[str, list[torch.Tensor]], deadline: float) -> int:
        self.received += 1
        return super().receive(version, slot if self.received < 4 else 1 - slot, tensors, deadline)


@broken("transport", check="contract.copies_of_any_size_arrive")
class StartsAtEvenBytes(ReferenceTransport):
    """Lets a copy that starts at an odd byte start one byte earlier."""

    def read_copy(self, copy: Copy, deadline: float) -> None:
        odd = copy.source_offset % 2 if copy.sink_offset else 0
        moved = {"source_offset": copy.source_offset - odd, "sink_offset": copy.sink_offset - odd}
        super().read_copy(msgspec.structs.replace(copy, **moved), deadline)


@broken("transport", check="contract.copies_of_any_size_arrive")
class DropsTheOddByte(ReferenceTransport):
    """Moves pairs of bytes, and so loses the last one of an int8 tensor of odd size."""

    def read_copy(self, copy: Copy, deadline: float) -> None:
        super().read_copy(msgspec.structs.replace(copy, nbytes=copy.nbytes // 2 * 2), deadline)


@broken("transport", check="contract.nothing_is_written_between_the_copies")
class MovesWholeLines(ReferenceTransport):
    """Rounds each copy up to whole lines of memory, as far as the blocks reach."""

    def read_copy(self, copy: Copy, deadline: float) -> None:
        rounded = -(-copy.nbytes // _ALIGNED) * _ALIGNED
        here = self.blocks[copy.sink_block].numel() - copy.sink_offset
        there = self.peers[copy.source].blocks[copy.source_block].nbytes - copy.source_offset
        super().read_copy(msgspec.structs.replace(copy, nbytes=min(rounded, here, there)), deadline)


@broken("transport", check="contract.a_single_changed_bit_arrives")
class SkipsWhatLooksUnchanged(ReferenceTransport):
    """Leaves out a bucket whose first bytes are those that it already has."""

    def read(self, name: str, remote: int, local: int, nbytes: int) -> None:
        block = self.blocks[0]
        start = local - block.data_ptr()
        head = slice(start, start + min(nbytes, _ALIGNED))
        had = block[head].clone()
        super().read(name, remote, local, len(had))
        if len(had) < _ALIGNED or not torch.equal(had, block[head]):
            super().read(name, remote, local, nbytes)


@broken("transport", check="contract.tensors_of_every_kind_arrive")
class SkipsScalars(ReferenceTransport):
    """Takes a copy of a single float for an empty one."""

    def read_copy(self, copy: Copy, deadline: float) -> None:
        if copy.nbytes != 4:
            super().read_copy(copy, deadline)


@broken("transport", check="contract.a_large_tensor_arrives")
class MovesOneBucketOfACopy(ReferenceTransport):
    """Moves no more than the first four mebibytes of a copy."""

    def read_copy(self, copy: Copy, deadline: float) -> None:
        super().read_copy(msgspec.structs.replace(copy, nbytes=min(copy.nbytes, 4 * 2**20)), deadline)


@broken("transport", check="contract.three_engines_receive_at_once")
class ServesTwoAtATime(ReferenceTransport):
    """Lets two sinks read a source at once, and leaves a third with what it had."""

    def receive(self, version: int, slot: int, tensors: Mapping[str, list[torch.Tensor]], deadline: float) -> int:
        for seat in range(2):
            with socket.socket(socket.AF_UNIX) as taken:
                try:
                    taken.bind(f"\0rlbridge-{[peer.pid for peer in self.peers.values()][:1]}-{seat}")
                except OSError:
                    continue
                time.sleep(10 * _MOMENT)
                return super().receive(version, slot, tensors, deadline)
        return sum(copy.nbytes for copy in self.copies_of(slot))


@broken("transport", check="contract.weights_that_are_read_in_place_arrive")
class TakesABufferForAVersion(ReferenceTransport):
    """Does not read a buffer again that it has just read."""

    last = -1

    def receive(self, version: int, slot: int, tensors: Mapping[str, list[torch.Tensor]], deadline: float) -> int:
        known, self.last = self.last, slot
        if known == slot:
            return sum(copy.nbytes for copy in self.copies_of(slot))
        return super().receive(version, slot, tensors, deadline)


@broken("transport", check="contract.what_was_published_arrives_though_training_goes_on")
class KeepsItsCopyFresh(ReferenceTransport):
    """Goes on copying the live weights into the second buffer after they have been published."""

    def open(self, blocks: Sequence[torch.Tensor]) -> bytes:
        address = super().open(blocks)
        owners = [o for o in gc.get_objects() if isinstance(o, Publisher) and o._transport is self]

        def refresh(publisher: Publisher) -> None:
            while self.blocks:
                time.sleep(_MOMENT / 50)
                slots = publisher._slots
                if len(slots) == 2 and slots[1].version and slots[1].version == publisher._version:
                    publisher._source.snapshot(slots[1].segments)

        for publisher in owners:
            if publisher._source.layout().tensors and not hasattr(publisher._source, "_export"):  # gathering is collective
                threading.Thread(target=refresh, args=(publisher,), daemon=True).start()
        return address


@broken("transport", check="contract.a_version_is_whole_though_the_next_one_is_published")
class ReadsTheNewestVersion(ReferenceTransport):
    """Turns to the other buffer when that changes before it has begun to read."""

    def receive(self, version: int, slot: int, tensors: Mapping[str, list[torch.Tensor]], deadline: float) -> int:
        other = [(copy.source, self.peers[copy.source].blocks[copy.source_block].address) for copy in self.copies_of(1 - slot)]
        peek = torch.empty(_ALIGNED, dtype=torch.uint8)
        for name, address in other[:1]:
            self.read(name, address, peek.data_ptr(), len(peek))
            seen = peek.clone()
            for _ in range(10):
                time.sleep(_MOMENT)
                self.read(name, address, peek.data_ptr(), len(peek))
                if not torch.equal(peek, seen):
                    return super().receive(version, 1 - slot, tensors, deadline)
        return super().receive(version, slot, tensors, deadline)


@broken("transport", check="contract.nothing_is_written_once_receive_has_returned")
class ReturnsBeforeItIsDone(ReferenceTransport):
    """Says that all has arrived when it begins to read."""

    def receive(self, version: int, slot: int, tensors: Mapping[str, list[torch.Tensor]], deadline: float) -> int:
        later = super().receive

        def read() -> None:
            time.sleep(5 * _MOMENT)
            later(version, slot, tensors, deadline)

        threading.Thread(target=read, daemon=True).start()
        return sum(copy.nbytes for copy in self.copies_of(slot))


@broken("transport", check="contract.nothing_is_written_once_receive_has_returned")
class ReadsOnceMore(ReferenceTransport):
    """Reads a version again and again after it has returned, until the next one comes."""

    newest = 0

    def receive(self, version: int, slot: int, tensors: Mapping[str, list[torch.Tensor]], deadline: float) -> int:
        self.newest = version
        received, again = super().receive(version, slot, tensors, deadline), super().receive

        def read() -> None:
            for _ in range(100):
                time.sleep(_MOMENT)
                if self.newest == version and self.blocks:
                    again(version, slot, tensors, deadline)

        threading.Thread(target=read, daemon=True).start()
        return received


@broken("transport", check="contract.flipped_bytes_are_not_served")
class TakesAVersionForItsNumber(ReferenceTransport):
    """Does not read a version whose number it has read before, though that one was refused."""

    known: dict[str, set[int]] = {}  # noqa: RUF012  (of the process, and so of all epochs: that is the fault)

    def receive(self, version: int, slot: int, tensors: Mapping[str, list[torch.Tensor]], deadline: float) -> int:
        known = self.known.setdefault(self.context.name, set())
        if version in known:
            return sum(copy.nbytes for copy in self.copies_of(slot))
        known.add(version)
        return super().receive(version, slot, tensors, deadline)
