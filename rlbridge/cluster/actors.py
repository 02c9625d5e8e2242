"""The Ray actors: one a trainer rank, one an engine. All that they say is bytes, and errors are ours on both sides."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any, ClassVar

import ray

from rlbridge.errors import SyncError
from rlbridge.plugins import registry
from rlbridge.roles.batch import Batch, Completion, Sampling, Sequences, decode, encode
from rlbridge.roles.generator import Generator, GeneratorContext
from rlbridge.roles.trainer import Trainer, TrainerContext
from rlbridge.sync.engine import Engine
from rlbridge.sync.messages import Nothing, answer
from rlbridge.sync.publisher import Publisher


class TrainerActor:
    """One trainer rank. Calls run one after the other, so a version is published between two steps, never within one."""

    publisher: ClassVar[type[Publisher]] = Publisher

    def __init__(self, backend: str) -> None:
        self._backend = backend
        self._trainer: Trainer[Any] | None = None
        self._publisher: Publisher | None = None

    def rendezvous(self, loopback: bool) -> str:
        """A free "tcp://host:port" on this node, for torch.distributed."""
        host = "127.0.0.1" if loopback else ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((host, 0))
            return f"tcp://{host}:{probe.getsockname()[1]}"

    def setup(self, context: bytes) -> bytes:
        """Load the backend and the model."""

        def run() -> Nothing:
            told = decode(context, TrainerContext)
            trainer = registry().load("trainer", self._backend)()
            trainer.setup(told, registry().options_model("trainer", self._backend).model_validate(told.options))
            self._trainer = trainer
            self._publisher = self.publisher(f"trainer[{told.rank}]", trainer.weights(), told.device)
            return Nothing()

        return answer(run)

    def train_step(self, batch: bytes) -> bytes:
        """`Trainer.train_step`; refused while a barrier publish is being read."""

        def run() -> dict[str, float]:
            self._publishing().may_train()
            return self._training().train_step(decode(batch, Batch))

        return answer(run)

    def score(self, sequences: bytes) -> bytes:
        """`Trainer.score`."""
        return answer(lambda: encode(self._training().score(decode(sequences, Sequences))))

    def save(self, path: str) -> bytes:
        """`Trainer.save`."""
        return answer(lambda: self._training().save(Path(path)))

    def save_state(self, path: str) -> bytes:
        """`Trainer.save_state`."""
        return answer(lambda: self._training().save_state(Path(path)))

    def load_state(self, path: str) -> bytes:
        """`Trainer.load_state`."""
        return answer(lambda: self._training().load_state(Path(path)))

    def call(self, method: str, payload: bytes) -> list[bytes]:
        """`Publisher.handle`."""
        return [self._publishing().handle(method, payload)]

    def tensors(self, version: int, slot: int, sink: str) -> list[Any]:
        """`Publisher.tensors`, to be carried by Ray."""
        return self._publishing().tensors(version, slot, sink)

    def close(self) -> bytes:
        """`Trainer.close`."""
        return answer(lambda: self._training().close())

    def _training(self) -> Trainer[Any]:
        if self._trainer is None:
            raise SyncError("the trainer is not set up", role="trainer")
        return self._trainer

    def _publishing(self) -> Publisher:
        if self._publisher is None:
            raise SyncError("the trainer is not set up", role="trainer")
        return self._publisher


class GeneratorActor:
    """One engine. Syncing has threads of its own, so bytes arrive while the engine generates."""

    engine: ClassVar[type[Engine]] = Engine

    def __init__(self, backend: str) -> None:
        self._backend = backend
        self._engine: Engine | None = None

    def setup(self, context: bytes) -> bytes:
        """Load the backend and the model."""

        def run() -> Nothing:
            told = decode(context, GeneratorContext)
            generator: Generator[Any] = registry().load("generator", self._backend)()
            generator.setup(told, registry().options_model("generator", self._backend).model_validate(told.options))
            self._engine = self.engine(f"generator[{told.engine}]", generator)
            return Nothing()

        return answer(run)

    def generate(self, prompts: list[list[int]], sampling: bytes) -> bytes:
        """`Engine.generate`."""

        def run() -> list[Completion]:
            return self._serving().generate(prompts, decode(sampling, Sampling))

        return answer(run)

    def score(self, sequences: bytes) -> bytes:
        """`Engine.score`."""
        return answer(lambda: encode(self._serving().score(decode(sequences, Sequences))))

    @ray.method(concurrency_group="sync")  # type: ignore[untyped-decorator]
    def call(self, method: str, payload: bytes, names: list[str], *tensors: list[Any]) -> list[bytes]:
        """`Engine.handle`; `tensors` are top-level arguments, one for each of `names`, so that Ray brings them here."""
        if self._engine is None:
            return [answer(self._serving)]
        return self._engine.handle(method, payload, dict(zip(names, tensors, strict=True)))

    def close(self) -> bytes:
        """`Generator.close`."""
        return answer(lambda: self._serving().generator.close())

    def _serving(self) -> Engine:
        if self._engine is None:
            raise SyncError("the engine is not set up", role="generator")
        return self._engine
