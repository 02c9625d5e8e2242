"""A trainer's weights and an SGLang engine in one test process, with a session and NIXL between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from rlbridge.roles.generator import GeneratorContext
from rlbridge.roles.source import ShardedSource
from rlbridge.sync.engine import Engine
from rlbridge.sync.messages import Digests, Nothing, TransportSpec, pack, result
from rlbridge.sync.publisher import Publisher
from rlbridge.sync.session import SyncOptions, SyncSession
from rlbridge.weights.layout import Piece, TensorMeta, contiguous_strides, whole
from rlbridge_sglang.generator import SglangGenerator
from rlbridge_sglang.options import SglangGeneratorOptions
from tests.here import Here
from tests.sglang.inside import models


class Bridge:
    """A model that a test may change, and the engine that has loaded it."""

    def __init__(self, path: Path, kind: str, **options: Any) -> None:
        self.path, self.model, self.version = path, models.make(path, kind), 0
        self.generator = started(path, **options)
        self.engine = Engine("generator[0]", self.generator)
        self.session = self._session(SyncOptions())
        self.scramble()  # so that what no sync writes shows in every test
        self.sync()

    def sync(self, **options: Any) -> Any:
        """Bring the model's weights to the engine, as the next version."""
        if options:
            self.session.close()
            self.session = self._session(SyncOptions(**options))
        self.version += 1
        return self.session.sync(self.version)

    def digests(self) -> bytes:
        """Of what is served, rank by rank."""
        replies = self.engine.handle("live_digests", msgspec.msgpack.encode([pack(Nothing())]))
        return b"".join(result(reply, Digests).joined for reply in replies)

    def scramble(self) -> None:
        """Fill the engine's parameters with what are no weights."""
        for reply in self.engine.handle("scramble", msgspec.msgpack.encode([pack(Nothing())])):
            result(reply, Nothing)

    def published(self) -> list[TensorMeta]:
        """What the trainer publishes."""
        tensors = models.checkpoint(self.model)
        metas = [TensorMeta(name, tuple(t.shape), "float32") for name, t in tensors.items()]
        if self.model.config.tie_word_embeddings:
            embeddings = next(meta for meta in metas if "embed_tokens" in meta.name)
            metas.append(TensorMeta("lm_head.weight", embeddings.shape, "float32", alias_of=embeddings.name))
        return metas

    def close(self) -> None:
        """End the session and the engine."""
        self.session.close()
        self.generator.close()

    def _session(self, options: SyncOptions) -> SyncSession:
        metas = self.published()
        pieces = [Piece(whole(m), m.name, 0, contiguous_strides(m.shape)) for m in metas if m.alias_of is None]
        publisher = Publisher("trainer[0]", ShardedSource(metas, pieces, lambda: models.checkpoint(self.model)))
        parties = Here("trainer[0]", lambda *call: [publisher.handle(*call)]), Here("generator[0]", self.engine.handle)
        return SyncSession(parties[:1], parties[1:], TransportSpec("nixl", {"backend": "nixl"}), options)


def started(path: Path, **options: Any) -> SglangGenerator:
    """An engine on a CPU, with small caches."""
    chosen = SglangGeneratorOptions(backend="sglang", cache_tokens=4096, running_requests=16, **options)
    generator = SglangGenerator()
    generator.setup(GeneratorContext(0, 1, "cpu", str(path), 0, False, chosen.model_dump()), chosen)
    return generator
