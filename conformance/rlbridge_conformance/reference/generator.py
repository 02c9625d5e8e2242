"""The reference generator: requests that run at once, a prefix cache, and pauses in the middle of a token stream."""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from rlbridge.errors import ConfigError, DataError, DeadlineError
from rlbridge.roles.batch import Completion, Sampling, Sequences
from rlbridge.roles.generator import Generator, GeneratorContext, PauseMode
from rlbridge_conformance.reference.model import check_tokens, completion_logprobs, forward, logits
from rlbridge_conformance.reference.options import ReferenceGeneratorOptions
from rlbridge_conformance.reference.rank_processes import RankProcesses, share
from rlbridge_conformance.reference.requests import Request
from rlbridge_conformance.reference.tensor_parallel import TensorParallelWeights

BLOCK = 4
"""Tokens in a block of the prefix cache."""

_MOST_BLOCKS = 4096


class ReferenceGenerator(TensorParallelWeights, Generator[ReferenceGeneratorOptions]):
    """One engine. `pause`, `resume` and `invalidate_caches` may be called from another thread than `generate`.

    Every token of a request is made by itself, in turn with the other requests', and under the lock `turn`; so a token is made
    wholly before or wholly after whatever else takes it. Of what the engine serves only `generate` uses the prefix cache.
    """

    def setup(self, context: GeneratorContext, options: ReferenceGeneratorOptions) -> None:
        """Load every rank."""
        self.load_model(context, options)
        self.rank_processes: RankProcesses | None = None
        if options.rank_processes:
            for rank in self.ranks:
                share(rank.parameters)
                share(rank.scaled_q_norms)
            self.rank_processes = RankProcesses(self.subscribers, options.pause_seconds)
        self.turn = threading.Condition()
        self.paused: PauseMode | None = None
        self.requests: list[Request] = []
        self.prefixes: dict[tuple[int, ...], torch.Tensor] = {}
        # Calls without a seed differ over calls and engines, and are the same in the next run.
        self.seeds = np.random.default_rng([context.seed, context.engine])

    def generate(self, prompts: list[list[int]], sampling: Sampling) -> list[Completion]:
        """All prompts at once, or `options.batch` of them.

        Raises:
            DataError: a prompt is empty, or holds a token that is not in the vocabulary.
            ConfigError: there are stop strings.
            DeadlineError: the engine was paused for longer than `options.pause_seconds`.
        """
        self.check_call(prompts, sampling)
        requests = self.make_requests(prompts, sampling)
        with self.turn:
            self.requests += requests
        try:
            while left := [request for request in requests if request.state != "done"]:
                self.admit(left)
                for request in left:
                    self.take_turn(request)
                time.sleep(self.options.token_seconds)
        finally:
            with self.turn:
                self.requests = [request for request in self.requests if request not in requests]
                self.turn.notify_all()
        return [request.completion for request in requests]

    def score(self, sequences: Sequences) -> np.ndarray[Any, Any]:
        """With the live parameters of every rank, and no cache; `batch` sequences at a time."""
        ranks = [self.rank_weights(rank) for rank in self.ranks]
        return completion_logprobs(self.config, ranks, sequences, self.options.batch)

    def on_each_rank(self, method: str, payload: bytes, tensors: dict[str, list[Any]] | None = None) -> list[bytes]:
        """In one process: one after the other. In processes of their own: all at once."""
        if self.rank_processes is not None:
            return self.rank_processes.call(method, payload)
        return [subscriber.handle(method, payload, tensors) for subscriber in self.subscribers]

    def pause(self, mode: PauseMode = "wait") -> None:
        """Returns once no running request makes a token any more; until `resume`, calls of `generate` wait to begin.

        `keep` holds running requests where they are, `wait` waits for their end, `abort` ends them, and those of the same calls
        that were still to begin.

        Raises:
            DeadlineError: requests still ran after `options.pause_seconds`.
        """
        self.paused = mode  # before the lock is had: whoever has it gives it up after its token
        with self.turn:
            self.turn.notify_all()
            match mode:
                case "keep":
                    self.hold_running()
                case "wait":
                    self.drain()
                case "abort":
                    self.abort_all()

    def resume(self) -> None:
        """Requests that were held go on, and those that waited begin."""
        with self.turn:
            self.paused = None
            self.turn.notify_all()

    def invalidate_caches(self) -> None:
        """Drop the prefix cache. A running request's keys and values are dropped where it is held, by `hold_running`."""
        with self.turn:
            self.prefixes.clear()

    def close(self) -> None:
        """End the epoch on every rank."""
        if self.rank_processes is not None:
            self.rank_processes.close()
            return
        for subscriber in self.subscribers:
            subscriber.close()

    def check_call(self, prompts: list[list[int]], sampling: Sampling) -> None:
        """Refuse what cannot be generated.

        Raises:
            DataError: a prompt is empty, or holds a token that is not in the vocabulary.
            ConfigError: there are stop strings.
        """
        if sampling.stop:
            raise ConfigError(
                f"the stop string {sampling.stop[0]!r} cannot be looked for: the reference generator has no tokenizer",
                todo="use stop_token_ids",
            )
        for index, prompt in enumerate(prompts):
            if not prompt:
                raise DataError(f"prompt {index} has no tokens", role="generator", todo="give it a text or a bos token")
            check_tokens(self.config, np.array(prompt))

    def make_requests(self, prompts: list[list[int]], sampling: Sampling) -> list[Request]:
        """A request a prompt, each with noise that follows from the call's seed and the prompt's place in it."""
        seed = int(self.seeds.integers(2**31)) if sampling.seed is None else sampling.seed
        requests = [
            Request(prompt, sampling, torch.Generator().manual_seed(zlib.crc32(f"{seed} {index}".encode())))
            for index, prompt in enumerate(prompts)
        ]
        if sampling.max_tokens < 1:
            for request in requests:
                request.end("length")
        return requests

    def admit(self, left: list[Request]) -> None:
        """Start as many of a call's waiting requests as there is room for; none while the engine is paused.

        Raises:
            DeadlineError: the pause did not end, and there is nothing else to do.
        """
        with self.turn:
            running = sum(request.state == "running" for request in left)
            if not running:
                self.wait_for(
                    lambda: self.paused is None or all(request.state == "done" for request in left), "no request could begin"
                )
            waiting = [request for request in left if request.state == "waiting"]
            if self.paused is None:
                for request in waiting[: max(self.options.batch - running, 0) if self.options.batch else None]:
                    request.state = "running"

    def take_turn(self, request: Request) -> None:
        """Make one token of a running request, when it is not held."""
        with self.turn:
            if request.state == "running":
                self.wait_while_held(request)
            if request.state == "running":
                self.advance(request)
                self.turn.notify_all()

    def wait_while_held(self, request: Request) -> None:
        """Wait for the end of a pause that stops running requests.

        Raises:
            DeadlineError: it did not end.
        """
        self.wait_for(
            lambda: self.paused not in ("keep", "abort") or request.state == "done", "a running request could not go on"
        )

    def hold_running(self) -> None:
        """Drop the keys and values of running requests: they are made again with the weights at hand when they go on."""
        for request in self.requests:
            request.kv_LSBKTH = None

    def drain(self) -> None:
        """Wait for the end of running requests.

        Raises:
            DeadlineError: they went on for too long.
        """
        self.wait_for(lambda: not any(request.state == "running" for request in self.requests), "running requests did not end")

    def abort_all(self) -> None:
        """End every request with the tokens that it has."""
        for request in self.requests:
            if request.state != "done":
                request.end("abort")
        self.turn.notify_all()

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Give up the lock until `condition` holds.

        Raises:
            DeadlineError: it does not within `options.pause_seconds`.
        """
        if not self.turn.wait_for(condition, self.options.pause_seconds):
            raise DeadlineError(
                f"the engine is paused ({self.paused}), and {what} within {self.options.pause_seconds:g} s",
                role="generator",
                rank=f"generator[{self.context.engine}]",
                todo="call resume, or let generator.pause_seconds be longer",
            )

    def advance(self, request: Request) -> None:
        """Sample one token, stamped with the version that is served now."""
        logprobs_V = self.next_logprobs(request)
        token = self.pick(logprobs_V, request)
        request.append(token, float(logprobs_V[token]), self.version)
        if self.ends(token, request.sampling):
            request.end("stop")
        elif len(request.completion.token_ids) >= request.sampling.max_tokens:
            request.end("length")

    def next_logprobs(self, request: Request) -> torch.Tensor:
        """Log-softmax [V] of logits / temperature at the next token; at temperature 0, of the logits."""
        tokens, kv_LSBKTH = request.tokens(), request.kv_LSBKTH
        if kv_LSBKTH is None and self.options.prefix_cache:
            kv_LSBKTH = self.cached_prefix(request.prompt)
        read = 0 if kv_LSBKTH is None else kv_LSBKTH.shape[-2]
        ranks = [self.rank_weights(rank) for rank in self.ranks]
        x_BTD, request.kv_LSBKTH = forward(self.config, ranks, torch.tensor([tokens[read:]]), kv_LSBKTH)
        if read < len(request.prompt) and self.options.prefix_cache:
            self.remember_prefix(request.prompt, request.kv_LSBKTH)
        return (logits(self.config, ranks, x_BTD[:, -1:])[0, 0] / (request.sampling.temperature or 1.0)).log_softmax(-1)

    def pick(self, logprobs_V: torch.Tensor, request: Request) -> int:
        """The likeliest token at temperature 0; else one that is drawn from what top-k and top-p leave."""
        if request.sampling.temperature == 0:
            return int(logprobs_V.argmax())
        kept_V = self.top_p(self.top_k(logprobs_V, request.sampling.top_k), request.sampling.top_p)
        return int(torch.multinomial(kept_V.exp(), 1, generator=request.noise))

    def top_k(self, logprobs_V: torch.Tensor, k: int) -> torch.Tensor:
        """Only the `k` likeliest tokens; 0 keeps all."""
        if not 0 < k < len(logprobs_V):
            return logprobs_V
        return logprobs_V.masked_fill(logprobs_V < logprobs_V.topk(k).values[-1], -torch.inf)

    def top_p(self, logprobs_V: torch.Tensor, p: float) -> torch.Tensor:
        """The likeliest tokens that together have the probability `p`, as few as do; 1 keeps all."""
        if p >= 1:
            return logprobs_V
        probabilities_V, order_V = logprobs_V.softmax(-1).sort(descending=True)
        before_V = probabilities_V.cumsum(-1) - probabilities_V
        return logprobs_V.index_fill(-1, order_V[before_V >= p], -torch.inf)

    def ends(self, token: int, sampling: Sampling) -> bool:
        """Whether the token ends its completion: the model's own stop tokens, and the call's."""
        return token in self.config.stop_ids or token in sampling.stop_token_ids

    def cached_prefix(self, prompt: list[int]) -> torch.Tensor | None:
        """Keys and values of the blocks that the prompt begins with, as far as they are known. Its last token is read anew."""
        found = []
        for stop in range(BLOCK, len(prompt), BLOCK):
            block_LSBKTH = self.prefixes.get(tuple(prompt[:stop]))
            if block_LSBKTH is None:
                break
            found.append(block_LSBKTH)
        return torch.cat(found, dim=-2) if found else None

    def remember_prefix(self, prompt: list[int], kv_LSBKTH: torch.Tensor) -> None:
        """Keep every whole block of the prompt; the oldest make room."""
        for stop in range(BLOCK, len(prompt) + 1, BLOCK):
            self.prefixes.setdefault(tuple(prompt[:stop]), kv_LSBKTH[..., stop - BLOCK : stop, :].clone())
        while len(self.prefixes) > _MOST_BLOCKS:
            del self.prefixes[next(iter(self.prefixes))]
