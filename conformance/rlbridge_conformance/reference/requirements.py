"""What the reference backends say of themselves to the suite, beyond their capabilities."""

from __future__ import annotations

from typing import Any

from rlbridge_conformance.requirements import TransportRequirements


class ReferenceTransportRequirements(TransportRequirements):
    """The claims of the reference transport."""

    def registrations(self, transport: Any) -> int | None:
        """The blocks that it gives addresses of."""
        return len(transport.blocks)
