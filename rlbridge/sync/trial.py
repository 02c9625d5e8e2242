"""A transport tried by itself: bytes between two ends in one process, over RDMA or not at all.

    python -m rlbridge.sync.trial nixl '{"require": "rdma"}'

It is run as a process of its own, since a library that does not fit the machine may end it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

import msgspec
import torch

from rlbridge.errors import RlbridgeError, TransportError
from rlbridge.rdma.counters import Counted, counted, counters
from rlbridge.roles.transport import Copy, WireEvidence
from rlbridge.sync.messages import Pulled, TransportSpec
from rlbridge.sync.publisher import open_transport
from rlbridge.sync.wire import require_rdma

_NBYTES = 8 << 20
_SECONDS = 60.0


class Trial(msgspec.Struct, frozen=True):
    """What a trial found.

    Attributes:
        nbytes: Bytes that were moved, and are right.
        seconds: In so long.
        evidence: What the transport says of it.
        ports: What the RDMA ports counted.
        error: Why it failed; "": it did not.
    """

    nbytes: int = 0
    seconds: float = 0.0
    evidence: list[WireEvidence] = []
    ports: Counted | None = None
    error: str = ""


def trial(backend: str, options: Mapping[str, Any], *, seconds: float = 2 * _SECONDS) -> Trial:
    """Try a transport in a process of its own; one that crashes or hangs is a trial that failed."""
    command = [sys.executable, "-m", __name__, backend, json.dumps(dict(options))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return Trial(error=f"it did not end within {seconds:.0f} s")
    for line in reversed(done.stdout.splitlines()):
        if line.startswith("{"):
            return msgspec.json.decode(line, type=Trial)
    said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
    return Trial(error=f"its process ended with {done.returncode}, and said: {said}")


def _move(backend: str, options: dict[str, Any]) -> Trial:
    """Move some bytes from one end to another, both in this process.

    Raises:
        RlbridgeError: they did not arrive, or not by the wire that `require` names.
    """
    spec = TransportSpec(backend, options)
    blocks = {
        "source": torch.arange(_NBYTES, dtype=torch.int64).to(torch.uint8),
        "sink": torch.zeros(_NBYTES, dtype=torch.uint8),
    }
    source, sink = (open_transport(spec, f"doctor.{side}", side, 1, "cpu") for side in ("source", "sink"))
    try:
        addresses = {"source": source.open([blocks["source"]]), "sink": sink.open([blocks["sink"]])}
        copies = [Copy("source", "sink", 0, 0, 0, 0, 0, _NBYTES)]
        source.connect({"sink": addresses["sink"]}, copies)
        sink.connect({"source": addresses["source"]}, copies)
        before, start = counters(), time.monotonic()
        source.send(1, 0, start + _SECONDS)
        nbytes = sink.receive(1, 0, {}, start + _SECONDS)
        seconds, ports = time.monotonic() - start, counted(before, counters())
        if not torch.equal(blocks["source"], blocks["sink"]):
            raise TransportError("the bytes that arrived are not those that were sent", phase="wire")
        evidence = [said for said in (source.evidence(), sink.evidence()) if said.wire]
        if options.get("require") == "rdma":
            require_rdma(1, {"doctor.sink": Pulled(nbytes, seconds, None, ports)}, evidence)
        return Trial(nbytes, seconds, evidence, ports)
    finally:
        sink.close()
        source.close()


def _main() -> None:
    backend, options = sys.argv[1], json.loads(sys.argv[2])
    try:
        found = _move(backend, options)
    except RlbridgeError as error:
        found = Trial(error=str(error))
    sys.stdout.write(msgspec.json.encode(found).decode() + "\n")
    sys.stdout.flush()
    os._exit(0)  # where UCX has loaded its InfiniBand module, a process crashes at its end (libnl-route, NIXL 1.5.1)


if __name__ == "__main__":
    _main()
