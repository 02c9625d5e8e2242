"""vLLM's AsyncLLM on an event loop of its own: the core and the ranks are processes, and requests go on over an update."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs.engine import tokens_input
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from rlbridge.roles.generator import PauseMode
from rlbridge_vllm.serving import Reply, Request, Serving, awaited, of_places, of_prompt

T = TypeVar("T")

_CLOSE_SECONDS = 20.0


class AsyncServing(Serving):
    """One AsyncLLM. vLLM's processes are started by the loop's thread, and end with it at the latest."""

    def __init__(self, config: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rlbridge-vllm", daemon=True)
        self._thread.start()
        self._numbers = itertools.count()
        self.max_model_len = config.model_config.max_model_len
        self.vocabulary = config.model_config.get_vocab_size()
        try:
            self._engine: AsyncLLM = self._wait(self._start(config))
        except BaseException:
            self._stop_loop()
            raise

    @staticmethod
    def configure(arguments: dict[str, Any]) -> Any:
        """vLLM's configuration of these arguments, checked by vLLM."""
        executor = "uni" if arguments.get("tensor_parallel_size", 1) == 1 else "mp"  # never Ray's: the actor has all the GPUs
        return AsyncEngineArgs(**arguments, distributed_executor_backend=executor).create_engine_config()

    def generate(self, requests: Sequence[Request]) -> list[Reply]:
        return self._wait(self._generate(requests))

    def rpc(self, method: str, args: tuple[Any, ...], seconds: float) -> list[Any]:
        found: list[Any] = self._wait(self._engine.collective_rpc(method, args=args), seconds)
        return found

    def pause(self, mode: PauseMode, seconds: float) -> None:
        # AsyncLLM.pause_generation sleeps 20 ms after this, for the order in which callers see things.
        self._wait(self._engine.engine_core.pause_scheduler_async(mode=mode, clear_cache=False), seconds)

    def resume(self, seconds: float) -> None:
        self._wait(self._engine.resume_generation(), seconds)

    def drop_caches(self, seconds: float) -> bool:
        async def drop() -> bool:
            await self._engine.reset_encoder_cache()
            return bool(await self._engine.reset_prefix_cache(reset_running_requests=True, reset_connector=True))

        return self._wait(drop(), seconds)

    def set_version(self, version: int, seconds: float) -> None:
        self._wait(self._engine.update_weight_version(str(version)), seconds)

    def close(self) -> None:
        async def shut() -> None:
            self._engine.shutdown()

        try:
            self._wait(shut(), _CLOSE_SECONDS)
        finally:
            self._stop_loop()

    async def _start(self, config: Any) -> AsyncLLM:
        return AsyncLLM.from_vllm_config(config, disable_log_stats=True)

    async def _generate(self, requests: Sequence[Request]) -> list[Reply]:
        tasks = [asyncio.ensure_future(self._one(request)) for request in requests]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    async def _one(self, request: Request) -> Reply:
        params: SamplingParams = request.params
        params.output_kind = RequestOutputKind.FINAL_ONLY
        number = f"rlbridge-{next(self._numbers)}"
        (last,) = [output async for output in self._engine.generate(tokens_input(request.prompt), params, number)]
        said = last.outputs[0]
        tokens = list(said.token_ids)
        versions = [int(span.version) for span in said.weight_versions or [] for _ in range(span.start, span.end)]
        logprobs = of_places(said.logprobs, request.instead or tokens)
        return Reply(tokens, logprobs, versions, said.finish_reason, of_prompt(last.prompt_logprobs, request.prompt))

    def _wait(self, work: Coroutine[Any, Any, T], seconds: float | None = None) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return awaited(future, seconds, self.lost)
        except BaseException:
            future.cancel()
            raise

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
