"""What checks do inside the processes of a stage: run there by `Member.apply`, so each takes the host first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rlbridge.roles.batch import Completion, Sampling, decode
from rlbridge.roles.generator import Generator, PauseMode
from rlbridge.roles.sink import WeightSink
from rlbridge_conformance.probes import subscribers

_AMOUNT = 0.3


def move(host: Any, part: str) -> None:
    """Move those tensors of the suite's own trainer whose names hold `part`, and no others."""
    noise = torch.Generator().manual_seed(len(part))
    for name, tensor in host.trainer.tensors.items():
        if part in name:
            tensor.add_((_AMOUNT * torch.randn(tensor.shape, generator=noise)).to(tensor.dtype))


def generate_unguarded(host: Any, prompts: list[list[int]], sampling: bytes) -> list[Completion]:
    """`Generator.generate`, past the engine's guard: it does not keep an update out."""
    found: list[Completion] = host.serving.generator.generate(prompts, decode(sampling, Sampling))
    return found


def pause(host: Any, mode: PauseMode) -> None:
    """`Generator.pause`."""
    host.serving.generator.pause(mode)


def resume(host: Any) -> None:
    """`Generator.resume`."""
    host.serving.generator.resume()


def hold_requests_at_updates(host: Any, hold: bool) -> None:
    """Let updates hold running requests, or again wait for them. All else of an update is as the engine does it."""
    engine = host.serving
    if hold:
        engine.generator = _Holding(engine.generator)
    else:
        engine.generator = engine.generator.held


class _Holding:
    """A generator to which every pause is one that keeps requests."""

    def __init__(self, held: Generator[Any]) -> None:
        self.__dict__["held"] = held

    def __getattr__(self, name: str) -> Any:
        return getattr(self.held, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.held, name, value)

    def pause(self, mode: PauseMode) -> None:
        self.held.pause("keep")


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
