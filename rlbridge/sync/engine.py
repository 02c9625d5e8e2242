"""One engine as the session and the run see it: a `Generator` that never serves torn weights."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import msgspec

from rlbridge.errors import DeadlineError, DirtyError, RlbridgeError, StaleVersionError
from rlbridge.sync.messages import Installed, State, Timed, Wait, answer, pack, result, unpack

if TYPE_CHECKING:
    import numpy as np

    from rlbridge.roles.batch import Completion, Sampling, Sequences
    from rlbridge.roles.generator import Generator


class Engine:
    """Guards a generator: it serves one whole version, or refuses to.

    An engine is "ready", "updating" while its ranks install, or "dirty" when an install did not come to its end on every rank.
    Only a whole sync takes it out of "dirty". Generating and installing exclude one another.
    """

    def __init__(self, name: str, generator: Generator[Any]) -> None:
        self.name = name
        self.generator = generator
        self.state = "ready"
        self.version = 0
        self._busy = threading.Lock()

    def generate(self, prompts: list[list[int]], sampling: Sampling) -> list[Completion]:
        """`Generator.generate` on a whole version.

        Raises:
            DirtyError: the engine holds a mixture of versions.
        """
        with self._busy:
            self._serving()
            return self.generator.generate(prompts, sampling)

    def score(self, sequences: Sequences) -> np.ndarray[Any, Any]:
        """`Generator.score` on a whole version.

        Raises:
            DirtyError: the engine holds a mixture of versions.
        """
        with self._busy:
            self._serving()
            return self.generator.score(sequences)

    def handle(self, method: str, payload: bytes, tensors: dict[str, list[Any]] | None = None) -> list[bytes]:
        """Answer one call of the session: one answer a rank, or a single one for what concerns the engine as a whole."""
        if method == "update":
            return [answer(lambda: self._update(unpack(payload, Wait)))]
        if method == "state":
            return [answer(lambda: State(self.state, self.version))]
        if method == "scramble":
            with self._busy:
                self.state = "dirty"
                return self.generator.on_each_rank(method, payload, tensors)
        return self.generator.on_each_rank(method, payload, tensors)

    def _update(self, message: Wait) -> Installed:
        """Pause, install on every rank, check the live parameters, drop the caches, commit, resume."""
        if not self._busy.acquire(timeout=max(message.seconds, 0.0)):
            raise DeadlineError(
                f"the engine was busy for {message.seconds:.1f} s: nothing was installed",
                role="generator",
                rank=self.name,
                version=message.version,
                phase="install",
                todo="a call of generate or score takes longer than sync.deadline_seconds",
            )
        try:
            return self._replace_weights(message)
        finally:
            self._busy.release()

    def _replace_weights(self, message: Wait) -> Installed:
        start = time.monotonic()
        version = message.version
        where: dict[str, Any] = {"role": "generator", "rank": self.name, "version": version, "phase": "install"}
        if version <= self.version:
            raise StaleVersionError(f"version {version} is not newer than version {self.version}, which is held", **where)
        self.generator.pause("wait")
        self.state = "updating"
        try:
            install = max(t.seconds for t in self._ranks("install", message, Timed))
            check = max(t.seconds for t in self._ranks("check", message, Timed))
            self.generator.invalidate_caches()
            self._ranks("commit", message, State)
        except BaseException as error:
            self.state = "dirty"  # and paused: the update that succeeds resumes it
            if isinstance(error, RlbridgeError):
                error.at(**where)
            raise
        self.generator.version = self.version = version
        self.state = "ready"
        self.generator.resume()
        return Installed(install, check, time.monotonic() - start)

    def _ranks(self, method: str, message: Wait, kind: type[Any]) -> list[Any]:
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
