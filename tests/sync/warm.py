"""What every forked rank would otherwise import for itself: NIXL, and what torch loads at its first recording."""

from __future__ import annotations

from rlbridge.sync.messages import Nothing, Record, pack
from rlbridge_conformance.toy import ToyGenerator, ToySource


def warm_up() -> None:
    """Import it here. No agent is made: UCX in a parent would be shared by its children."""
    import msgspec
    import nixl._api  # noqa: F401

    from rlbridge.sync.messages import Described, result

    described = result(ToySource(0, 1).handle("layout", pack(Nothing())), Described)
    payload = msgspec.msgpack.encode([pack(Record(described.layout.tensors))])
    ToyGenerator("generator[0]").on_each_rank("record", payload)
