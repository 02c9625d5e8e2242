"""Trainer ranks and engines of the reference backends in this process, a session between them, and what they work on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from rlbridge.roles.batch import Batch, Sequences, pad_sequences
from rlbridge.roles.generator import GeneratorContext
from rlbridge.roles.trainer import AlgorithmOptions, OptimizerOptions, TrainerContext
from rlbridge.sync.engine import Engine
from rlbridge.sync.messages import TransportSpec
from rlbridge.sync.publisher import Publisher
from rlbridge.sync.session import SyncOptions, SyncSession
from rlbridge_conformance.reference.generator import ReferenceGenerator
from rlbridge_conformance.reference.options import ReferenceGeneratorOptions, ReferenceTrainerOptions
from rlbridge_conformance.reference.trainer import ReferenceTrainer

VOCABULARY = 64


class InProcess:
    """A party of the session that is an object here."""

    actor = None

    def __init__(self, name: str, handle: Callable[[str, bytes], Any]) -> None:
        self.name = name
        self._handle = handle
        self._pool = ThreadPoolExecutor(2)

    def call(self, method: str, payload: bytes, tensors: dict[str, Any] | None = None) -> Future[list[bytes]]:
        def run() -> list[bytes]:
            reply = self._handle(method, payload)
            return [reply] if isinstance(reply, bytes) else reply

        return self._pool.submit(run)

    def tensors(self, version: int, slot: int, sink: str, tensor_transport: str | None) -> Any:
        raise TypeError("no Ray here")

    def close(self) -> None:
        self._pool.shutdown()


class Stage:
    """Trainer ranks and one engine in this process, with a session between them."""

    def __init__(
        self,
        model: Path,
        directory: Path,
        ranks: int,
        tp: int,
        generator: dict[str, Any] | None = None,
        publish: Any = "snapshot",
        served: Path | None = None,
        **options: Any,
    ) -> None:
        self.trainers = make_trainers(model, directory, ranks, **options)
        self.generator = make_generator(served or model, tp=tp, **(generator or {}))
        self.engine = Engine("generator[0]", self.generator)
        self.publishers = [Publisher(f"trainer[{rank}]", trainer.weights()) for rank, trainer in enumerate(self.trainers)]
        self.parties = [InProcess(publisher.name, publisher.handle) for publisher in self.publishers]
        self.parties.append(InProcess("generator[0]", self.engine.handle))
        self.session = SyncSession(
            self.parties[:-1], self.parties[-1:], TransportSpec("reference", {}), SyncOptions(publish, deadline_seconds=10.0)
        )

    def train(self) -> None:
        for trainer in self.trainers:
            trainer.train_step(some_batch())

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        self.session.close()
        for party in self.parties:
            party.close()
        for trainer in self.trainers:
            trainer.close()


def make_trainers(model: Path, directory: Path, ranks: int, **options: Any) -> list[ReferenceTrainer]:
    """All ranks at once, since they may have to meet."""
    with ThreadPoolExecutor(ranks) as pool:
        url = f"file://{directory}/meeting"
        return list(pool.map(lambda rank: make_trainer(model, rank=rank, ranks=ranks, url=url, **options), range(ranks)))


def make_trainer(
    model: Path, *, rank: int = 0, ranks: int = 1, url: str = "", timeout: float = 10.0, **options: Any
) -> ReferenceTrainer:
    chosen = ReferenceTrainerOptions(**options)
    context = TrainerContext(
        rank=rank,
        world_size=ranks,
        device="cpu",
        model_path=str(model),
        seed=7,
        rendezvous=url,
        timeout_seconds=timeout,
        trust_remote_code=False,
        algorithm=AlgorithmOptions(0.2, 0.2, 0.0),
        optimizer=OptimizerOptions(1e-2, (0.9, 0.95), 1e-8, 0.0, 1.0, 0),
        options=chosen.model_dump(),
    )
    trainer = ReferenceTrainer()
    trainer.setup(context, chosen)
    return trainer


def make_generator(model: Path, **options: Any) -> ReferenceGenerator:
    chosen = ReferenceGeneratorOptions(**options)
    generator = ReferenceGenerator()
    generator.setup(GeneratorContext(0, 1, "cpu", str(model), 7, False, chosen.model_dump()), chosen)
    return generator


def some_sequences(*, temperature: float) -> Sequences:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, VOCABULARY, length).tolist() for length in (1, 7, 4, 9)]
    completions = [rng.integers(0, VOCABULARY, length).tolist() for length in (5, 1, 8, 3)]
    return pad_sequences(prompts, completions, temperature=temperature)


def some_batch() -> Batch:
    sequences = some_sequences(temperature=1.0)
    mask_BT = sequences.completion_mask_BT()
    zeros_BT = np.zeros(mask_BT.shape, dtype=np.float32)
    return Batch(sequences, zeros_BT, np.ones(len(mask_BT), np.float32), zeros_BT.astype(np.int32), int(mask_BT.sum()), 1)


def transformers_logprobs(path: Path, sequences: Sequences) -> np.ndarray[Any, Any]:
    tokens_BT = torch.from_numpy(sequences.tokens_BT.astype(np.int64))
    with torch.no_grad():
        logits_BTV = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(tokens_BT).logits
    logprobs_BTV = (logits_BTV[:, :-1] / sequences.temperature).log_softmax(-1)
    found_BT = np.zeros(sequences.tokens_BT.shape, dtype=np.float32)
    found_BT[:, 1:] = logprobs_BTV.gather(-1, tokens_BT[:, 1:, None])[..., 0].numpy()
    return np.where(sequences.completion_mask_BT(), found_BT, 0)
