"""How long a direct update of half a GiB pauses an engine, beside one memory copy of as many bytes. A script, no test."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
import transformers

from rlbridge.weights.threads import copy_all
from tests.vllm.inside import models
from tests.vllm.inside.bridge import Bridge

_SIZES = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "num_attention_heads": 8, "head_dim": 128}


def main() -> None:
    """Print the figures."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--engine", default="async")
    arguments.add_argument("--ranks", type=int, default=1)
    given = arguments.parse_args()
    own = {**_SIZES, "vocab_size": 4096, "initializer_range": 0.02, "tie_word_embeddings": False}
    models.KINDS["large"] = ("Qwen3", own)
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as directory:
        bridge = Bridge(Path(directory), "large", engine=given.engine, tensor_parallel=given.ranks)
        reports = [bridge.sync() for _ in range(6)][1:]  # the first touches its memory for the first time
        calls = []
        for _ in range(20):
            start = time.perf_counter()
            bridge.generator._engine.rpc("rlbridge_score_at", (None,), 60.0)
            calls.append(time.perf_counter() - start)
        bridge.close()
    source, target = (torch.ones(reports[0].bytes, dtype=torch.uint8) for _ in range(2))
    copies = []
    for _ in range(5):
        start = time.perf_counter()
        copy_all(target.chunk(8), source.chunk(8))
        copies.append(time.perf_counter() - start)
    print(f"{reports[0].bytes / 2**20:.0f} MiB, {given.engine}, {given.ranks} rank(s); medians in ms")
    print(f"one copy of as many bytes: {1000 * statistics.median(copies):.0f}")
    for phase in reports[0].phases:  # the pause is the install, hashing the live parameters (as long as verify), and calls
        print(f"{phase}: {1000 * statistics.median(report.phases[phase] for report in reports):.0f}")
    print(f"one call of all ranks: {1000 * statistics.median(calls):.1f}")


if __name__ == "__main__":
    main()
