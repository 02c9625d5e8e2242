"""A gloo group of the trainer's ranks: rows of one tensor from all of them, with a limit to every wait."""

from __future__ import annotations

import datetime
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from rlbridge.errors import DeadlineError, PeerLostError


class RowGroup:
    """A process group of its own: the default one is left to whoever else is in the process.

    Args:
        url: "tcp://host:port" or "file://path", the same on every rank.
        seconds: The limit of the meeting and of each gather.

    Raises:
        DeadlineError: the ranks have not all come within `seconds`.
    """

    def __init__(self, url: str, rank: int, ranks: int, seconds: float) -> None:
        self._rank, self._ranks, self._seconds = rank, ranks, seconds
        timeout = datetime.timedelta(seconds=seconds)
        try:
            store, _, _ = next(rendezvous(url, rank, ranks, timeout=timeout))
            self._group: Any = dist.ProcessGroupGloo(store, rank, ranks, timeout)
        except RuntimeError as error:
            raise self._failed("did not meet", error) from error

    def gather(self, name: str, rows: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """The full tensor of `shape` whose rows (dimension 0) the ranks hold in equal numbers, the last ones fewer or none.

        Raises:
            DeadlineError: a rank did not take part in time.
            PeerLostError: a rank is gone.
        """
        count = -(-shape[0] // self._ranks)
        own = torch.zeros(count, *shape[1:], dtype=rows.dtype)
        own[: len(rows)] = rows
        flat = own.view(-1).view(torch.uint8)  # as bytes, since gloo does not know every dtype
        parts = [torch.empty_like(flat) for _ in range(self._ranks)]
        try:
            self._group.allgather([parts], [flat]).wait()
        except RuntimeError as error:
            raise self._failed(f"did not gather {name!r}", error) from error
        return torch.cat(parts).view(rows.dtype).view(-1, *shape[1:])[: shape[0]]

    def _failed(self, what: str, error: RuntimeError) -> DeadlineError | PeerLostError:
        """Gloo and its store raise RuntimeError alone; the text tells a wait that ended from a connection that broke."""
        late = "imed out" in str(error) or "imeout" in str(error)
        kind, why = (DeadlineError, f"within {self._seconds:g} s") if late else (PeerLostError, "since one of them is gone")
        return kind(
            f"the {self._ranks} trainer ranks {what} {why}: {str(error).splitlines()[0]}",
            role="trainer",
            rank=self._rank,
            todo="is a rank stopped, or its process gone?",
        )
