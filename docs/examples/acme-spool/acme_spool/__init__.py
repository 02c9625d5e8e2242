"""The `spool` transport: weights as files in a directory that both ends see."""

from __future__ import annotations

from collections.abc import Sequence

from rlbridge import Backend, hookimpl


@hookimpl
def rlbridge_transports() -> Sequence[Backend]:
    """The backend `spool`."""
    return [
        Backend(
            name="spool",
            load="acme_spool.transport:SpoolTransport",
            options="acme_spool.options:SpoolOptions",
            summary="Files in a directory that both ends see",
            distribution="acme-spool",
        )
    ]
