"""The SGLang generator: an engine whose ranks are processes of SGLang's own, each with a subscriber over its parameters."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from rlbridge.errors import DataError, DeadlineError, ModelError, RlbridgeError
from rlbridge.roles.batch import Completion, Sampling, Sequences
from rlbridge.roles.generator import Generator, GeneratorContext, PauseMode
from rlbridge_sglang.channel import RankClient, socket_path
from rlbridge_sglang.control import Control
from rlbridge_sglang.engine_loop import EngineLoop
from rlbridge_sglang.launch import Launch, has_tokenizer
from rlbridge_sglang.options import SglangGeneratorOptions
from rlbridge_sglang.rank_process import rank_name
from rlbridge_sglang.ranks import Ranks
from rlbridge_sglang.requests import check_prompts, completion, sampling_params, score_params, scores

_ABORT_AGAIN_SECONDS = 0.05


class SglangGenerator(Generator[SglangGeneratorOptions]):
    """One engine of `tensor_parallel` ranks. Every call may come from any thread."""

    def setup(self, context: GeneratorContext, options: SglangGeneratorOptions) -> None:
        """Start SGLang's processes, and load the model.

        Raises:
            PluginError: SGLang is too old.
            ConfigError: SGLang refuses an argument.
            ModelError: the model cannot be loaded.
            DeadlineError: that took longer than `options.start_seconds`.
            PeerLostError: a rank ended without a word.
        """
        self._context, self._options = context, options
        self._turn = threading.Condition()
        self._paused: PauseMode | None = None
        self._running = 0
        self._unseeded = np.random.default_rng([context.seed, context.engine])
        self._launch = Launch(context, options)
        self._loop = EngineLoop(f"generator[{context.engine}]", self._launch.lost)
        try:
            engine = self._loop.start(self._launch.build, options.start_seconds)
        except BaseException:
            self.close()
            raise
        self._engine = engine
        self._vocabulary = int(engine.tokenizer_manager.model_config.vocab_size)
        self._control = Control(engine, self._loop, options.rank_seconds)
        self._ranks = Ranks([self._client(rank) for rank in range(options.tensor_parallel)], self._run, options.rank_seconds)

    def generate(self, prompts: list[list[int]], sampling: Sampling) -> list[Completion]:
        """All prompts at once; SGLang schedules them.

        Raises:
            DataError: a prompt is empty, or too long for the model, or holds a token that is not in the vocabulary.
            ModelError: there are stop strings, and the model directory has no tokenizer to read them with.
            PeerLostError: a process of the engine is gone.
            DeadlineError: the call took longer than `options.call_seconds`, or a pause longer than `options.pause_seconds`.
        """
        check_prompts(prompts, self._vocabulary)
        if sampling.stop and not has_tokenizer(self._context.model_path):
            raise ModelError(
                f"{self._context.model_path} has no tokenizer", todo="stop strings need one; use stop_token_ids instead"
            )
        if sampling.max_tokens < 1:
            return [Completion([], [], [], "length") for _ in prompts]
        if not prompts:
            return []
        seed = int(self._unseeded.integers(2**31)) if sampling.seed is None else sampling.seed
        params = sampling_params(sampling, len(prompts), seed)
        outputs = self._called("generate", prompts, params, logprob_start_len=-1)
        return [completion(output, self.version) for output in outputs]

    def score(self, sequences: Sequences) -> np.ndarray[Any, Any]:
        """Log-probs [B, T] of each completion token, read through the whole of its sequence: past the prefix cache.

        Raises:
            DataError: a sequence is too long for the model, or holds a token that is not in the vocabulary.
            PeerLostError: a process of the engine is gone.
            DeadlineError: the call took longer than `options.call_seconds`, or a pause longer than `options.pause_seconds`.
        """
        lengths = sequences.lengths_B.tolist()
        texts = [row[:length].tolist() for row, length in zip(sequences.tokens_BT, lengths, strict=True)]
        if not texts:
            return np.zeros(sequences.tokens_BT.shape, dtype=np.float32)
        check_prompts(texts, self._vocabulary)
        params = [score_params(sequences.temperature)] * len(texts)
        return scores(sequences, self._called("score", texts, params, logprob_start_len=0))

    def on_each_rank(self, method: str, payload: bytes, tensors: dict[str, list[Any]] | None = None) -> list[bytes]:
        """In the processes of all ranks at once; what writes live parameters runs between two forward passes.

        Raises:
            PeerLostError: a rank is gone; it is named.
            DeadlineError: a rank did not answer within `options.rank_seconds`; it is named.
            SyncError: SGLang refused an update.
        """
        return self._ranks.on_each(method, payload, self._control.updating)

    def pause(self, mode: PauseMode = "wait") -> None:
        """Returns once no request makes a token any more; until `resume`, calls of `generate` and `score` wait to begin.

        `keep` takes running requests back into SGLang's queue without their keys and values: they read all their tokens again
        when they go on. Its own pause in place would keep keys and values of the old weights.

        Raises:
            DeadlineError: requests still ran after `options.pause_seconds`: the engine goes on then.
        """
        with self._turn:
            before, self._paused = self._paused, mode
        try:
            if mode == "wait":
                if self._running:  # they may be held by a pause before this one
                    self._control.let_go()
                self._until_ended(lambda: None)
            elif mode == "abort":
                self._until_ended(self._control.abort)
            self._control.hold()
        except RlbridgeError:
            if before is None:
                with contextlib.suppress(RlbridgeError):  # the first error is the one to tell
                    self.resume()
            raise

    def resume(self) -> None:
        """Requests that were held go on, and calls that waited begin: with the version that the core has set."""
        self._control.stamp(self.version)
        self._control.let_go()
        with self._turn:
            self._paused = None
            self._turn.notify_all()

    def invalidate_caches(self) -> None:
        """Drop the prefix cache. SGLang refuses while requests run; held ones have nothing in it.

        Raises:
            SyncError: it still refused after `options.rank_seconds`.
        """
        self._control.flush()

    def close(self) -> None:
        """End every process of the engine, and its loop."""
        self._launch.close()
        if self._loop.stop():
            self._launch.close_sockets()

    def _called(self, what: str, texts: list[list[int]], params: list[dict[str, Any]], logprob_start_len: int) -> Any:
        with self._turn:
            if not self._turn.wait_for(lambda: self._paused is None, self._options.pause_seconds):
                raise self._paused_for_long(f"no call of {what} could begin")
            self._running += 1
        try:
            make = self._asked(texts, params, logprob_start_len)
            return self._loop.call(make, self._options.call_seconds, what)
        except ValueError as error:  # SGLang's word for what it cannot read
            raise DataError(f"SGLang refuses a prompt: {error}", role="generator", phase=what) from error
        finally:
            with self._turn:
                self._running -= 1
                self._turn.notify_all()

    def _asked(self, texts: list[list[int]], params: list[dict[str, Any]], logprob_start_len: int) -> Callable[[], Any]:
        engine = self._engine
        return lambda: engine.async_generate(
            input_ids=texts, sampling_params=params, return_logprob=True, logprob_start_len=logprob_start_len
        )

    def _until_ended(self, again: Callable[[], None]) -> None:
        """Wait for the end of every call that has begun."""
        limit = time.monotonic() + self._options.pause_seconds
        while True:
            with self._turn:
                if self._turn.wait_for(lambda: not self._running, 0):
                    return
            again()
            with self._turn:
                if self._turn.wait_for(lambda: not self._running, _ABORT_AGAIN_SECONDS):
                    return
            if time.monotonic() > limit:
                raise self._paused_for_long("running requests did not end")

    def _run(self, ticket: int) -> None:
        """Let SGLang call `rlbridge_run` in every rank."""
        self._loop.run(lambda: self._engine.collective_rpc("rlbridge_run", ticket=ticket), self._options.rank_seconds, "rpc")

    def _client(self, rank: int) -> RankClient:
        path = socket_path(self._launch.directory, rank)
        return RankClient(rank_name(self._context.engine, rank), path, lambda: self._launch.why_gone(rank))

    def _paused_for_long(self, what: str) -> RlbridgeError:
        return DeadlineError(
            f"the engine is paused ({self._paused}), and {what} within {self._options.pause_seconds:g} s",
            role="generator",
            rank=f"generator[{self._context.engine}]",
            todo="a pause ends with the update that it is for; let generator.pause_seconds be longer",
        )
