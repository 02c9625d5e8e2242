"""Broken transports that only show over RDMA: a machine without a device, of software or not, cannot run their checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import msgspec
import torch

from rlbridge.errors import DeadlineError, PeerLostError, TransportError
from rlbridge.roles.transport import Copy, TransportContext, WireEvidence
from rlbridge_conformance.broken.catalogue import broken
from rlbridge_nixl.options import NixlOptions
from rlbridge_nixl.transport import NixlTransport

_RDMA = ("rdma",)


@broken("transport", check="rdma.the_ports_count_the_bytes", twin="nixl", machine=_RDMA)
class SecretlyGoesByTcp(NixlTransport):
    """Goes by TCP when it was told to use RDMA."""

    def __init__(self, context: TransportContext, options: NixlOptions) -> None:
        other = {"wire": "tcp", "net_devices": "lo"} if options.wire == "rdma" else {}
        super().__init__(context, options.model_copy(update=other))


@broken("transport", check="rdma.receive_ends_after_the_last_byte", twin="nixl", machine=_RDMA)
class SecretlyEndsTooEarly(NixlTransport):
    """Reports success when the transfers have been posted, before the last of them is complete."""

    def _run(self, version: int, slot: int, deadline: float) -> int:
        transfers = self._transfers.get(slot, [])
        for transfer in transfers:
            self._agent.transfer(transfer.handle, f"{self._context.epoch}:{version}".encode())
        return sum(transfer.nbytes for transfer in transfers)


@broken("transport", check="rdma.several_engines_receive_by_rdma", twin="nixl", machine=_RDMA)
class ServesOneEngineOnly(NixlTransport):
    """Delivers nothing to any engine but the first."""

    def receive(self, version: int, slot: int, tensors: Mapping[str, list[torch.Tensor]], deadline: float) -> int:
        if not self._context.name.startswith(("generator[0]", "borrower")):
            raise TransportError("only the first engine is served")
        return super().receive(version, slot, tensors, deadline)


@broken("transport", check="rdma.the_evidence_names_an_rdma_wire", twin="nixl", machine=_RDMA)
class DoesNotKnowItsWire(NixlTransport):
    """Says of no wire whether it is RDMA."""

    def evidence(self) -> WireEvidence:
        return msgspec.structs.replace(super().evidence(), rdma=None)


@broken("transport", check="rdma.the_next_sync_registers_nothing", twin="nixl", machine=_RDMA)
class RegistersForEachSync(NixlTransport):
    """Registers memory of its own for each transfer, and keeps it."""

    def _run(self, version: int, slot: int, deadline: float) -> int:
        self._agent.register_memory([torch.empty(1 << 16, dtype=torch.uint8)])
        return super()._run(version, slot, deadline)


@broken("transport", check="rdma.a_peer_dies_over_rdma", twin="nixl", machine=_RDMA)
class RemembersAddressesOfTheDead(NixlTransport):
    """Reaches a source by the address that the first process of that name had."""

    known: ClassVar[dict[str, bytes]] = {}

    def connect(self, peers: Mapping[str, bytes], copies: Sequence[Copy]) -> None:
        super().connect({name: self.known.setdefault(name, raw) for name, raw in peers.items()}, copies)


@broken("transport", check="rdma.a_wrong_key_is_refused", twin="nixl", machine=_RDMA)
class TakesARefusalForAnEnd(NixlTransport):
    """Takes a transfer that the other side has refused for one that is complete."""

    def receive(self, version: int, slot: int, tensors: Mapping[str, list[torch.Tensor]], deadline: float) -> int:
        try:
            return super().receive(version, slot, tensors, deadline)
        except PeerLostError:
            return 0


@broken("transport", check="rdma.an_end_that_was_closed_is_not_read", twin="nixl", machine=_RDMA)
class TakesADeadlineForAnEnd(NixlTransport):
    """Takes a transfer whose time is over for one that is complete."""

    def receive(self, version: int, slot: int, tensors: Mapping[str, list[torch.Tensor]], deadline: float) -> int:
        try:
            return super().receive(version, slot, tensors, deadline)
        except (DeadlineError, PeerLostError):
            return 0


@broken("transport", check="rdma.memory_that_may_not_be_locked_is_an_error", twin="nixl", machine=_RDMA)
class HidesTheLimit(NixlTransport):
    """Says of memory that it may not lock no more than that it has failed."""

    def _check_lock(self, nbytes: int) -> None:
        try:
            super()._check_lock(nbytes)
        except TransportError:
            raise TransportError("NIXL has failed") from None
