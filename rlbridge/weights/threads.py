"""Work over many tensors on a few threads: torch's copies and xxhash leave the interpreter free while they run."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")

_THREADS = min(4, os.cpu_count() or 1)
"""One thread does not use up the memory bandwidth of a host, a few do."""

_LEAST_BYTES = 8 * 2**20
"""What a thread has to have to do to be worth its start."""


def copy_all(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copy each source into the target of the same index; dtypes may differ."""

    def copy(part: slice) -> None:
        if targets[part]:  # torch copies no empty list
            with torch.no_grad():
                torch._foreach_copy_(list(targets[part]), list(sources[part]))

    in_threads(copy, targets)


def in_threads(work: Callable[[slice], T], tensors: Sequence[torch.Tensor]) -> list[T]:
    """`work` on slices of `tensors` that hold about equal numbers of bytes; its results in order.

    Tensors of an accelerator are one slice: there the device does the sharing out.
    """
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    on_host = all(tensor.device.type == "cpu" for tensor in tensors[:1])
    count = min(_THREADS, sum(sizes) // _LEAST_BYTES) if on_host else 1
    if count <= 1:
        return [work(slice(0, len(tensors)))]
    with ThreadPoolExecutor(count, thread_name_prefix="rlbridge-copy") as pool:
        return list(pool.map(work, _equal_parts(sizes, count)))


def _equal_parts(sizes: Sequence[int], count: int) -> list[slice]:
    parts: list[slice] = []
    share, start, held = sum(sizes) / count, 0, 0
    for index, size in enumerate(sizes):
        held += size
        if held >= share * (len(parts) + 1):
            parts.append(slice(start, index + 1))
            start = index + 1
    return [*parts, slice(start, len(sizes))] if start < len(sizes) else parts
