"""One engine as the session and the run see it: a `Generator` that never serves torn weights."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from rlbridge.errors import DeadlineError, DirtyError, RlbridgeError, StaleVersionError
from rlbridge.sync.messages import Installed, State, Timed, Update, Wait, answer, pack, result, unpack

if TYPE_CHECKING:
    import numpy as np

    from rlbridge.roles.batch import Completion, Sampling, Sequences
    from rlbridge.roles.generator import Generator, PauseMode

_log = logging.getLogger(__name__)

_Call = Literal["generate", "score"]


class Engine:
    """Guards a generator: it serves one whole version, or refuses to.

    An engine is "ready", "updating" while its ranks install, or "dirty" when an install did not come to its end on every rank.
    Only a whole sync takes it out of "dirty". An update waits for the call of `score` that goes on, and for that of `generate`
    unless its pause holds or ends the running requests; calls that come during an update wait for its end.
    """

    def __init__(self, name: str, generator: Generator[Any]) -> None:
        self.name = name
        self.generator = generator
        self.state = "ready"
        self.version = 0
        self._turn = threading.Condition()
        self._call: _Call | None = None
        self._installing = False

    def generate(self, prompts: list[list[int]], sampling: Sampling) -> list[Completion]:
        """`Generator.generate` on whole versions: on one, unless updates hold requests. Tokens say of which they are.

        Raises:
            DirtyError: the engine holds a mixture of versions, or came to while its requests were held.
        """
        with self._called("generate"):
            self._serving()
            completions = self.generator.generate(prompts, sampling)
            if self.state == "dirty":
                self._serving()
            return completions

    def score(self, sequences: Sequences) -> np.ndarray[Any, Any]:
        """`Generator.score` on a whole version.

        Raises:
            DirtyError: the engine holds a mixture of versions.
        """
        with self._called("score"):
            self._serving()
            return self.generator.score(sequences)

    def handle(self, method: str, payload: bytes, tensors: dict[str, list[Any]] | None = None) -> list[bytes]:
        """Answer one call of the session: one answer a rank, or a single one for what concerns the engine as a whole."""
        if method == "update":
            return [answer(lambda: self._update(unpack(payload, Update)))]
        if method == "state":
            return [answer(lambda: State(self.state, self.version))]
        if method == "scramble":
            with self._alone("wait", None):
                self.state = "dirty"
                return self.generator.on_each_rank(method, payload, tensors)
        return self.generator.on_each_rank(method, payload, tensors)

    @contextlib.contextmanager
    def _called(self, call: _Call) -> Iterator[None]:
        """One call of the generator at a time, and none that begins during an update."""
        with self._turn:
            self._turn.wait_for(lambda: self._call is None and not self._installing)
            self._call = call
        try:
            yield
        finally:
            with self._turn:
                self._call = None
                self._turn.notify_all()

    @contextlib.contextmanager
    def _alone(self, pause: PauseMode, seconds: float | None) -> Iterator[bool]:
        """Whether within `seconds` no call goes on that `pause` would have to wait for; then none begins, either."""
        harmless = (None,) if pause == "wait" else (None, "generate")
        with self._turn:
            free = self._turn.wait_for(lambda: self._call in harmless and not self._installing, seconds)
            self._installing = self._installing or free
        try:
            yield free
        finally:
            with self._turn:
                self._installing = self._installing and not free
                self._turn.notify_all()

    def _update(self, message: Update) -> Installed:
        """Pause, install on every rank, check the live parameters, drop the caches, commit, resume."""
        with self._alone(message.pause, max(message.seconds, 0.0)) as alone:
            if alone:
                return self._replace_weights(message)
        raise DeadlineError(
            f"the engine was busy for {message.seconds:.1f} s: nothing was installed",
            role="generator",
            rank=self.name,
            version=message.version,
            phase="install",
            todo="a call of generate or score takes longer than sync.deadline_seconds; sync.pause=keep does not wait for it",
        )

    def _replace_weights(self, message: Update) -> Installed:
        start = time.monotonic()
        version = message.version
        where: dict[str, Any] = {"role": "generator", "rank": self.name, "version": version, "phase": "install"}
        if version <= self.version:
            raise StaleVersionError(f"version {version} is not newer than version {self.version}, which is held", **where)
        self.generator.pause(message.pause)
        self.state = "updating"
        try:
            install = max(t.seconds for t in self._ranks("install", message, Timed))
            check = max(t.seconds for t in self._ranks("check", message, Timed))
            self.generator.invalidate_caches()
            self._ranks("commit", message, State)
        except BaseException as error:
            self.state = "dirty"  # and paused: the update that succeeds resumes it
            self._end_held_requests(message.pause)
            if isinstance(error, RlbridgeError):
                error.at(**where)
            raise
        self.generator.version = self.version = version
        self.state = "ready"
        self.generator.resume()
        return Installed(install, check, time.monotonic() - start)

    def _end_held_requests(self, pause: PauseMode) -> None:
        """Nobody can say whether another update comes: the call that they belong to ends, with DirtyError."""
        if pause == "wait":
            return
        try:
            self.generator.pause("abort")
        except Exception:
            _log.exception("%s could not end the requests that it held", self.name)

    def _ranks(self, method: str, message: Update, kind: type[Any]) -> list[Any]:
        payload = msgspec.msgpack.encode([pack(Wait(message.version, 0.0, message.epoch))])
        return [result(reply, kind) for reply in self.generator.on_each_rank(method, payload, None)]

    def _serving(self) -> None:
        if self.state != "ready":
            raise DirtyError(
                f"the engine is {self.state}: it holds no whole version of the weights and serves nothing",
                role="generator",
                rank=self.name,
                version=self.version,
                todo="a sync that succeeds makes it ready again",
            )
