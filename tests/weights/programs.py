"""Random tensors, and random programs of view operations that run alike on values and on placeholders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st

Program = Callable[[torch.Tensor], torch.Tensor]

DTYPES = ("float32", "bfloat16", "int64", "bool")


def examples(count: int) -> settings:
    """So many examples, the same in every run."""
    return settings(max_examples=count, derandomize=True, deadline=None, database=None)


def shapes(*, low: int = 1, dims: tuple[int, int] = (0, 4), high: int = 6) -> st.SearchStrategy[tuple[int, ...]]:
    return st.lists(st.integers(low, high), min_size=dims[0], max_size=dims[1]).map(tuple)


def values(shape: Sequence[int], dtype: str, seed: int) -> torch.Tensor:
    """Elements of random bits, so that one in another's place shows."""
    made = torch.Generator().manual_seed(seed)
    if dtype == "bool":
        return torch.randint(0, 2, tuple(shape), generator=made).bool()
    if dtype.startswith("int"):
        return torch.randint(-(2**31), 2**31, tuple(shape), generator=made, dtype=getattr(torch, dtype))
    return torch.randn(tuple(shape), generator=made, dtype=torch.float64).to(getattr(torch, dtype))


def identical(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal shape, dtype and bytes."""
    raw = [t.contiguous().as_strided((t.numel(),), (1,)).view(torch.uint8) for t in (a, b)]
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(*raw)


def box_of(tensor: torch.Tensor, region: Any) -> torch.Tensor:
    return tensor[tuple(slice(o, o + n) for o, n in zip(region.offset, region.shape, strict=True))]


@st.composite
def view_programs(draw: st.DrawFn, tensor: torch.Tensor, length: int = 4) -> Program:
    """A chain of operations, each of which only views its input, for a tensor with the shape and strides of `tensor`."""
    tensor = tensor.to("meta")
    steps: list[Program] = []
    for _ in range(draw(st.integers(0, length))):
        step = draw(_view_step(tensor))
        tensor = step(tensor)
        steps.append(step)
    return lambda value: _run(steps, value)


@st.composite
def copy_programs(draw: st.DrawFn, tensor: torch.Tensor) -> Program:
    """A chain of views and of copies that rearrange: clone, contiguous, reshape, cat and stack with itself."""
    tensor = tensor.to("meta")
    steps = [draw(view_programs(tensor, 3))]
    for _ in range(draw(st.integers(0, 2))):
        steps += [draw(_copy_step(_run(steps, tensor)))]
        steps += [draw(view_programs(_run(steps, tensor), 2))]
    return lambda value: _run(steps, value)


def _run(steps: Sequence[Program], value: torch.Tensor) -> torch.Tensor:
    for step in steps:
        value = step(value)
    return value


@st.composite
def _view_step(draw: st.DrawFn, t: torch.Tensor) -> Program:
    if t.dim() == 0 or t.numel() > 2000:
        return lambda x: x.unsqueeze(0) if x.dim() == 0 else x.detach()
    d = draw(st.integers(0, t.dim() - 1))
    n = t.shape[d]
    kind = draw(st.sampled_from(["narrow", "transpose", "permute", "merge", "divide", "chunk", "select", "unsqueeze", "split"]))
    if kind == "narrow" and n:
        start = draw(st.integers(0, n - 1))
        length = draw(st.integers(1, n - start))
        return lambda x: x.narrow(d, start, length)
    if kind == "transpose":
        e = draw(st.integers(0, t.dim() - 1))
        return lambda x: x.transpose(d, e)
    if kind == "permute":
        order = draw(st.permutations(range(t.dim())))
        return lambda x: x.permute(*order)
    if kind == "merge" and d + 1 < t.dim() and t.stride(d) == t.stride(d + 1) * t.shape[d + 1]:
        merged = (*t.shape[:d], n * t.shape[d + 1], *t.shape[d + 2 :])
        return lambda x: x.view(merged)
    if kind == "divide" and n:
        factor = draw(st.sampled_from([k for k in range(1, n + 1) if n % k == 0]))
        divided = (*t.shape[:d], factor, n // factor, *t.shape[d + 1 :])
        return lambda x: x.view(divided)
    if kind == "chunk" and n:
        parts = draw(st.integers(1, n))
        which = draw(st.integers(0, len(t.chunk(parts, d)) - 1))
        return lambda x: x.chunk(parts, d)[which]
    if kind == "select" and n:
        at = draw(st.integers(0, n - 1))
        return lambda x: x.select(d, at)
    if kind == "split" and n:
        size = draw(st.integers(1, n))
        which = draw(st.integers(0, len(t.split(size, d)) - 1))
        return lambda x: x.split(size, d)[which]
    return lambda x: x.unsqueeze(d)


@st.composite
def _copy_step(draw: st.DrawFn, t: torch.Tensor) -> Program:
    kind = draw(st.sampled_from(["clone", "contiguous", "reshape", "cat", "stack"]))
    if not t.dim():
        return lambda x: x.clone()
    d = draw(st.integers(-t.dim(), t.dim() - 1))
    if kind == "clone":
        return lambda x: x.clone()
    if kind == "contiguous":
        return lambda x: x.contiguous()
    if kind == "cat" and t.shape[d] > 1:
        at = draw(st.integers(1, t.shape[d] - 1))
        return lambda x: torch.cat([x.narrow(d, at, x.shape[d] - at), x, x.narrow(d, 0, at)], dim=d)
    if kind == "stack" and t.shape[d] % 2 == 0:
        return lambda x: torch.stack([*reversed(x.chunk(2, d))], dim=d)
    return lambda x: x.reshape(-1)
