"""Real trainer ranks for the tests: processes forked from one that has imported what they need, and used none of it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np

from rlbridge.plugins import registry
from rlbridge.roles.batch import Batch, pad_sequences
from rlbridge.roles.trainer import AlgorithmOptions, OptimizerOptions, TrainerContext

EPSILON = 1e-3
"""Large, since AdamW with a small one makes a whole step of the rounding error of a gradient that is nearly zero."""

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(
    [
        "rlbridge_native.trainer",
        "rlbridge.weights.plan",
        "torch.distributed.checkpoint",
        "rlbridge_verl.engine",  # where verl is installed; what cannot be imported is passed over
        "rlbridge_openrlhf.trainer",
        *(f"transformers.models.{name}.modeling_{name}" for name in ("qwen3", "qwen3_moe", "llama")),
    ]
)


def on_ranks(ranks: int, task: Callable[..., Any], model: Path, directory: Path, **settings: Any) -> list[Any]:
    """What `task(trainer, **arguments)` returns on each rank.

    `settings` are `arguments`, `backend` (native), `options` of that, `first` (called before the trainer is made), and what
    differs from the defaults of `_rank`.
    """
    meeting = directory / f"meeting-{len(list(directory.iterdir()))}"
    with ProcessPoolExecutor(ranks, mp_context=_processes) as pool:
        futures = [pool.submit(_rank, task, rank, ranks, model, f"file://{meeting}", settings) for rank in range(ranks)]
        first = next((f for f in as_completed(futures) if f.exception() is not None), None)
        return [future.result() for future in ([first] if first else futures)]


def make_batch(rows: int = 8, *, seed: int = 0, temperature: float = 1.0, step: int = 1) -> Batch:
    """Random prompts and completions of unequal lengths, in pairs of which one advantage is the other's negative."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(3, 60, rng.integers(1, 6)).tolist() for _ in range(rows)]
    completions = [rng.integers(3, 60, rng.integers(1, 9)).tolist() for _ in range(rows)]
    sequences = pad_sequences(prompts, completions, temperature=temperature)
    mask_BT = sequences.completion_mask_BT()
    advantages_B = np.repeat(rng.normal(size=rows // 2), 2) * np.tile([1.0, -1.0], rows // 2)
    return Batch(
        sequences,
        np.where(mask_BT, rng.normal(-4.5, 0.3, mask_BT.shape), 0).astype(np.float32),
        advantages_B.astype(np.float32),
        np.where(mask_BT, 0, -1).astype(np.int32),
        int(mask_BT.sum()),
        step,
    )


def _rank(task: Callable[..., Any], rank: int, ranks: int, model: Path, rendezvous: str, settings: dict[str, Any]) -> Any:
    import torch

    torch.set_num_threads(1)
    defaults = {"backend": "native", "kl_coef": 0.0, "grad_clip": 1.0, "warmup_steps": 2, "options": {}, "arguments": {}}
    settings = defaults | settings
    if first := settings.get("first"):
        first()
    backend = settings["backend"]
    options = registry().options_model("trainer", backend)(backend=backend, **settings["options"])
    context = TrainerContext(
        rank=rank,
        world_size=ranks,
        device="cpu",
        model_path=str(model),
        seed=7,
        rendezvous=rendezvous,
        timeout_seconds=20.0,
        trust_remote_code=False,
        algorithm=AlgorithmOptions(clip_low=0.2, clip_high=0.28, kl_coef=settings["kl_coef"]),
        optimizer=OptimizerOptions(1e-2, (0.9, 0.99), EPSILON, 0.01, settings["grad_clip"], settings["warmup_steps"]),
        options=options.model_dump(),
    )
    trainer = registry().load("trainer", backend)()
    trainer.setup(context, options)
    try:
        return task(trainer, **settings["arguments"])
    finally:
        trainer.close()
