"""An engine on an event loop and a thread of their own, so that any thread may call it, and no call outlives its ranks.

SGLang's own synchronous calls run the loop from whatever thread calls, one at a time. And the kernel ends the ranks when the
thread that started them ends, which is to be no thread of a pool.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

from rlbridge.errors import DeadlineError, RlbridgeError

_LOOK_SECONDS = 0.25
_END_SECONDS = 10.0
_TASK_SECONDS = 2.0


class EngineLoop:
    """The thread that an engine lives on.

    Args:
        name: The engine's name in the session.
        lost: Says whether a process of the engine is gone, and which.
        loop: One that runs already, of a server: nothing is to be started on it, and nobody looks for lost processes.
    """

    def __init__(
        self, name: str, lost: Callable[[], RlbridgeError | None], loop: asyncio.AbstractEventLoop | None = None
    ) -> None:
        self.name, self._look = name, lost
        self._loop = asyncio.new_event_loop() if loop is None else loop
        self._lost: asyncio.Future[None] | None = None if loop is None else loop.create_future()
        self._thread: threading.Thread | None = None

    def start(self, build: Callable[[], Any], seconds: float) -> Any:
        """What `build` returns on the loop's thread, where the loop then runs.

        Raises:
            DeadlineError: that took longer than `seconds`.
        """
        built: Future[Any] = Future()
        self._thread = threading.Thread(target=self._run, args=(build, built), name=f"{self.name}-loop", daemon=True)
        self._thread.start()
        try:
            return built.result(seconds)
        except FutureTimeoutError as error:
            raise DeadlineError(
                f"the engine has not loaded its model within {seconds:g} s",
                role="generator",
                rank=self.name,
                phase="start",
                todo="the limit is generator.start_seconds",
            ) from error

    def call(self, make: Callable[[], Coroutine[Any, Any, Any]], seconds: float, what: str) -> Any:
        """What the coroutine that `make` makes returns.

        Raises:
            PeerLostError: a process of the engine is gone.
            DeadlineError: it did not end within `seconds`.
        """
        future = asyncio.run_coroutine_threadsafe(self._guarded(make), self._loop)
        try:
            return future.result(seconds)
        except FutureTimeoutError as error:
            future.cancel()
            raise self._late(what, seconds) from error

    def run(self, call: Callable[[], Any], seconds: float, what: str) -> Any:
        """What `call`, which waits for the ranks with no deadline of its own, returns.

        Raises:
            PeerLostError: a process of the engine is gone.
            DeadlineError: it did not end within `seconds`; it may still do so.
        """
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, name=f"{self.name}-{what}", daemon=True).start()
        return self.call(lambda: _awaited(future), seconds, what)

    def stop(self) -> bool:
        """End the loop and its thread; False if it is still building the engine."""
        with contextlib.suppress(RuntimeError):  # it is closed
            self._loop.call_soon_threadsafe(self._loop.stop)
        if self._thread is not None:
            self._thread.join(_END_SECONDS)
        return self._thread is None or not self._thread.is_alive()

    def _run(self, build: Callable[[], Any], built: Future[Any]) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            engine = build()
        except BaseException as error:
            self._loop.close()
            built.set_exception(error)
            return
        self._lost = self._loop.create_future()
        watching = self._loop.create_task(self._watch())
        self._loop.call_soon(built.set_result, engine)
        try:
            self._loop.run_forever()
        finally:
            watching.cancel()
            self._end_tasks()
            self._loop.close()

    def _end_tasks(self) -> None:
        """End SGLang's own, which run as long as the loop does."""
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        if tasks:
            self._loop.run_until_complete(asyncio.wait(tasks, timeout=_TASK_SECONDS))

    async def _watch(self) -> None:
        assert self._lost is not None
        while (error := self._look()) is None:
            await asyncio.sleep(_LOOK_SECONDS)
        self._lost.set_exception(error)
        self._lost.exception()  # whoever calls raises it; that nobody does is no mistake

    async def _guarded(self, make: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        assert self._lost is not None
        if self._lost.done():
            raise self._gone()
        task = asyncio.ensure_future(make())
        try:
            await asyncio.wait({task, self._lost}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not task.done():
                task.cancel()
        if not task.done():
            raise self._gone()
        return task.result()

    def _gone(self) -> BaseException:
        assert self._lost is not None
        error = self._look() or self._lost.exception()
        assert error is not None
        return error

    def _late(self, what: str, seconds: float) -> DeadlineError:
        return DeadlineError(
            f"the engine did not end {what!r} within {seconds:g} s",
            role="generator",
            rank=self.name,
            phase=what,
            todo="is one of its processes stopped or overloaded?",
        )


async def _awaited(future: Future[Any]) -> Any:
    return await asyncio.wrap_future(future)
