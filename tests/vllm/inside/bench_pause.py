"""How long an update of half a GiB pauses an engine, beside one memory copy of as many bytes. A script, no test.

Of one model, one after the other: vLLM's own `load_weights` (install=streamed), and copies into its parameters (direct).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers

from rlbridge.weights.threads import copy_all
from tests.vllm.inside import models
from tests.vllm.inside.bridge import Bridge

_SIZES = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 9, "num_attention_heads": 8, "head_dim": 128}


def main() -> None:
    """Print the figures."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--engine", default="async")
    arguments.add_argument("--ranks", type=int, default=1)
    given = arguments.parse_args()
    own = {**_SIZES, "vocab_size": 4096, "initializer_range": 0.02, "tie_word_embeddings": False}
    models.KINDS["large"] = ("Qwen3", own)
    transformers.logging.disable_progress_bar()
    for install in ("direct", "streamed"):
        with tempfile.TemporaryDirectory() as directory:
            measure(Path(directory), install, engine=given.engine, ranks=given.ranks)


def measure(directory: Path, install: str, engine: str, ranks: int) -> None:
    """Seven syncs of one engine, and copies of as many bytes between them: both see the same machine."""
    bridge = Bridge(directory, "large", engine=engine, tensor_parallel=ranks, install=install)
    bridge.sync()  # touches its memory for the first time
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in bridge.model.state_dict().values())
    source, target = (torch.ones(nbytes, dtype=torch.uint8) for _ in range(2))
    torch.set_num_threads(1)
    reports, copies, threaded = [], [], []
    for _ in range(7):
        reports.append(bridge.sync())
        copies.append(_seconds(lambda: target.copy_(source)))
        threaded.append(_seconds(lambda: copy_all(target.chunk(8), source.chunk(8))))
    call = _median([_seconds(lambda: bridge.generator._engine.rpc("rlbridge_score_at", (None,), 60.0)) for _ in range(20)])
    empty = _median([_seconds(lambda: _empty_pause(bridge)) for _ in range(7)])
    bridge.close()
    copy, fast, pause = _median(copies), _median(threaded), _median([report.phases["pause"] for report in reports])
    print(f"{nbytes / 2**20:.0f} MiB, {engine}, {ranks} rank(s), {install}; medians of {len(reports)} in ms")
    print(f"  one copy of as many bytes: {1000 * copy:.0f} by one thread, {1000 * fast:.0f} by all that an install has")
    for phase in reports[0].phases:
        print(f"  {phase}: {1000 * _median([report.phases[phase] for report in reports]):.0f}")
    print(f"  a pause in which nothing is done: {1000 * empty:.0f}; one call of all ranks: {1000 * call:.1f}")
    print(f"  pause without those, over one copy: {(pause - empty) / copy:.2f}, {(pause - empty) / fast:.2f}")


def _empty_pause(bridge: Bridge) -> None:
    bridge.generator.pause("wait")
    for _ in range(3):  # install, check, commit
        bridge.generator._engine.rpc("rlbridge_score_at", (None,), 60.0)
    bridge.generator.invalidate_caches()
    bridge.generator.version = bridge.version
    bridge.generator.resume()


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _median(values: Sequence[float]) -> float:
    return statistics.median(values)


if __name__ == "__main__":
    main()
