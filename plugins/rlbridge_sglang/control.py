"""The calls by which SGLang is paused and told of new weights. Each is checked: SGLang answers a refusal, and raises none."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from rlbridge.errors import SyncError
from rlbridge_sglang.engine_loop import EngineLoop

_AGAIN_SECONDS = 0.05


class Control:
    """One engine's controls.

    Args:
        engine: The engine.
        loop: What its coroutines run on.
        seconds: The longest that each call may take.

    Attributes:
        limit: When every call ends, on the monotonic clock; None: each has its own `seconds`.
    """

    limit: float | None = None

    def __init__(self, engine: Any, loop: EngineLoop, seconds: float) -> None:
        from sglang.srt.managers import io_struct

        self._messages = io_struct
        self._manager = engine.tokenizer_manager
        self._loop, self._seconds = loop, seconds
        self._stamped = 0
        self._tasks: set[asyncio.Future[Any]] = set()

    def hold(self) -> None:
        """Stop scheduling: requests that run go back into the queue, without their keys and values."""
        pause = self._messages.PauseGenerationReqInput(mode="retract")
        self._do("pause", lambda: self._manager.pause_generation(pause))
        self._tell_version(self._stamped)  # the pause is not answered; this comes after it, and is

    def let_go(self) -> None:
        """Go on scheduling."""
        go_on = self._messages.ContinueGenerationReqInput(torch_empty_cache=False)
        self._do("resume", lambda: self._manager.continue_generation(go_on))

    def abort(self) -> None:
        """Ask all requests to end with what they have."""

        async def abort() -> None:
            self._manager.abort_request(abort_all=True)

        self._do("abort", abort)

    def close_door(self) -> None:
        """Let requests that come from now on wait; those that run go on."""

        async def close() -> None:
            async with self._manager.is_pause_cond:
                self._manager.is_pause = True

        self._do("pause", close)

    @property
    def is_closed(self) -> bool:
        """Whether requests that come have to wait."""
        return bool(self._manager.is_pause)

    def is_running(self) -> bool:
        """Whether a request is under way."""
        return bool(self._do("look", self._manager.model_update_lock.is_locked))

    def load_again(self, path: str) -> None:
        """Load the weights of a checkpoint, and drop the prefix cache.

        Raises:
            SyncError: SGLang refuses.
        """
        message = self._messages.UpdateWeightFromDiskReqInput(model_path=path, flush_cache=True)

        async def load() -> Any:
            name = self._manager.served_model_name
            try:
                return await self._manager.update_weights_from_disk(message)
            finally:
                self._manager.served_model_name = name  # SGLang would call the model by its path from now on

        success, said, *_ = self._do("load", load)
        self._checked("update_weights_from_disk", (success, said))

    def end_update(self) -> None:
        """End an update that a run has left open, if there is one."""
        end = self._messages.EndWeightUpdateReqInput()
        self._do("end", lambda: self._manager.end_weight_update(end))  # a refusal says that there is none

    def stamp(self, version: int, *, anyway: bool = False) -> None:
        """Let tokens that are made from now on carry `version`; `anyway`: also if it is the one that was told last."""
        if anyway or version != self._stamped:
            self._tell_version(version)
            self._stamped = version

    def flush(self) -> None:
        """Drop the prefix cache.

        Raises:
            SyncError: SGLang refuses.
        """
        limit = time.monotonic() + self._seconds
        while not (answer := self._do("flush", self._manager.flush_cache)).success:
            if time.monotonic() > limit:
                raise SyncError(
                    f"SGLang did not drop its prefix cache: {answer.message or 'requests run or wait'}",
                    role="generator",
                    rank=self._loop.name,
                    phase="flush",
                    todo="the engine has to be paused, and its requests ended or held",
                )
            time.sleep(_AGAIN_SECONDS)

    @contextlib.contextmanager
    def updating(self) -> Iterator[None]:
        """Whatever SGLang has made of its weights when it loaded them is undone before, and done again after.

        Raises:
            SyncError: SGLang refuses.
        """
        begin, end = self._messages.BeginWeightUpdateReqInput(), self._messages.EndWeightUpdateReqInput()
        self._checked("begin_weight_update", self._do("begin", lambda: self._manager.begin_weight_update(begin)))
        try:
            yield
        except BaseException:
            with contextlib.suppress(Exception):  # the first error is the one to tell
                self._do("end", lambda: self._manager.end_weight_update(end))
            raise
        self._checked("end_weight_update", self._do("end", lambda: self._manager.end_weight_update(end)))

    def _tell_version(self, version: int) -> None:
        told = self._messages.UpdateWeightVersionReqInput(new_version=str(version), abort_all_requests=False)
        self._do("version", lambda: self._manager.update_weight_version(told))

    def _checked(self, what: str, answer: tuple[bool, str]) -> None:
        success, message = answer
        if not success:
            todo = "the engine stays dirty until the next sync; if that is refused, too, begin the engine anew"
            raise SyncError(
                f"SGLang refused {what}: {message}", role="generator", rank=self._loop.name, phase="install", todo=todo
            )

    def _do(self, what: str, make: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        seconds = self._seconds if self.limit is None else min(self._seconds, max(self.limit - time.monotonic(), 0.0))
        return self._loop.call(lambda: self._to_its_end(make), seconds, what)

    async def _to_its_end(self, make: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        """Whoever waits may give up; the call goes on: SGLang would take the answer to a cancelled one for that to the next."""
        task = asyncio.ensure_future(make())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)
