"""Level speed: a verified sync beside a copy of as many bytes in memory, in the same processes. It limits nothing."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from rlbridge_conformance.checks import check
from rlbridge_conformance.run import Stages

_BULK_MIB = 128
_REPEATS = 5


@check("speed", "transport")
def test_a_sync_beside_a_copy_in_memory(stages: Stages) -> None:
    stage = stages(model="awkward", bulk_mib=_BULK_MIB, trainer={"keep_dtypes": True}, generator={"keep_dtypes": True})
    stage.sync()
    seconds, copies, wires = [], [], []
    for _ in range(_REPEATS):
        before = stage.trainers[0].apply(copy_seconds)
        report = stage.sync()
        copies.append((before + stage.trainers[0].apply(copy_seconds)) / 2)
        seconds.append(report.seconds)
        wires.append(report.phases["wire"])
    stage.holds(stage.saved())
    copy, sync, wire = (statistics.median(values) for values in (copies, seconds, wires))
    rate = report.bytes / 1e9
    stages.remark(
        f"{report.bytes / 2**20:.0f} MiB in {sync:.3f} s, verified and installed: {rate / sync:.2f} GB/s,"
        f" {sync / copy:.1f} times one copy in memory ({rate / copy:.1f} GB/s);"
        f" the wire {wire:.3f} s, {wire / copy:.1f} times; medians of {_REPEATS}"
    )


def copy_seconds(host: Any) -> float:
    """Seconds that one thread takes to copy the trainer's tensors within its process."""
    tensors = host.trainer.tensors
    if not hasattr(host, "copies"):
        host.copies = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
        copy_seconds(host)
    start = time.perf_counter()
    for name, tensor in tensors.items():
        host.copies[name].copy_(tensor)
    return time.perf_counter() - start
