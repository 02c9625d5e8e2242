"""A trainer's weights and an engine of vLLM in one test process, with a session and NIXL between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from rlbridge.huggingface.checkpoint import checkpoint_pieces, module_tensors
from rlbridge.roles.batch import Completion, Sampling
from rlbridge.roles.generator import GeneratorContext
from rlbridge.roles.source import ShardedSource
from rlbridge.sync.engine import Engine
from rlbridge.sync.messages import Nothing, TransportSpec, pack, result
from rlbridge.sync.publisher import Publisher
from rlbridge.sync.session import SyncOptions, SyncSession
from rlbridge.weights.layout import TensorMeta
from rlbridge_vllm.generator import VllmGenerator
from rlbridge_vllm.options import VllmGeneratorOptions
from tests.here import Here
from tests.vllm.inside import models


class Bridge:
    """A model that a test may change, and the engine that has loaded it."""

    def __init__(self, path: Path, kind: str, **options: Any) -> None:
        self.path, self.model, self.version = path, models.make(path, kind), 0
        self.generator = started(path, **options)
        self.engine = Engine("generator[0]", self.generator)
        tensors, pieces = checkpoint_pieces(self.model)
        source = ShardedSource(tensors, pieces, lambda: module_tensors(self.model))
        self._publisher = Publisher("trainer[0]", source)
        self.session = self.session_with()

    def sync(self, **options: Any) -> Any:
        """Bring the model's weights to the engine, as the next version; `options` are those of the session."""
        if options:
            self.session.close()
            self.session = self.session_with(**options)
        self.version += 1
        return self.session.sync(self.version)

    def say(self, prompts: list[list[int]], **sampling: Any) -> list[Completion]:
        """Completions, greedy unless `sampling` says otherwise."""
        return self.engine.generate(prompts, Sampling(**{"max_tokens": 12, "temperature": 0.0, **sampling}))

    def published(self) -> list[TensorMeta]:
        """What the trainer publishes."""
        return checkpoint_pieces(self.model)[0]

    def checksums(self) -> list[dict[str, str]]:
        """vLLM's own, of every parameter of each rank."""
        return self.generator._serving.rpc("compute_weight_checksums", (), 60.0)

    def scramble(self) -> None:
        """Fill the engine's parameters with what are no weights."""
        for reply in self.engine.handle("scramble", msgspec.msgpack.encode([pack(Nothing())])):
            result(reply, Nothing)

    def close(self) -> None:
        """End the session and the engine."""
        self.session.close()
        self.generator.close()

    def session_with(self, **options: Any) -> SyncSession:
        """Another session between the two."""
        trainer = Here("trainer[0]", lambda *call: [self._publisher.handle(*call)])
        engine = Here("generator[0]", self.engine.handle)
        return SyncSession([trainer], [engine], TransportSpec("nixl", {"backend": "nixl"}), SyncOptions(**options))


def started(path: Path, **options: Any) -> VllmGenerator:
    """An engine on a CPU, with a small cache."""
    chosen = VllmGeneratorOptions(**{"backend": "vllm", "kv_cache_gib": 0.05, **options})
    generator = VllmGenerator()
    generator.setup(GeneratorContext(0, 1, "cpu", str(path), 0, False, chosen.model_dump()), chosen)
    return generator
