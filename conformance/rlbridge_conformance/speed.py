"""How fast is a verified sync, as a ratio to Ray's own way of doing it without one, in the same run on the same two processes.

    python -m rlbridge_conformance.speed --mib 1024 --tensors 300

Peers: Ray Direct Transport over NIXL with a copy into the parameters, and Ray's object store with the same copy; neither
keeps a snapshot, neither verifies. Limit: one-thread memory copies of the same bytes, measured around each repeat.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import torch
from rich.console import Console
from rich.table import Table

from rlbridge.cluster.party import ActorParty
from rlbridge.roles.batch import Completion, Sampling, Sequences
from rlbridge.roles.generator import Generator, GeneratorContext, GeneratorOptions
from rlbridge.roles.sink import RecordedSink
from rlbridge.roles.source import ShardedSource
from rlbridge.sync.engine import Engine
from rlbridge.sync.messages import TransportSpec
from rlbridge.sync.publisher import Publisher, synchronize
from rlbridge.sync.report import SyncReport
from rlbridge.sync.session import SyncOptions, SyncSession
from rlbridge.sync.subscriber import Subscriber
from rlbridge.weights.layout import Piece, TensorMeta, contiguous_strides, whole

ROWS = ("rlbridge nixl snapshot", "rlbridge nixl barrier", "RDT nixl + copy", "object store + copy")


class SpeedTrainer:
    """Holds the tensors; publishes them, or returns them to Ray."""

    def __init__(self, mib: int, count: int, device: str) -> None:
        torch.set_num_threads(1)
        self._device = device
        self._tensors = make_tensors(mib, count, device)
        metas = [TensorMeta(n, tuple(t.shape), "bfloat16") for n, t in self._tensors.items()]
        pieces = [Piece(whole(m), m.name, 0, contiguous_strides(m.shape)) for m in metas]
        self._publisher = Publisher("trainer[0]", ShardedSource(metas, pieces, lambda: self._tensors), device)

    def step(self) -> None:
        """Change every tensor, as a training step does."""
        for tensor in self._tensors.values():
            tensor.add_(1)

    def sums(self) -> list[float]:
        """Something to compare the other side with."""
        return [float(t[0].float().sum()) for t in self._tensors.values()]

    def weights(self) -> dict[str, torch.Tensor]:
        """What Ray is to carry."""
        return self._tensors

    def call(self, method: str, payload: bytes) -> list[bytes]:
        """`Publisher.handle`."""
        return [self._publisher.handle(method, payload)]

    def memcpy(self) -> float:
        """Seconds that one thread, or the GPU, takes to copy all tensors within this process."""
        if not hasattr(self, "_copies"):
            self._copies = [torch.empty_like(t).fill_(0) for t in self._tensors.values()]
        synchronize(self._device)
        start = time.perf_counter()
        for copy, tensor in zip(self._copies, self._tensors.values(), strict=True):
            copy.copy_(tensor)
        synchronize(self._device)
        return time.perf_counter() - start


class _Holder(Generator[GeneratorOptions]):
    """An engine that only holds parameters."""

    def __init__(self, tensors: dict[str, torch.Tensor], device: str) -> None:
        def load(given: Any) -> None:
            for name, tensor in given:
                tensors[name].copy_(tensor)

        self._subscriber = Subscriber("generator[0].rank[0]", RecordedSink(load, tensors), device)

    def setup(self, context: GeneratorContext, options: GeneratorOptions) -> None:
        """Nothing to load."""

    def generate(self, prompts: list[list[int]], sampling: Sampling) -> list[Completion]:
        """Nothing to generate with."""
        return []

    def score(self, sequences: Sequences) -> Any:
        """Nothing to score with."""
        return sequences.tokens_BT

    def on_each_rank(self, method: str, payload: bytes, tensors: dict[str, list[Any]] | None = None) -> list[bytes]:
        """`Subscriber.handle`."""
        return [self._subscriber.handle(method, payload, tensors)]

    def invalidate_caches(self) -> None:
        """There are none."""


class SpeedGenerator:
    """Holds parameters that are written by a sync, or by a copy of what Ray delivers."""

    def __init__(self, mib: int, count: int, device: str) -> None:
        torch.set_num_threads(1)
        self._device = device
        self._tensors = {n: torch.zeros_like(t).fill_(1) for n, t in make_tensors(mib, count, device).items()}
        self._engine = Engine("generator[0]", _Holder(self._tensors, device))

    def call(self, method: str, payload: bytes, names: list[str], *tensors: list[Any]) -> list[bytes]:
        """`Engine.handle`."""
        return self._engine.handle(method, payload, dict(zip(names, tensors, strict=True)))

    def copy_in(self, weights: dict[str, torch.Tensor]) -> int:
        """The peers' install: a copy into the parameters."""
        for name, tensor in weights.items():
            self._tensors[name].copy_(tensor)
        synchronize(self._device)
        return len(weights)

    def sums(self) -> list[float]:
        """See `SpeedTrainer.sums`."""
        return [float(t[0].float().sum()) for t in self._tensors.values()]


def make_tensors(mib: int, count: int, device: str = "cpu") -> dict[str, torch.Tensor]:
    """`count` bf16 matrices of `mib` MiB in all."""
    rows = max(mib * 2**20 // 2 // count // 1024, 1)
    return {f"layers.{i}.weight": torch.full((rows, 1024), i % 8, dtype=torch.bfloat16, device=device) for i in range(count)}


def measure(mib: int, count: int, repeats: int, rounds: int, device: str = "cpu") -> dict[str, Any]:
    """All rows, `rounds` times over. Each has processes of its own, and one repeat more that is not counted.

    Processes of their own, since Ray's NIXL agents spin once they are made, and would slow whatever runs beside them.
    """
    seconds: dict[str, list[float]] = {}
    phases: dict[str, list[dict[str, float]]] = {}
    wires: dict[str, str] = {}
    for _ in range(rounds):
        for name in ROWS:
            half = {"enable_tensor_transport": True, "num_gpus": 0.5 if device == "cuda" else 0}
            trainer = ray.remote(**half)(SpeedTrainer).remote(mib, count, device)
            generator = ray.remote(**half)(SpeedGenerator).remote(mib, count, device)
            run = _contender(name, trainer, generator)
            for turn in range(repeats + 1):
                ray.get(trainer.step.remote())
                before = ray.get(trainer.memcpy.remote())
                start = time.perf_counter()
                report = run()
                took = time.perf_counter() - start
                after = ray.get(trainer.memcpy.remote())
                if ray.get(trainer.sums.remote()) != ray.get(generator.sums.remote()):
                    raise RuntimeError(f"{name}: the parameters are not the trainer's")
                if turn:
                    seconds.setdefault(name, []).append(took)
                    seconds.setdefault("memcpy", []).append((before + after) / 2)
                    if isinstance(report, SyncReport):
                        phases.setdefault(name, []).append(dict(report.phases))
                        wires[name] = report.wire
            ray.kill(trainer)
            ray.kill(generator)
    return {
        "mib": mib,
        "tensors": count,
        "device": device,
        "seconds": seconds,
        "phases": {n: _median(p) for n, p in phases.items()},
        "wires": wires,
    }


def _contender(name: str, trainer: Any, generator: Any) -> Callable[[], Any]:
    if name == "RDT nixl + copy":
        carried = trainer.weights.options(tensor_transport="nixl")
        return lambda: ray.get(generator.copy_in.remote(carried.remote()))
    if name == "object store + copy":
        return lambda: ray.get(generator.copy_in.remote(trainer.weights.remote()))
    publish = name.rpartition(" ")[2]
    session = SyncSession(
        [ActorParty("trainer[0]", trainer)],
        [ActorParty("generator[0]", generator)],
        TransportSpec("nixl", {}),
        SyncOptions(publish="barrier" if publish == "barrier" else "snapshot"),
    )
    versions = itertools.count(1)
    return lambda: session.sync(next(versions))


def _median(phases: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(p[name] for p in phases) for name in phases[0]} if phases else {}


def show(found: dict[str, Any]) -> None:
    """The table: medians, and the two ratios."""
    rows = {name: statistics.median(seconds) for name, seconds in found["seconds"].items()}
    about = f"{found['mib']} MiB in {found['tensors']} tensors, {found['device']}, two processes, one host; medians"
    table = Table(title=about)
    for column in ("", "seconds", "of RDT nixl + copy", "of memcpy"):
        table.add_column(column, justify="left" if not column else "right")
    for name, seconds in rows.items():
        table.add_row(name, f"{seconds:.3f}", f"{seconds / rows['RDT nixl + copy']:.2f}", f"{seconds / rows['memcpy']:.2f}")
    console = Console()
    console.print(table)
    for name, phases in found["phases"].items():
        console.print(name, found["wires"][name], {k: round(v, 3) for k, v in phases.items()})


def main() -> int:
    """Measure, print, and write the figures where `--json` says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--tensors", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: both processes on one GPU")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    ray.init(address="local", num_cpus=4, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    try:
        found = measure(options.mib, options.tensors, options.repeats, options.rounds, options.device)
    finally:
        ray.shutdown()
    show(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
