"""One large flat buffer, allocated once an epoch."""

from __future__ import annotations

import contextlib
import mmap

import torch

from rlbridge.errors import ResourceError


class Arena:
    """`nbytes` of memory on `device`, touched before its first use so that no sync pays for page faults.

    Raises:
        ResourceError: the memory cannot be had.
    """

    def __init__(self, nbytes: int, device: str = "cpu") -> None:
        self.nbytes = nbytes
        try:
            size = max(nbytes, 1)
            self.tensor = _host_memory(size) if device == "cpu" else torch.empty(size, dtype=torch.uint8, device=device)
            self.tensor.fill_(1)
            if self.tensor.is_cuda:  # a peer, who knows no streams, may write as soon as it has the address
                torch.cuda.synchronize(self.tensor.device)
        except (RuntimeError, OSError) as error:
            raise ResourceError(
                f"an arena of {nbytes / 2**20:.0f} MiB cannot be allocated on {device}: {error}",
                todo="a trainer rank needs two arenas of its shard, an engine rank one of its slice: leave room for it",
            ) from error

    def view(self, offset: int, nbytes: int, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor of `dtype` and `shape` that lies at byte `offset`."""
        return self.tensor[offset : offset + nbytes].view(getattr(torch, dtype)).view(shape)


def _host_memory(nbytes: int) -> torch.Tensor:
    """Anonymous memory, on huge pages where the kernel has them.

    A transfer between processes of one host (CMA) pins the source's pages one by one: with huge pages there are 512 times
    fewer, and it takes little more than a copy.
    """
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
