"""vLLM's engine with its core in this process, on a thread of its own that does one thing at a time: a step, or a call."""

from __future__ import annotations

import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from vllm import SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.engine.arg_utils import EngineArgs
from vllm.inputs.engine import tokens_input
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine

from rlbridge.roles.generator import PauseMode
from rlbridge_vllm.serving import Reply, Request, Serving, awaited, of_places, of_prompt

T = TypeVar("T")

_CLOSE_SECONDS = 20.0


@dataclass
class _Run:
    """A request, and what has been made of it."""

    request: Request
    done: Future[Reply]
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)

    def add(self, output: Any, version: int) -> None:
        """Take over what one step has made."""
        said = output.outputs[0]
        tokens = list(said.token_ids)
        self.token_ids += tokens
        self.logprobs += of_places(said.logprobs, self.request.instead or tokens)
        self.versions += [version] * len(tokens)
        if output.prompt_logprobs:
            self.prompt_logprobs = of_prompt(output.prompt_logprobs, self.request.prompt)

    def end(self, reason: str) -> None:
        if not self.done.done():
            self.done.set_result(Reply(self.token_ids, self.logprobs, self.versions, reason, self.prompt_logprobs))


class InProcessServing(Serving):
    """One LLMEngine. A pause is that its thread makes no more steps; what is added meanwhile waits here."""

    def __init__(self, config: Any) -> None:
        self.max_model_len = config.model_config.max_model_len
        self.vocabulary = config.model_config.get_vocab_size()
        self._version = 0
        self._paused: PauseMode | None = None
        self._numbers = itertools.count()
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._waiting: deque[_Run] = deque()
        self._running: dict[str, _Run] = {}
        self._drained: list[Future[None]] = []
        started: Future[None] = Future()
        self._thread = threading.Thread(target=self._serve, args=(config, started), name="rlbridge-vllm", daemon=True)
        self._thread.start()
        started.result()

    @staticmethod
    def configure(arguments: dict[str, Any]) -> Any:
        """vLLM's configuration of these arguments, checked by vLLM. No step is under way when the thread is between two."""
        executor = "uni" if arguments.get("tensor_parallel_size", 1) == 1 else "mp"
        ours = {"distributed_executor_backend": executor, "async_scheduling": False, "disable_log_stats": True}
        return EngineArgs(**arguments, **ours).create_engine_config()

    def generate(self, requests: Sequence[Request]) -> list[Reply]:
        runs = [_Run(request, Future()) for request in requests]
        self._jobs.put(lambda: self._waiting.extend(runs))
        return [awaited(run.done, None, self.lost) for run in runs]

    def rpc(self, method: str, args: tuple[Any, ...], seconds: float) -> list[Any]:
        # Without vLLM's own timeout: after one, the next call would read the late answers of this one.
        return self._call(lambda: self._engine.collective_rpc(method, args=args), seconds)

    def pause(self, mode: PauseMode, seconds: float) -> None:
        drained: Future[None] = Future()

        def begin() -> None:
            self._paused = mode
            if mode == "abort":
                self._abort()
            if mode == "wait":
                self._drained.append(drained)
            else:
                drained.set_result(None)

        self._call(begin, seconds)
        awaited(drained, seconds, self.lost)

    def resume(self, seconds: float) -> None:
        self._call(lambda: setattr(self, "_paused", None), seconds)

    def drop_caches(self, seconds: float) -> bool:
        def drop() -> bool:
            self._engine.reset_encoder_cache()
            return bool(self._engine.reset_prefix_cache(reset_running_requests=True, reset_connector=True))

        return self._call(drop, seconds)

    def set_version(self, version: int, seconds: float) -> None:
        def stamp() -> None:
            self._version = version
            self._engine.set_weight_version(str(version))

        self._call(stamp, seconds)

    def close(self) -> None:
        try:
            self._call(self._shut, _CLOSE_SECONDS)
        finally:
            self._jobs.put(None)
            self._thread.join(5)

    def _serve(self, config: Any, started: Future[None]) -> None:
        """The thread: start the engine, then take calls, and make a step whenever none is waiting."""
        try:
            self._engine: LLMEngine = LLMEngine.from_vllm_config(config, disable_log_stats=True)
        except BaseException as error:
            cleanup_dist_env_and_memory()
            started.set_exception(error)
            return
        started.set_result(None)
        while True:
            if not self._take(block=not self._may_step()):
                return
            if self._may_step():
                try:
                    self._step()
                except BaseException as error:
                    self._fail(error)

    def _may_step(self) -> bool:
        if self._paused is None:
            return bool(self._waiting or self._running)
        return self._paused == "wait" and bool(self._running)

    def _take(self, *, block: bool) -> bool:
        """Do what was asked for; False: it is over."""
        while True:
            try:
                job = self._jobs.get(block=block)
            except queue.Empty:
                return True
            if job is None:
                return False
            job()
            self._tell_drained()
            block = False

    def _step(self) -> None:
        while self._paused is None and self._waiting:
            self._admit(self._waiting.popleft())
        for output in self._engine.step():
            run = self._running.get(output.request_id)
            if run is None:
                continue
            run.add(output, self._version)
            if output.finished:
                del self._running[output.request_id]
                run.end(output.outputs[0].finish_reason)
        self._tell_drained()

    def _admit(self, run: _Run) -> None:
        params: SamplingParams = run.request.params
        params.output_kind = RequestOutputKind.DELTA
        number = f"rlbridge-{next(self._numbers)}"
        try:
            self._engine.add_request(number, tokens_input(run.request.prompt), params)
        except Exception as error:
            run.done.set_exception(error)
        else:
            self._running[number] = run

    def _abort(self) -> None:
        self._engine.abort_request(list(self._running))
        for run in (*self._running.values(), *self._waiting):
            run.end("abort")
        self._running.clear()
        self._waiting.clear()

    def _fail(self, error: BaseException) -> None:
        for run in (*self._running.values(), *self._waiting):
            if not run.done.done():
                run.done.set_exception(error)
        self._running.clear()
        self._waiting.clear()
        self._tell_drained()

    def _tell_drained(self) -> None:
        if not self._running:
            for drained in self._drained:
                drained.set_result(None)
            self._drained.clear()

    def _shut(self) -> None:
        self._engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()  # vLLM's process groups would be those of this process's next engine

    def _call(self, work: Callable[[], T], seconds: float) -> T:
        done: Future[T] = Future()

        def job() -> None:
            try:
                done.set_result(work())
            except BaseException as error:
                done.set_exception(error)

        self._jobs.put(job)
        return awaited(done, seconds, self.lost)
