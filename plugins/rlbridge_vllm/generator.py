"""The vLLM generator: one engine of one or more ranks, each of which receives its own part of the weights."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import numpy as np
from vllm.v1.engine.exceptions import EngineDeadError

from rlbridge.errors import ConfigError, DeadlineError, ModelError, PeerLostError, RlbridgeError, SyncError
from rlbridge.roles.batch import Completion, Sampling, Sequences
from rlbridge.roles.generator import Generator, GeneratorContext, PauseMode
from rlbridge.sync.messages import ASIDE, longest_wait, result
from rlbridge_vllm import requests
from rlbridge_vllm.arguments import engine_arguments, set_variables
from rlbridge_vllm.async_serving import AsyncServing
from rlbridge_vllm.in_process import InProcessServing
from rlbridge_vllm.model_files import check_directory, has_tokenizer, stop_ids
from rlbridge_vllm.options import VllmGeneratorOptions
from rlbridge_vllm.processes import Watch
from rlbridge_vllm.serving import LostError, Reply, Serving
from rlbridge_vllm.tail import forget_log, keep_log, last_words

T = TypeVar("T")

_KINDS: dict[str, type[AsyncServing] | type[InProcessServing]] = {"async": AsyncServing, "in_process": InProcessServing}

_POLL_SECONDS = (0.0005, 0.02)
"""The first and the longest wait between two looks at a call that ranks answer beside their steps."""

_LOST_SECONDS = 2.0
"""How long after a failed call a process may take to be seen to have ended."""


class VllmGenerator(Generator[VllmGeneratorOptions]):
    """One engine. `pause`, `resume` and `invalidate_caches` may be called while `generate` runs on another thread."""

    def setup(self, context: GeneratorContext, options: VllmGeneratorOptions) -> None:
        """Start the engine, and open a subscriber in each of its ranks.

        Raises:
            ModelError: vLLM cannot load the model; its reason is told.
            ConfigError: vLLM does not know one of `engine_args`.
            LayoutError: `install` is direct, and a tensor cannot be copied.
        """
        self._options, self._name = options, f"generator[{context.engine}]"
        self._tickets, self._over = itertools.count(), list[int]()
        self._path, self._version = context.model_path, 0
        check_directory(self._path)
        self._stop_ids = stop_ids(self._path, trust_remote_code=context.trust_remote_code)
        self._log_memory: int | None = os.memfd_create("rlbridge-vllm-log")  # nothing of it is left, however this process ends
        self._log = f"/proc/{os.getpid()}/fd/{self._log_memory}"
        self._watch: Watch | None = None
        self._serving: Serving | None = None
        try:
            self._serving = self._start(context, options)
            self._guarded("the opening of the ranks", lambda: self._open_ranks(self._engine))
            self.version = 0
        except BaseException:
            self.close()
            raise

    @property
    def version(self) -> int:
        """The version served; vLLM stamps tokens with it."""
        return self._version

    @version.setter
    def version(self, version: int) -> None:
        self._guarded("the new version", lambda: self._engine.set_version(version, self._options.answer_seconds))
        self._version = version

    @property
    def installs(self) -> list[str]:
        """How each rank takes weights: "direct" or "streamed"."""
        return list(self._installs)

    def generate(self, prompts: list[list[int]], sampling: Sampling) -> list[Completion]:
        """All prompts at once: vLLM runs as many together as it has room for.

        Raises:
            DataError: a prompt is empty, or too long, or holds a token that is not in the vocabulary.
            ModelError: there are stop strings, and the model directory has no tokenizer to read them with.
            PeerLostError: a process of the engine is gone.
        """
        requests.check_prompts(prompts, self._engine.max_model_len, self._engine.vocabulary)
        if sampling.stop and not has_tokenizer(self._path):
            todo = "stop strings need one; use stop_token_ids instead"
            raise ModelError(f"{self._path} has no tokenizer", role="generator", todo=todo)
        if sampling.max_tokens < 1:
            return [Completion([], [], [], "length") for _ in prompts]
        asked = requests.of_prompts(prompts, sampling, self._stop_ids)
        replies = self._guarded("a call of generate", lambda: self._engine.generate(asked))
        return [Completion(r.token_ids, r.logprobs, r.versions, r.finish_reason) for r in replies]

    def score(self, sequences: Sequences) -> np.ndarray[Any, Any]:
        """Log-probs [B, T], as of prompts: no prefix cache is read. Nothing else may run meanwhile.

        Raises:
            DataError: a sequence is too long, or holds a token that is not in the vocabulary.
            PeerLostError: a process of the engine is gone.
        """
        asked = requests.of_sequences(sequences, self._engine.max_model_len, self._engine.vocabulary)

        def run() -> list[Reply]:
            seconds = self._options.answer_seconds
            self._engine.rpc("rlbridge_score_at", (sequences.temperature or 1.0,), seconds)
            try:
                return self._engine.generate(asked)
            finally:
                self._engine.rpc("rlbridge_score_at", (None,), seconds)

        return requests.scores(sequences, self._guarded("a call of score", run))

    def on_each_rank(self, method: str, payload: bytes, tensors: dict[str, list[Any]] | None = None) -> list[bytes]:
        """What concerns the parameters is done between two steps of the engine; all else beside them."""
        if method in ASIDE:
            return self._guarded(method, lambda: self._aside(method, payload))
        return self._guarded(method, lambda: self._rpc("rlbridge_handle", method, payload))

    def pause(self, mode: PauseMode = "wait") -> None:
        """Until `resume`, calls of `generate` wait to begin.

        Raises:
            DeadlineError: requests still ran after `options.answer_seconds`: the engine goes on then.
        """
        seconds = self._options.answer_seconds
        try:
            self._guarded(f"a pause ({mode})", lambda: self._engine.pause(mode, seconds))
        except DeadlineError:
            with contextlib.suppress(RlbridgeError):
                self.resume()
            raise

    def resume(self) -> None:
        """Requests that were held go on, and those that waited begin."""
        self._guarded("the end of a pause", lambda: self._engine.resume(self._options.answer_seconds))

    def invalidate_caches(self) -> None:
        """Drop the prefix cache; requests that are held compute their keys and values anew.

        Raises:
            SyncError: vLLM did not.
        """
        if not self._guarded("the caches", lambda: self._engine.drop_caches(self._options.answer_seconds)):
            raise SyncError("vLLM did not drop its prefix cache", role="generator", rank=self._name)

    def close(self) -> None:
        """End every process of the engine."""
        with contextlib.suppress(Exception):
            if self._serving is not None:
                self._serving.close()
        if self._watch is not None:
            if not self._watch.wait_for_the_end(_LOST_SECONDS):
                self._watch.kill()
            self._watch.close()
            self._watch = None
        forget_log()
        if self._log_memory is not None:
            os.close(self._log_memory)
            self._log_memory = None

    @property
    def _engine(self) -> Serving:
        if self._serving is None:
            raise SyncError("the engine is not set up", role="generator")
        return self._serving

    def _start(self, context: GeneratorContext, options: VllmGeneratorOptions) -> Serving:
        set_variables(options, context.device, self._log)
        kind = _KINDS[options.engine]
        try:
            config = kind.configure(engine_arguments(context, options))
        except TypeError as error:
            raise ConfigError(f"vLLM: {error}", role="generator", todo="look at generator.engine_args") from error
        except Exception as error:
            todo = "does this vLLM know the architecture of its config.json? look at generator.engine_args, too"
            raise ModelError(f"vLLM does not take the model {self._path}: {error}", role="generator", todo=todo) from error
        if config.use_v2_model_runner:
            raise ConfigError(
                "vLLM runs this with its second model runner, which has neither rlbridge's log-probs nor its scores",
                role="generator",
                todo="look at generator.engine_args",
            )
        keep_log(self._log)  # vLLM has now set up its own logging, and its processes inherit both
        try:
            return kind(config)
        except Exception as error:
            raise ModelError(
                f"vLLM could not load {self._path}: {type(error).__name__}: {error}{self._last_words()}",
                role="generator",
                rank=self._name,
                todo="are its files whole, and is there memory for it (generator.gpu_memory_utilization, kv_cache_gib)?",
            ) from error

    def _open_ranks(self, serving: Serving) -> None:
        arguments = (self._name, self._options.install, self._path)
        replies = serving.rpc("rlbridge_open", arguments, self._options.answer_seconds)
        opened = [result(reply, tuple[int, int, str]) for reply in replies]
        self._installs = [how for _, _, how in opened]
        pids = {f"{self._name}.rank[{rank}]": pid for rank, (pid, _, _) in enumerate(opened)}
        pids |= {f"the core of {self._name}": parent for _, parent, _ in opened}
        watch = Watch({name: pid for name, pid in pids.items() if pid not in (os.getpid(), os.getppid())})
        self._watch, serving.lost = watch, lambda: bool(watch.lost())

    def _rpc(self, method: str, *args: Any) -> list[Any]:
        return self._engine.rpc(method, args, self._options.answer_seconds)

    def _aside(self, method: str, payload: bytes) -> list[bytes]:
        """Begin a call on every rank, and look for the answers between steps: the engine is held up for no longer."""
        ticket = next(self._tickets)
        limit = time.monotonic() + self._options.answer_seconds + longest_wait(method, payload)
        over, self._over = self._over, []
        self._rpc("rlbridge_begin", ticket, method, payload, over)
        try:
            wait, longest = _POLL_SECONDS
            while time.monotonic() < limit:
                time.sleep(wait)
                wait = min(wait * 1.5, longest)
                replies = self._rpc("rlbridge_poll", ticket)
                if None not in replies:
                    return replies
            raise TimeoutError
        finally:
            self._over.append(ticket)

    def _guarded(self, what: str, call: Callable[[], T]) -> T:
        """Call the engine; what became of its processes is told by name.

        Raises:
            PeerLostError: one is gone.
            DeadlineError: there was no answer.
            SyncError: vLLM raised something else.
        """
        try:
            return call()
        except RlbridgeError:
            raise
        except TimeoutError as error:
            self._late(what, error)
        except (EngineDeadError, LostError) as error:
            self._lost(error)
        except Exception as error:
            if self._watch is not None and (self._watch.lost() or self._watch.wait_for_the_end(0.2)):
                self._lost(error)
            raise SyncError(
                f"vLLM failed in {what}: {type(error).__name__}: {error}",
                role="generator",
                rank=self._name,
                todo="after a failed update it refuses to serve until the next sync; if that fails too, begin it anew",
            ) from error

    def _lost(self, error: Exception) -> NoReturn:
        limit = time.monotonic() + _LOST_SECONDS
        lost: list[str] = []
        while self._watch is not None and not (lost := self._watch.lost()) and time.monotonic() < limit:
            time.sleep(0.01)
        who = lost[0] if lost else self._name
        raise PeerLostError(
            f"the process of {who} is gone, and vLLM has ended the engine{self._last_words()}",
            role="generator",
            rank=self._name,
            peer=who,
            todo="begin the engine anew",
        ) from error

    def _last_words(self) -> str:
        lines = last_words(self._log)
        return f"; it logged:\n{lines}" if lines else ""

    def _late(self, what: str, error: Exception) -> NoReturn:
        if self._watch is not None and self._watch.lost():
            self._lost(error)
        stopped = self._watch.stopped() if self._watch is not None else []
        who = f"the process of {stopped[0]} is stopped, and" if stopped else f"{self._name}:"
        raise DeadlineError(
            f"{who} {what} was not answered within {self._options.answer_seconds:g} s",
            role="generator",
            rank=self._name,
            peer=stopped[0] if stopped else None,
            todo="is it overloaded? the limit is generator.answer_seconds",
        ) from error
