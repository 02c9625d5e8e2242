"""The openai generator: one engine is one server that somebody else has started."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from rlbridge.errors import ConfigError, DataError, SyncError
from rlbridge.roles.batch import Completion, Sampling, Sequences
from rlbridge.roles.generator import Generator, GeneratorContext, PauseMode
from rlbridge_openai import requests
from rlbridge_openai.client import Client, GivenUpError
from rlbridge_openai.control import ServerControl
from rlbridge_openai.options import OpenAIGeneratorOptions
from rlbridge_openai.requests import MalformedError
from rlbridge_openai.secret import Secret, check_door
from rlbridge_openai.start import check_guarded, checked_facts, chosen_api, served_model

T = TypeVar("T")
S = TypeVar("S")


class OpenAIGenerator(Generator[OpenAIGeneratorOptions]):
    """One engine. `pause`, `resume` and `invalidate_caches` may be called while `generate` runs on another thread."""

    def setup(self, context: GeneratorContext, options: OpenAIGeneratorOptions) -> None:
        """Look at the server, and open a subscriber in each of its ranks.

        Raises:
            ConfigError: there is no server, it does not take the key, serves another model, or its weights cannot be changed.
            LayoutError: `install` is direct, and a tensor cannot be copied.
        """
        self._options, self._name, self._version = options, f"generator[{context.engine}]", 0
        self._aborts = 0
        url, secret = options.urls[context.engine], Secret(options.api_key_variable)
        check_door(url, secret, insecure=options.insecure)
        # Two more than there are requests: a pause gets through when all of those are under way.
        self._client = Client(url, secret, self._name, connections=options.concurrency + 2, retry_seconds=options.retry_seconds)
        self._control = ServerControl(self._client, options.answer_seconds)
        try:
            self._model = served_model(self._client, options.model)
            self._facts = checked_facts(self._client, self._control, options)
            check_guarded(self._client, self._facts, options)
            self._api = requests.APIS[self._facts.server][chosen_api(self._facts, options)]
            self._scoring = requests.SCORING[self._facts.server]
            self._installs = self._control.open(self._name, options.install)
        except BaseException:
            self._client.close()
            raise

    @property
    def version(self) -> int:
        """The version served; the server stamps tokens with it."""
        return self._version

    @version.setter
    def version(self, version: int) -> None:
        self._control.set_version(version)
        self._version = version

    @property
    def installs(self) -> list[str]:
        """How each rank takes weights: "direct" or "streamed"."""
        return list(self._installs)

    def generate(self, prompts: list[list[int]], sampling: Sampling) -> list[Completion]:
        """A request a prompt, `options.concurrency` of them at once.

        Raises:
            DataError: a prompt is empty, or too long, or holds a token that is not in the vocabulary; or the server refuses it.
            DeadlineError: the server took longer than `options.request_seconds`, or was overloaded for `options.retry_seconds`.
            PeerLostError: the server is gone.
        """
        requests.check_prompts(prompts, self._facts.max_model_len, self._facts.vocabulary)
        if sampling.max_tokens < 1:
            return [Completion([], [], [], "length") for _ in prompts]
        aborts = self._aborts

        def aborted() -> bool:
            return self._aborts != aborts

        def one(body: requests.Body) -> Completion:
            while not aborted():
                version = self._version
                try:
                    read = functools.partial(self._api.completion, version=version)
                    found = self._asked(self._api, body, aborted, read)
                except GivenUpError:
                    break
                if self._api.tells_versions or self._version == version or found.finish_reason == "abort":
                    return found
                # It was under way during an update, or waited for its end: nobody can say which version made it.
            return Completion([], [], [], "abort")

        bodies = requests.of_prompts(self._api, self._model, prompts, sampling, self._facts.stop_ids)
        return self._each(one, bodies)

    def score(self, sequences: Sequences) -> np.ndarray[Any, Any]:
        """Log-probs [B, T], as of prompts: no prefix cache is read. Nothing else may run on a vLLM meanwhile.

        Raises:
            DataError: a sequence is too long, or holds a token that is not in the vocabulary.
            PeerLostError: the server is gone.
        """
        longest, temperature, scoring = self._facts.max_model_len, sequences.temperature or 1.0, self._scoring
        rows = []
        for row, length in enumerate(sequences.lengths_B):
            tokens = [int(token) for token in sequences.tokens_BT[row, :length]]
            if len(tokens) > longest:
                raise DataError(f"sequence {row} has {len(tokens)} tokens, and the server takes {longest}", role="generator")
            requests.check_tokens(f"sequence {row}", tokens, self._facts.vocabulary)
            rows.append(tokens)

        def one(tokens: list[int]) -> list[float]:
            body, sent = scoring.of_sequence(self._model, tokens, longest, temperature)
            return self._asked(scoring, body, lambda: False, lambda answer: scoring.scores(answer, tokens, sent))

        if scoring.at_request:
            return requests.scored(sequences, self._each(one, rows))
        self._control.score_at(temperature)
        try:
            return requests.scored(sequences, self._each(one, rows))
        finally:
            self._control.score_at(None)

    def on_each_rank(self, method: str, payload: bytes, tensors: dict[str, list[Any]] | None = None) -> list[bytes]:
        """What concerns the parameters is done between two steps of the engine; all else beside them."""
        return self._control.ranks(method, payload)

    def pause(self, mode: PauseMode = "wait") -> None:
        """Until `resume`, requests wait in the server.

        Raises:
            ConfigError: running requests are to be held, and the server would not say which version made which token.
            DeadlineError: requests still ran after `options.answer_seconds`: the server goes on then.
        """
        if mode == "keep" and not self._api.tells_versions:
            raise ConfigError(
                "sync.pause is keep, and completions do not say which version made which token",
                role="generator",
                rank=self._name,
                todo="use generator.api=tokens (the server needs --enable-scale-out), or another sync.pause",
            )
        if mode == "abort":
            self._aborts += 1
        self._control.pause(mode)

    def resume(self) -> None:
        """Requests that were held go on, and those that waited begin."""
        self._control.resume()

    def invalidate_caches(self) -> None:
        """Drop the prefix cache; requests that are held compute their keys and values anew.

        Raises:
            SyncError: the server did not.
        """
        if not self._control.drop_caches():
            raise SyncError(f"{self._facts.server} did not drop its prefix cache", role="generator", rank=self._name)

    def close(self) -> None:
        """Close the connections. The server goes on: it is somebody else's."""
        if hasattr(self, "_client"):
            self._client.close()

    def _asked(self, api: requests.Api, body: requests.Body, give_up: Callable[[], bool], read: Callable[[Any], T]) -> T:
        path = api.path
        reply = self._client.post(path, body, self._options.request_seconds, give_up)
        if reply.status != 200:
            raise self._client.malformed(path, f"{reply.status}: {reply.text}")
        try:
            return read(reply.json())
        except (MalformedError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise self._client.malformed(path, f"{error}") from None

    def _each(self, call: Callable[[S], T], arguments: Sequence[S]) -> list[T]:
        """The results in order. The first error ends what has not begun."""
        if not arguments:
            return []
        threads = ThreadPoolExecutor(min(self._options.concurrency, len(arguments)), thread_name_prefix="rlbridge-openai")
        try:
            return list(threads.map(call, arguments))
        finally:
            threads.shutdown(cancel_futures=True)
