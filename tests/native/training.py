"""What is asked of trainers of every backend: to train alike, and to publish what they save."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from rlbridge.roles.batch import Batch
from rlbridge.roles.trainer import Trainer
from rlbridge.weights.layout import Layout
from tests.native.ranks import make_batch, on_ranks


def train(trainer: Trainer[Any], path: Path, batches: list[Batch]) -> list[dict[str, float]]:
    """Each rank's shard of the batches, then the weights as a directory."""
    metrics = [trainer.train_step(batch.shard(dist.get_rank(), dist.get_world_size())) for batch in batches]
    trainer.save(path)
    return metrics


def trained(model: Path, tmp_path: Path, *, ranks: int, **settings: Any) -> tuple[list[Any], dict[str, torch.Tensor]]:
    path = tmp_path / f"trained-{len(list(tmp_path.iterdir()))}"
    batches = [make_batch(seed=1, temperature=0.8), make_batch(seed=2, temperature=0.8, step=2)]
    metrics = on_ranks(ranks, train, model, tmp_path, arguments={"path": path, "batches": batches}, **settings)
    return metrics, load_file(path / "model.safetensors")


def assert_same_training(a: tuple[list[Any], dict[str, torch.Tensor]], b: tuple[list[Any], dict[str, torch.Tensor]]) -> None:
    for one, other in zip(a[0][0], b[0][0], strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    assert a[1].keys() == b[1].keys()
    for name, tensor in a[1].items():
        torch.testing.assert_close(tensor, b[1][name], rtol=1e-5, atol=3e-6, msg=name)


def publish(
    trainer: Trainer[Any], path: Path, *, before: Callable[[Any], None] | None = None
) -> tuple[str, Layout, list[torch.Tensor]]:
    """The kind of a rank's source, its layout, and a copy of each region, after a step; and the weights as a directory."""
    if before is not None:
        before(trainer)
    source = trainer.weights()
    layout = source.layout()
    source.bind(layout.regions)
    trainer.train_step(make_batch().shard(dist.get_rank(), dist.get_world_size()))
    dtypes = {t.name: getattr(torch, t.dtype) for t in layout.tensors}
    copies = [torch.empty(region.shape, dtype=dtypes[region.tensor]) for region in layout.regions]
    source.snapshot(copies)
    trainer.save(path)
    return type(source).__name__, layout, [copy.clone() for copy in copies]


def assert_published_whole(results: list[Any], files: dict[str, torch.Tensor]) -> None:
    """Every element of every saved tensor comes from exactly one rank, and is what was saved."""
    times = {name: torch.zeros(tensor.shape, dtype=torch.int32) for name, tensor in files.items()}
    for _, layout, copies in results:
        assert {t.name for t in layout.tensors if t.alias_of is None} == set(files)
        for region, copy in zip(layout.regions, copies, strict=True):
            box = tuple(slice(o, o + n) for o, n in zip(region.offset, region.shape, strict=True))
            times[region.tensor][box] += 1
            assert torch.equal(copy, files[region.tensor][box]), region
    assert all(bool((count == 1).all()) for count in times.values())
