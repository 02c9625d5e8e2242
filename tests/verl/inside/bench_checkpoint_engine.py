"""A verl job's update of its weights over rlbridge and over verl's own nixl engine, in the same processes. A script, no test.

Two trainer ranks with FSDP2, two replicas, verl's manager. verl's engine gets stand-ins for what it lacks on a CPU (cupy,
pinned memory, CUDA's synchronize). Both are made anew and then sync in turns; the first sync with each is told apart.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
os.environ.setdefault("VERL_PLATFORM", "cpu")
os.environ.setdefault("UCX_NET_DEVICES", "lo")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from tests.models import tiny_qwen3
from tests.verl.inside.verl_job import Job

_LARGE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 6, "vocab_size": 8192, "head_dim": 96}


def main() -> None:
    """Print the figures."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--turns", type=int, default=9)
    arguments.add_argument("--megabytes", type=int, default=64, help="update_weights_bucket_megabytes")
    given = arguments.parse_args()
    for name, sizes in (("tiny", {}), ("large", _LARGE)):
        with tempfile.TemporaryDirectory() as directory:
            job = Job(tiny_qwen3(Path(directory) / "model", **sizes), given.megabytes)
            try:
                measure(job, name, given.turns, given.megabytes)
            finally:
                job.end()


def measure(job: Job, name: str, turns: int, megabytes: int) -> None:
    """Syncs with one engine and with the other, in turns of one process each; and what a copy for each replica takes."""
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in job.trainers.weights()[0].values())
    print(f"{name}: {nbytes / 2**20:.1f} MiB in float32, 2 trainer ranks, 2 replicas, buckets of {megabytes} MiB", flush=True)
    version, medians = 0, {}
    for engine in ("rlbridge", "nixl", "rlbridge", "nixl"):
        job.use(engine, megabytes)
        seconds, gathers = [], []
        for _ in range(turns):
            job.trainers.train()
            version += 1
            start = time.perf_counter()
            metrics = job.sync(version)
            seconds.append(time.perf_counter() - start)
            gathers.append(metrics.get("rlbridge/gather_seconds", 0.0))
        _check(job)
        rest = statistics.median(seconds[1:])
        medians.setdefault(engine, []).append(rest)
        gather = f", of these {1000 * statistics.median(gathers[1:]):.1f} verl's own gather" if gathers[0] else ""
        print(f"  {engine:9} first {1000 * seconds[0]:8.1f} ms, then {1000 * rest:8.1f} ms{gather}", flush=True)
    ours, theirs = (statistics.mean(medians[engine]) for engine in ("rlbridge", "nixl"))
    source, target = (torch.ones(nbytes, dtype=torch.uint8) for _ in range(2))
    copies = []
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        copies.append(time.perf_counter() - start)
    copy = 2 * statistics.median(copies)
    print(f"  verl's nixl / rlbridge: {theirs / ours:.1f}; one copy for each replica: {1000 * copy:.1f} ms", flush=True)


def _check(job: Job) -> None:
    wanted = job.trainers.weights()[0]
    for _, tensors in job.served():
        assert all(torch.equal(tensor, wanted[key]) for key, tensor in tensors.items())


if __name__ == "__main__":
    main()
