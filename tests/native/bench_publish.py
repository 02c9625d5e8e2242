"""What publishing shards where they lie saves over gathering them, in time and in memory. A script, no test.

Two ranks of a trainer, one model, one run: its snapshot from its own shards, and that from full tensors, in turns; beside
them one copy of as many bytes. Run it with the interpreter of the trainer's environment.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rlbridge.roles.source import WeightSource
from rlbridge.weights.layout import DTYPE_BYTES
from tests.models import tiny_qwen3
from tests.native.ranks import on_ranks

_SIZES = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 6, "vocab_size": 8192, "head_dim": 96}
_TURNS = 7


def main() -> None:
    """Print the figures."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--backend", default="verl")
    arguments.add_argument("--ranks", type=int, default=2)
    arguments.add_argument("--options", nargs="*", default=[], help="key=value of the trainer")
    given = arguments.parse_args()
    options = {key: int(value) if value.isdigit() else value for key, value in (each.split("=") for each in given.options)}
    with tempfile.TemporaryDirectory() as directory:
        model = tiny_qwen3(Path(directory) / "model", **_SIZES)
        ranks = on_ranks(given.ranks, measure, model, Path(directory), backend=given.backend, options=options)
    total = sum(rank["bytes"] for rank in ranks)
    print(f"{given.backend} {' '.join(given.options)}: {total / 2**20:.0f} MiB on the wire (bfloat16), {given.ranks} ranks")
    print(f"largest tensor, as it is held: {ranks[0]['largest'] / 2**20:.1f} MiB; medians of {_TURNS}, the slowest rank")
    for kind in ("copy", "sharded", "gathered"):
        seconds = max(rank[kind] for rank in ranks)
        peak = max(rank[f"{kind} peak"] for rank in ranks)
        print(f"  {kind:9} {1000 * seconds:7.1f} ms, {peak / 2**20:6.1f} MiB more than before at most")
    sharded, gathered, copy = (max(rank[kind] for rank in ranks) for kind in ("sharded", "gathered", "copy"))
    print(f"gathered / sharded: {gathered / sharded:.1f}; sharded / one copy of a rank's bytes: {sharded / copy:.2f}")


def measure(trainer: Any) -> dict[str, float]:
    """Median seconds of each kind of snapshot on this rank, and the most memory that one took on top."""
    sources = {}
    for kind in ("sharded", "gathered"):
        trainer._options = trainer._options.model_copy(update={"weights": kind})
        source = trainer.weights()
        source.bind(source.layout().regions)
        sources[kind] = (source, _destinations(source))
    held = [torch.ones(t.shape, dtype=torch.float32) for t in sources["sharded"][1]]
    found: dict[str, list[float]] = {"copy": [], "sharded": [], "gathered": []}
    peaks = dict.fromkeys(found, 0)
    for _ in range(_TURNS):
        for kind, (source, destinations) in sources.items():
            dist.barrier()
            seconds, peak = _measured(lambda s=source, d=destinations: s.snapshot(d))  # type: ignore[misc]
            found[kind].append(seconds)
            peaks[kind] = max(peaks[kind], peak)
        dist.barrier()
        seconds, peak = _measured(lambda: [a.copy_(b) for a, b in zip(sources["sharded"][1], held, strict=True)])
        found["copy"].append(seconds)
        peaks["copy"] = max(peaks["copy"], peak)
    tensors = sources["sharded"][0].layout().tensors
    largest = max(torch.Size(t.shape).numel() * DTYPE_BYTES[t.dtype] for t in tensors)
    nbytes = sum(t.numel() * t.element_size() for t in sources["sharded"][1])
    medians = {kind: statistics.median(values) for kind, values in found.items()}
    return {**medians, **{f"{kind} peak": peak for kind, peak in peaks.items()}, "bytes": nbytes, "largest": largest}


def _destinations(source: WeightSource) -> list[torch.Tensor]:
    return [torch.zeros(region.shape, dtype=torch.bfloat16) for region in source.layout().regions]


def _measured(work: Any) -> tuple[float, int]:
    """Seconds, and bytes of memory that were resident at most beyond those before."""
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    start = time.perf_counter()
    work()
    return time.perf_counter() - start, max(_status("VmHWM") - before, 0)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


if __name__ == "__main__":
    main()
