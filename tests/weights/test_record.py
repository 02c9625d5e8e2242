"""What is recorded of a loader, against running that loader for real."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from rlbridge.errors import LayoutError
from rlbridge.weights.layout import Piece, TensorMeta
from rlbridge.weights.record import record
from tests.weights.programs import DTYPES, Program, box_of, copy_programs, examples, identical, shapes, values

Weights = Iterable[tuple[str, torch.Tensor]]
Target = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Write:
    """One copy of a loader: `source` of the tensor `tensor` into `target` of the parameter `parameter`."""

    tensor: str
    source: Program
    parameter: str
    target: Target


@dataclass
class Case:
    """Checkpoint tensors, the parameters of an engine, and a loader's writes."""

    tensors: dict[str, torch.Tensor]
    parameters: dict[str, torch.Tensor]
    writes: list[Write]

    @property
    def metas(self) -> list[TensorMeta]:
        return [_meta(name, tensor) for name, tensor in self.tensors.items()]

    def load(self, weights: Weights) -> None:
        for name, tensor in weights:
            for write in self.writes:
                if write.tensor == name:
                    write.target(self.parameters[write.parameter]).copy_(write.source(tensor))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    dtype = draw(st.sampled_from(DTYPES))
    tensors = {f"t{i}": values(draw(shapes()), dtype, i) for i in range(draw(st.integers(1, 3)))}
    parameters, writes = {}, []
    for p in range(draw(st.integers(1, 3))):
        sources = []
        for _ in range(draw(st.integers(1, 3))):
            name = draw(st.sampled_from(sorted(tensors)))
            program = draw(copy_programs(tensors[name].shape))
            sources.append((name, program, program(tensors[name].to("meta")).shape))
        made, targets = draw(_fused(f"p{p}", [shape for _, _, shape in sources], getattr(torch, dtype)))
        parameters[f"p{p}"] = made
        writes += [Write(n, s, f"p{p}", t) for (n, s, _), t in zip(sources, targets, strict=True)]
    return Case(tensors, parameters, writes)


@st.composite
def _fused(draw: st.DrawFn, name: str, parts: list[torch.Size], dtype: torch.dtype) -> tuple[torch.Tensor, list[Target]]:
    """A parameter that has room for `parts`, and where each goes."""
    sizes = [shape.numel() for shape in parts]
    style = draw(st.sampled_from(["flat", "columns", "padded", "whole"]))
    if style == "whole" and len(parts) == 1:
        order = draw(st.permutations(range(len(parts[0]))))
        back = [order.index(d) for d in range(len(order))]
        return torch.zeros([parts[0][d] for d in order], dtype=dtype), [lambda p: p.permute(back)]
    if style == "columns" and all(n % 2 == 0 for n in sizes):
        at = [sum(sizes[:i]) // 2 for i in range(len(sizes))]
        targets = [
            lambda p, a=a, n=n, s=s: p.narrow(1, a, n // 2).view(2, *([n // 2] if n else [0]))
            if False
            else _Reshaped(p.narrow(1, a, n // 2), s)
            for a, n, s in zip(at, sizes, parts, strict=True)
        ]
        return torch.zeros(2, sum(sizes) // 2, dtype=dtype), targets
    at = [sum(sizes[:i]) for i in range(len(sizes))]
    room = torch.zeros(sum(sizes) + 3, dtype=dtype)[2:-1] if style == "padded" else torch.zeros(sum(sizes), dtype=dtype)
    return room, [lambda p, a=a, n=n, s=s: p[a : a + n].view(s) for a, n, s in zip(at, sizes, parts, strict=True)]
