"""One engine as the session and the run see it: a `Generator` that never serves torn weights."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import msgspec

from rlbridge.errors import DirtyError, RlbridgeError
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
            return [answer(lambda: self._update(unpack(payload, Wait).version))]
        if method == "state":
            return [answer(lambda: State(self.state, self.version))]
        if method == "scramble":
            self.state = "dirty"
        return self.generator.on_each_rank(method, payload, tensors)

    def _update(self, version: int) -> Installed:
        """Pause, install on every rank, check the live parameters, drop the caches, commit, resume."""
        with self._busy:
            start = time.monotonic()
            self.generator.pause("wait")
            self.state = "updating"
            try:
                install = max(t.seconds for t in self._ranks("install", version, Timed))
                check = max(t.seconds for t in self._ranks("check", version, Timed))
                self.generator.invalidate_caches()
                self._ranks("commit", version, State)
            except BaseException as error:
                self.state = "dirty"
                if isinstance(error, RlbridgeError):
                    raise error.at(role="generator", peer=self.name, version=version, phase="install") from error
                raise
            self.generator.version = self.version = version
            self.state = "ready"
            self.generator.resume()
            return Installed(install, check, time.monotonic() - start)

    def _ranks(self, method: str, version: int, kind: type[Any]) -> list[Any]:
        replies = self.generator.on_each_rank(method, msgspec.msgpack.encode([pack(Wait(version, 0.0))]), None)
        return [result(reply, kind) for reply in replies]

    def _serving(self) -> None:
        if self.state != "ready":
            raise DirtyError(
                f"the engine is {self.state}: it holds no whole version of the weights and serves nothing",
                role="generator",
                rank=self.name,
                version=self.version,
                todo="a sync that succeeds makes it ready again",
            )


