"""What runs in the process of an engine's rank: SGLang's scheduler, with a subscriber over its model's parameters."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import inspect
import logging
import os
import signal
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlbridge.errors import LayoutError
from rlbridge_sglang.channel import RankServer, socket_path

_PR_SET_PDEATHSIG = 1
_FAILED = 1
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RankSpec:
    """What a rank is told besides SGLang's own arguments.

    Attributes:
        engine: The engine's number.
        directory: The private directory of the engine's sockets.
        seeded: Whether the sampling backend takes seeds.
    """

    engine: int
    directory: str
    seeded: bool


def rank_name(engine: int, rank: int) -> str:
    """A rank's name in the session."""
    return f"generator[{engine}].rank[{rank}]"


def failure_path(directory: str, rank: int) -> Path:
    """Where a rank writes why it ended."""
    return Path(directory) / f"rank{rank}.failed"


def run_rank(spec: RankSpec, *args: Any, **kwargs: Any) -> None:
    """In the place of SGLang's `run_scheduler_process`; `args` are that function's, the rank's number the fourth of them."""
    end_with_the_parent()
    rank = int(args[3])
    os.environ.pop("SGLANG_RETURN_ORIGINAL_LOGPROB", None)  # it would give log-probs at temperature 1
    with _telling_why(spec, rank):
        from sglang.srt.managers import scheduler

        from rlbridge_sglang.sampling import keep_seeds, score_at_temperature

        if spec.seeded:
            keep_seeds()
        score_at_temperature()
        scheduler.Scheduler = _with_subscriber(scheduler.Scheduler, spec, rank)
        scheduler.run_scheduler_process(*args, **kwargs)


def end_with_the_parent() -> None:
    """This process is to end with the thread that started it, which lives as long as the engine."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _with_subscriber(base: Any, spec: RankSpec, rank: int) -> Any:
    """SGLang's scheduler, with a subscriber and a socket; an error ends this process alone.

    SGLang answers an error by a signal that ends the engine's process, which is a Ray actor with a tale to tell.
    """

    class RankScheduler(base):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            with _telling_why(spec, rank):
                super().__init__(*args, **kwargs)
                self.rlbridge_server = _serve(spec, rank, self.tp_worker.model_runner)

        def run_event_loop(self) -> None:
            with _telling_why(spec, rank):
                super().run_event_loop()

        def rlbridge_run(self, ticket: int) -> None:
            """Called through SGLang's `collective_rpc`, so on this thread and between two forward passes."""
            _synchronize()
            self.rlbridge_server.run(ticket)

    return RankScheduler


def derived_copies(model_runner: Any) -> str:
    """SGLang's own word on why the model's weights cannot be updated: it computes with copies that nobody would renew.

    Empty where they can be, and for an SGLang that has no word on it. Its versions ask the model, its runner or neither.
    """
    try:
        from sglang.srt.model_executor.model_runner_components import weight_updater
    except ImportError:
        return ""
    ask = getattr(weight_updater, "_unsupported_derived_weight_cache_error", None)
    if ask is None:
        return ""
    known = {"model": model_runner.model, "model_runner": model_runner}
    return ask(**{name: known[name] for name in inspect.signature(ask).parameters if name in known}) or ""


class _Rank:
    """A subscriber over the rank's parameters. In a server each run that comes asks for one of its own."""

    def __init__(self, spec: RankSpec, rank: int, model_runner: Any) -> None:
        from rlbridge_sglang.model_sink import ModelSink

        self._rank = rank
        refusal = functools.partial(derived_copies, model_runner)
        self._sink = ModelSink(model_runner.model, refusal, _checkpoint(str(model_runner.model_config.model_path)))
        self._device = str(next(iter(self._sink.loaded.values())).device)
        self._subscriber: Any = None
        self._subscribe(spec.engine)

    def handle(self, method: str, payload: bytes) -> bytes:
        """As `Subscriber.handle`; "subscribe" puts a new one, for the engine of that number, in the place of the old."""
        from rlbridge.sync.messages import answer, unpack

        if method == "subscribe":
            return answer(lambda: self._subscribe(unpack(payload, int)))
        reply: bytes = self._subscriber.handle(method, payload)
        return reply

    def _subscribe(self, engine: int) -> tuple[int, int, str]:
        from rlbridge.sync.subscriber import Subscriber

        old, name = self._subscriber, rank_name(engine, self._rank)
        self._subscriber = Subscriber(name, self._sink, self._device, self._rank, instead_of=old)
        return os.getpid(), os.getppid(), "direct"


def _checkpoint(path: str) -> Any:
    """What a model was loaded from; None where that has no safetensors files."""
    from rlbridge.weights.model_files import checkpoint_of

    try:
        return checkpoint_of(path)
    except (LayoutError, OSError, ValueError):
        return None


def _serve(spec: RankSpec, rank: int, model_runner: Any) -> RankServer:
    return RankServer(socket_path(spec.directory, rank), _Rank(spec, rank, model_runner).handle)


def _synchronize() -> None:
    """Wait for the forward pass that a GPU may still be busy with."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextlib.contextmanager
def _telling_why(spec: RankSpec, rank: int) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        _log.exception("%s ends", rank_name(spec.engine, rank))
        failure_path(spec.directory, rank).write_text("".join(traceback.format_exception(error)))
        os._exit(_FAILED)
