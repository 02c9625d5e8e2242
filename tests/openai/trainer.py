"""A trainer's rank in a process of its own: tests after this one fork, and no process that has a NIXL agent may be forked."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from rlbridge.huggingface.checkpoint import checkpoint_pieces, module_tensors
from rlbridge.roles.source import ShardedSource
from rlbridge.sync.publisher import Publisher
from rlbridge_conformance.nursery import Nursery
from rlbridge_conformance.processes import ProcessParty

nursery = Nursery("rlbridge_conformance.processes:serve", [__name__])


def load(path: Path) -> Any:
    """The model in a directory."""
    return AutoModelForCausalLM.from_pretrained(path).requires_grad_(False)


def change(model: Any, seed: int) -> None:
    """Move every weight."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random) * 0.05)


def start(path: Path) -> ProcessParty:
    """The rank; its `change` is that of here."""
    return ProcessParty("trainer[0]", functools.partial(_Rank, path), nursery)


class _Rank:
    def __init__(self, path: Path) -> None:
        self._model = load(path)
        tensors, pieces = checkpoint_pieces(self._model)
        self._publisher = Publisher("trainer[0]", ShardedSource(tensors, pieces, lambda: module_tensors(self._model)))

    def handle(self, method: str, payload: bytes) -> bytes:
        return self._publisher.handle(method, payload)

    def change(self, seed: int) -> None:
        change(self._model, seed)
