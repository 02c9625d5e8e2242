"""One large flat buffer, allocated once an epoch."""

from __future__ import annotations

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
            self.tensor = torch.zeros(max(nbytes, 1), dtype=torch.uint8, device=device)
            self.tensor.fill_(1)  # zeros may map one shared page: a write makes them ours
        except RuntimeError as error:
            raise ResourceError(
                f"an arena of {nbytes / 2**20:.0f} MiB cannot be allocated on {device}: {error}",
                todo="a trainer rank needs two arenas of its shard, an engine rank one of its slice",
            ) from error

    def view(self, offset: int, nbytes: int, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor of `dtype` and `shape` that lies at byte `offset`."""
        return self.tensor[offset : offset + nbytes].view(getattr(torch, dtype)).view(shape)
