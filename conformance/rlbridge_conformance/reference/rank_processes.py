"""The ranks of an engine in processes of their own, as serving engines have them: one can be lost without the others."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from rlbridge.sync.subscriber import Subscriber
from rlbridge_conformance.processes import ProcessParty


class RankProcesses:
    """One process a subscriber, forked here: it writes into parameters that `share` has put where this process sees them.

    Args:
        subscribers: One a rank, that no call has reached yet.
        seconds: How long an answer may take.
    """

    def __init__(self, subscribers: Sequence[Subscriber], seconds: float) -> None:
        self._seconds = seconds
        self.parties = [ProcessParty(s.name, functools.partial(_in_child, s)) for s in subscribers]

    def call(self, method: str, payload: bytes) -> list[bytes]:
        """`Subscriber.handle` in every process at once.

        Raises:
            PeerLostError: one is gone; it is named.
        """
        futures = [party.call(method, payload) for party in self.parties]
        return [future.result(self._seconds)[0] for future in futures]

    def close(self) -> None:
        """End them."""
        for party in self.parties:
            party.stop()


def share(tensors: dict[str, torch.Tensor] | list[torch.Tensor]) -> None:
    """Move tensors into shared memory, in place; tied ones stay tied."""
    for tensor in tensors.values() if isinstance(tensors, dict) else tensors:
        tensor.share_memory_()  # type: ignore[no-untyped-call]


def rank_pids(host: Any) -> list[int]:
    """The processes of an engine's ranks; for `Member.apply`."""
    return [party.pid for party in host.serving.generator.rank_processes.parties]


def _in_child(subscriber: Subscriber) -> Subscriber:
    torch.set_num_threads(1)
    return subscriber
