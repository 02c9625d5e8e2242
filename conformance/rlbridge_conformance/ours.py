"""What rlbridge's own backends claim beyond their capabilities."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from rlbridge.roles.transport import Side
from rlbridge_conformance.requirements import GeneratorRequirements, TransportRequirements


class NixlRequirements(TransportRequirements):
    """The transport `nixl`."""

    def over_network(self, interface: str) -> Mapping[str, Any]:
        """TCP, and nothing that two processes of one host share."""
        return {"wire": "tcp", "net_devices": interface}

    def over_rdma(self) -> Mapping[str, Any]:
        """RDMA or an error."""
        return {"wire": "rdma"}

    def acting(self, side: Side) -> Mapping[str, Any]:
        """A READ by the sink, or a WRITE by the source."""
        return {"operation": {"sink": "read", "source": "write"}[side]}

    def registrations(self, transport: Any) -> int | None:
        """NIXL's metadata of an agent lists what it has registered: its bytes count it."""
        return len(transport._agent.get_agent_metadata())


class RdtRequirements(TransportRequirements):
    """The transport `rdt`: Ray chooses the wire of `tensor_transport`, and has no option that forbids the others."""

    @property
    def descriptors_an_epoch(self) -> int:
        """Over NIXL: when a source has released memory, Ray connects anew, and UCX keeps the connection of before."""
        return 1


class ServedElsewhere(GeneratorRequirements):
    """A generator whose ranks are processes of a serving engine."""

    @property
    def ranks_inside(self) -> bool:
        """The subscribers live where the suite does not get."""
        return False


class VllmRequirements(ServedElsewhere):
    """The generator `vllm`: two engines of small models have to fit beside one another."""

    options: ClassVar[Mapping[str, Any]] = {"kv_cache_gib": 0.05}


class ServedByOthers(ServedElsewhere):
    """A generator whose server somebody else has started, with one model: one engine for each URL that it is given."""

    @property
    def several_engines(self) -> bool:
        """The suite has one server at most."""
        return False
