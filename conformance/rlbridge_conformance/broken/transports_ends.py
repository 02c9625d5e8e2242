"""Broken transports: what an end says of itself, whom it finds, and what it leaves behind."""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import torch
from pydantic import ConfigDict, field_serializer

from rlbridge.errors import TransportError
from rlbridge.roles.transport import Copy, WireEvidence
from rlbridge_conformance.broken.catalogue import broken
from rlbridge_conformance.reference.options import ReferenceTransportOptions
from rlbridge_conformance.reference.transport import Address, ReferenceTransport


@broken("transport", check="contract.receive_counts_what_arrived")
class CountsTheFirstCopy(ReferenceTransport):
    """Returns the bytes of one copy for those of all."""

    def receive(self, version: int, slot: int, tensors: Mapping[str, list[torch.Tensor]], deadline: float) -> int:
        super().receive(version, slot, tensors, deadline)
        return sum(copy.nbytes for copy in self.copies_of(slot)[:1])


@broken("transport", check="contract.the_evidence_is_no_less_than_what_arrived")
class NamesNoWire(ReferenceTransport):
    """Says nothing of what carried the bytes."""

    def evidence(self) -> WireEvidence:
        return WireEvidence("reference", "", "")


@broken("transport", check="contract.the_evidence_is_no_less_than_what_arrived")
class KnowsItFromNowhere(ReferenceTransport):
    """Names a wire, and not how it is known."""

    def evidence(self) -> WireEvidence:
        return msgspec.structs.replace(super().evidence(), known_from="")


@broken("transport", check="contract.the_evidence_is_no_less_than_what_arrived")
class ClaimsHalfOfTheBytes(ReferenceTransport):
    """Claims fewer bytes than it has moved."""

    def evidence(self) -> WireEvidence:
        return msgspec.structs.replace(super().evidence(), bytes_moved=self.moved // 2)


@broken("transport", check="contract.memory_is_registered_once_an_epoch")
class RegistersForEachVersion(ReferenceTransport):
    """Registers the arena again for each version."""

    def receive(self, version: int, slot: int, tensors: Mapping[str, list[torch.Tensor]], deadline: float) -> int:
        self.blocks.append(self.blocks[0])
        return super().receive(version, slot, tensors, deadline)


@broken("transport", check="contract.why_it_is_unavailable_is_a_sentence")
class WillNotSayWhy(ReferenceTransport):
    """Gives an empty reason for why it cannot work on CUDA."""

    @classmethod
    def unavailable(cls, options: ReferenceTransportOptions, device: str) -> str | None:
        return super().unavailable(options, device) and ""


@broken("transport", check="contract.unknown_transport_options_are_refused")
class ForgivesUnknownOptions(ReferenceTransportOptions):
    """Ignores options that it does not know, as a word that is misspelt."""

    model_config = ConfigDict(extra="ignore")


@broken("transport", check="contract.transport_options_cross_processes")
class WritesAnotherBucket(ReferenceTransportOptions):
    """Does not read back as JSON what it has written: kibibytes for bytes."""

    @field_serializer("bucket_bytes")
    def kibibytes(self, nbytes: int) -> int:
        """The bucket as it is written."""
        return nbytes // 1024


@broken("transport", check="contract.an_end_without_copies_has_nothing_to_do")
class NeedsAPeer(ReferenceTransport):
    """Refuses an epoch in which this end has no peers."""

    def connect(self, peers: Mapping[str, bytes], copies: Sequence[Copy]) -> None:
        if not peers:
            raise TransportError("there are no peers", rank=self.context.name)
        super().connect(peers, copies)


@broken("transport", check="contract.an_end_closes_that_was_never_connected")
class ClosesOnlyWhatWasConnected(ReferenceTransport):
    """Cannot end an epoch that has not begun."""

    def open(self, blocks: Sequence[torch.Tensor]) -> bytes:
        connect = self.connect

        def refuse() -> None:
            raise TransportError("this end is not connected", rank=self.context.name)

        def connected(peers: Mapping[str, bytes], copies: Sequence[Copy]) -> None:
            del self.close, self.connect
            connect(peers, copies)

        self.close, self.connect = refuse, connected  # type: ignore[method-assign]
        return super().open(blocks)


@broken("transport", check="contract.a_replaced_trainer_rank_is_found")
class FindsPeersWhereTheyWere(ReferenceTransport):
    """Looks for a peer in the process that it was in when it was first met."""

    met: ClassVar[dict[str, Address]] = {}

    def connect(self, peers: Mapping[str, bytes], copies: Sequence[Copy]) -> None:
        found = {}
        for name, raw in peers.items():
            now = msgspec.msgpack.decode(raw, type=Address)
            met = self.met.setdefault(name, now)
            found[name] = msgspec.msgpack.encode(msgspec.structs.replace(now, pid=met.pid, started=met.started))
        super().connect(found, copies)


@broken("transport", check="contract.a_replaced_engine_is_found")
class KnowsEnginesByTheirProcess(ReferenceTransport):
    """Refuses an engine that has come back as another process."""

    met: ClassVar[dict[str, int]] = {}

    def connect(self, peers: Mapping[str, bytes], copies: Sequence[Copy]) -> None:
        for name, raw in peers.items():
            pid = msgspec.msgpack.decode(raw, type=Address).pid
            if self.context.side == "source" and self.met.setdefault(name, pid) != pid:
                raise TransportError(f"{name} is another process than before", rank=self.context.name, peer=name)
        super().connect(peers, copies)


@broken("transport", check="contract.twenty_epochs_leave_nothing_behind")
class LeavesADescriptor(ReferenceTransport):
    """Leaves a file open at the end of each epoch."""

    def close(self) -> None:
        os.open(os.devnull, os.O_RDONLY)
        super().close()


@broken("transport", check="contract.twenty_epochs_leave_nothing_behind")
class LeavesAThread(ReferenceTransport):
    """Leaves a thread behind at the end of each epoch."""

    def close(self) -> None:
        threading.Thread(target=threading.Event().wait, daemon=True).start()
        super().close()


@broken("transport", check="contract.twenty_epochs_leave_nothing_behind")
class LeavesAMapping(ReferenceTransport):
    """Leaves memory mapped at the end of each epoch."""

    left: ClassVar[list[mmap.mmap]] = []

    def close(self) -> None:
        with Path("/dev/zero").open("rb") as zero:
            self.left.append(mmap.mmap(zero.fileno(), mmap.PAGESIZE, mmap.MAP_PRIVATE, mmap.PROT_READ))
        super().close()


@broken("transport", check="contract.twenty_epochs_leave_nothing_behind")
class KeepsTheBlocksOfAllEpochs(ReferenceTransport):
    """Keeps the blocks of each epoch, and with them their memory."""

    kept: ClassVar[list[torch.Tensor]] = []

    def close(self) -> None:
        self.kept.extend(self.blocks)
        super().close()


@broken("transport", check="contract.twenty_epochs_leave_nothing_behind")
class LeavesSharedMemory(ReferenceTransport):
    """Leaves shared memory behind at the end of each epoch."""

    left: ClassVar[list[Any]] = []

    def close(self) -> None:
        with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
            file.truncate(mmap.PAGESIZE)
            self.left.append(mmap.mmap(file.fileno(), mmap.PAGESIZE))
        super().close()


@broken("transport", check="contract.the_end_of_an_epoch_gives_its_memory_back")
class KeepsTheLastBlocks(ReferenceTransport):
    """Keeps the blocks of the last epoch until there are those of another."""

    kept: ClassVar[list[torch.Tensor]] = []

    def close(self) -> None:
        type(self).kept = self.blocks
        super().close()
