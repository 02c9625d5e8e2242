"""What rlbridge adds to each of vLLM's workers: the rank's subscriber, reached by `collective_rpc`. Bytes in, bytes out."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from rlbridge.errors import SyncError
from rlbridge.roles.sink import WeightSink
from rlbridge.sync.messages import answer
from rlbridge.sync.subscriber import Subscriber
from rlbridge_vllm.logprobs import Scoring
from rlbridge_vllm.sinks import choose_sink
from rlbridge_vllm.streamed import StreamedSink


@dataclass
class _Rank:
    """What one rank holds of rlbridge."""

    subscriber: Subscriber
    sink: WeightSink
    scoring: Scoring
    threads: ThreadPoolExecutor
    pending: dict[int, Future[bytes]] = field(default_factory=dict)


class WorkerExtension:
    """Methods that vLLM mixes into its worker class (`worker_extension_cls`), whose are `rank`, `device` and `get_model`."""

    rank: int
    device: torch.device
    get_model: Any
    _rlbridge: _Rank

    def rlbridge_open(self, engine: str, install: str, path: str) -> bytes:
        """Put a subscriber over this rank's parameters. Answers with (pid, parent's pid, how weights are installed)."""

        def run() -> tuple[int, int, str]:
            sink, how = choose_sink(self, install, path)
            name = f"{engine}.rank[{self.rank}]"
            # A wait for bytes may take one thread for long; what the session calls meanwhile takes the other.
            threads = ThreadPoolExecutor(2, thread_name_prefix="rlbridge-rank")
            old: _Rank | None = getattr(self, "_rlbridge", None)  # of a driver that is gone
            subscriber = Subscriber(name, sink, str(self.device), self.rank, old.subscriber if old else None)
            scoring = old.scoring if old else Scoring(self.get_model())
            scoring.temperature = None
            if old:
                old.threads.shutdown(wait=False)
            self._rlbridge = _Rank(subscriber, sink, scoring, threads)
            return os.getpid(), os.getppid(), how

        return answer(run)

    def rlbridge_handle(self, method: str, payload: bytes) -> bytes:
        """`Subscriber.handle`, between two steps of the engine."""
        return self._rlbridge.subscriber.handle(method, payload)

    def rlbridge_begin(self, ticket: int, method: str, payload: bytes, over: list[int]) -> None:
        """Begin a call of `Subscriber.handle` beside the engine's steps. Nobody asks for the answers of `over` any more."""
        pending = self._rlbridge.pending
        for old in over:
            pending.pop(old, None)
        pending[ticket] = self._rlbridge.threads.submit(self._aside, method, payload)

    def rlbridge_poll(self, ticket: int) -> bytes | None:
        """The answer of a call that was begun, or None while there is none.

        One that nobody began is answered by an error, and not by raising it: vLLM would leave other ranks' answers unread.
        """
        call = self._rlbridge.pending.get(ticket)
        if call is None:
            return answer(_is_of_another)
        return call.result() if call.done() else None

    def rlbridge_score_at(self, temperature: float | None) -> None:
        """Give log-probs at this temperature instead of logits; None: logits again."""
        self._rlbridge.scoring.temperature = temperature

    def _aside(self, method: str, payload: bytes) -> bytes:
        if method == "start_pull" and isinstance(self._rlbridge.sink, StreamedSink):
            self._rlbridge.sink.arena_changes()
        return self._rlbridge.subscriber.handle(method, payload)


def _is_of_another() -> None:
    raise SyncError("the engine has been opened anew since this call began", role="generator")
