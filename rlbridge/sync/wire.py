"""Whether a version went by the wire that the config requires, by what the transport says and what the RDMA ports count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rlbridge.errors import TransportError
from rlbridge.roles.transport import WireEvidence
from rlbridge.sync.messages import Pulled

_TODO = "rlbridge doctor --rdma says why RDMA is not used on a host; transport.require=any lets every wire do"


def require_rdma(version: int, pulled: Mapping[str, Pulled], evidence: Sequence[WireEvidence]) -> None:
    """Hold a version that has arrived to RDMA. The evidence is of the ends that acted.

    Raises:
        TransportError: the transport names another wire, or the ports of a sink's host have counted too little; or neither
            the transport nor any port can tell.
    """
    for said in evidence:
        if said.rdma is False:
            raise TransportError(
                f"the bytes went by {said.wire}, which is no RDMA",
                transport=said.backend,
                version=version,
                phase="wire",
                todo=_TODO,
            )
    known = bool(evidence) and all(said.rdma for said in evidence)
    for name, pull in pulled.items():
        if pull.ports is None:
            if known or pull.nbytes == 0:
                continue
            raise TransportError(
                "nobody knows whether the bytes went by RDMA: the transport does not, and there is no RDMA port that counts",
                rank=name, version=version, phase="wire", todo=_TODO,
            )  # fmt: skip
        if pull.ports.received < pull.nbytes:
            raise TransportError(
                f"{pull.nbytes} bytes arrived, and the RDMA ports have counted {pull.ports.received} ({pull.ports.known_from})",
                rank=name, version=version, phase="wire", todo=_TODO,
            )  # fmt: skip
