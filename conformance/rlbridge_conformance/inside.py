"""What checks do inside the processes of a stage: run there by `Member.apply`, so each takes the host first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rlbridge.roles.generator import PauseMode
from rlbridge.roles.sink import WeightSink
from rlbridge_conformance.probes import subscribers

_AMOUNT = 0.3


def move(host: Any, part: str) -> None:
    """Move those tensors of the suite's own trainer whose names hold `part`, and no others.

    Each call takes back what the one before it has added to them: they go nowhere, however many checks move them.
    """
    moves: dict[str, int] = host.__dict__.setdefault("moves", {})
    moves[part] = moves.get(part, 0) + 1
    noise, before = (torch.Generator().manual_seed(100 * len(part) + count) for count in (moves[part], moves[part] - 1))
    first = moves[part] == 1
    for name, tensor in host.trainer.tensors.items():
        if part in name:
            moved = torch.randn(tensor.shape, generator=noise)
            moved -= 0 if first else torch.randn(tensor.shape, generator=before)
            tensor.add_((_AMOUNT * moved).to(tensor.dtype))


def pause(host: Any, mode: PauseMode) -> None:
    """`Generator.pause`."""
    host.serving.generator.pause(mode)


def resume(host: Any) -> None:
    """`Generator.resume`."""
    host.serving.generator.resume()


def spoil_the_next_install(host: Any) -> int:
    """Let the next install of each rank in this process leave an element that is not what arrived. Returns how many ranks."""
    ranks = subscribers(host)
    for rank in ranks:
        _spoil(rank._sink)
    return len(ranks)


def _spoil(sink: WeightSink) -> None:
    def install(sources: Sequence[torch.Tensor]) -> None:
        del sink.__dict__["install"]
        sink.install(sources)
        view = sink.live()[0]
        view[(0,) * view.dim()] += 1

    sink.__dict__["install"] = install
