"""A small model that has every awkward tensor, sharded on the trainer's side and fused and sliced on the engine's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from rlbridge.roles.batch import Completion, Sampling, Sequences
from rlbridge.roles.generator import Generator, GeneratorContext, GeneratorOptions
from rlbridge.roles.sink import RecordedSink
from rlbridge.roles.source import ShardedSource
from rlbridge.sync.engine import Engine
from rlbridge.sync.publisher import Publisher
from rlbridge.sync.subscriber import Subscriber
from rlbridge.weights.layout import Piece, Region, TensorMeta, contiguous_strides, flat_boxes

HIDDEN, HEADS, HEAD, VOCAB = 24, 4, 6, 40

SHAPES: dict[str, tuple[int, ...]] = {
    "embed": (VOCAB, HIDDEN),
    "q": (HEADS * HEAD, HIDDEN),
    "k": (HEADS * HEAD, HIDDEN),
    "v": (HEADS * HEAD, HIDDEN),
    "o": (HIDDEN, HEADS * HEAD),
    "norm": (HIDDEN,),
    "scale": (),
    "empty": (0, HIDDEN),
}


BULK = 1024
"""Columns of the tensor that makes a transfer long, where one is asked for."""


def shapes(bulk: int = 0) -> dict[str, tuple[int, ...]]:
    """Every tensor, and "bulk" with `bulk` rows."""
    return SHAPES | ({"bulk": (bulk, BULK)} if bulk else {})


def weights(seed: int, dtype: torch.dtype = torch.float32, bulk: int = 0) -> dict[str, torch.Tensor]:
    """The full tensors that `seed` stands for."""
    made = torch.Generator().manual_seed(seed)
    found = {name: torch.randn(shape, generator=made).to(dtype) for name, shape in SHAPES.items()}
    return found | ({"bulk": torch.full((bulk, BULK), float(seed), dtype=dtype)} if bulk else {})


class ToySource:
    """A trainer rank: holds rows (or a flat range) of each tensor, and answers as a publisher.

    Args:
        rank: This rank of `ranks`.
        flat: Whether the shards are flat ranges, as ZeRO-3 cuts them, and not rows.
        bulk: Rows of the tensor that makes a transfer long.
    """

    def __init__(self, rank: int, ranks: int, *, flat: bool = False, dtype: torch.dtype = torch.float32, bulk: int = 0) -> None:
        self.rank, self.ranks, self.flat, self.dtype, self.bulk = rank, ranks, flat, dtype, bulk
        self.shards: dict[str, torch.Tensor] = {}
        self.load(0)
        metas = [TensorMeta(n, s, str(dtype).removeprefix("torch.")) for n, s in shapes(bulk).items()]
        metas.append(TensorMeta("head", SHAPES["embed"], metas[0].dtype, alias_of="embed"))
        self.publisher = Publisher(f"trainer[{rank}]", ShardedSource(metas, self._pieces(), lambda: self.shards))

    def handle(self, method: str, payload: bytes) -> bytes:
        return self.publisher.handle(method, payload)

    def load(self, seed: int) -> None:
        """Put the weights of `seed` into the shards, in place."""
        for name, full in weights(seed, self.dtype, self.bulk).items():
            start, stop = self._range(name)
            shard = full.reshape(-1)[start:stop]
            if name in self.shards:
                self.shards[name].copy_(shard)
            else:
                self.shards[name] = shard.clone()

    def add(self, value: float) -> None:
        """Change every weight, as an optimizer does."""
        self.publisher.may_train()
        for shard in self.shards.values():
            shard.add_(value)

    def apply(self, function: Callable[..., Any], *args: Any) -> Any:
        """What `function` returns of this object, in this process."""
        return function(self, *args)

    def _range(self, name: str) -> tuple[int, int]:
        shape = shapes(self.bulk)[name]
        full = torch.Size(shape).numel()
        if not shape:
            return (0, 1) if self.rank == 0 else (0, 0)
        unit = 1 if self.flat else full // shape[0] if shape[0] else 1
        rows = -(-(full // max(unit, 1)) // self.ranks) * unit
        return min(self.rank * rows, full), min((self.rank + 1) * rows, full)

    def _pieces(self) -> list[Piece]:
        pieces = []
        for name, shape in shapes(self.bulk).items():
            start, stop = self._range(name)
            for offset, box, flat in flat_boxes(shape, start, stop):
                pieces.append(Piece(Region(name, offset, box), name, flat - start, contiguous_strides(shape)))
        return pieces


class ToyGenerator(Generator[GeneratorOptions]):
    """An engine of `tp` ranks in one process: fused q, k, v, cut by heads; the output projection cut on dimension 1.

    "head" is tied to "embed"; `doubled` is derived from the norm of each rank, and refreshed after an install.
    """

    def __init__(self, name: str, tp: int = 1, dtype: torch.dtype = torch.float32, bulk: int = 0) -> None:
        self.parameters = [_parameters(tp, dtype, bulk) for _ in range(tp)]
        self.doubled = [torch.zeros(HIDDEN, dtype=dtype) for _ in range(tp)]
        self.fail_install = self.skip_install = False
        self.subscribers = [Subscriber(f"{name}.rank[{rank}]", _FailingSink(self, rank, tp), rank=rank) for rank in range(tp)]
        self.invalidated = 0

    def setup(self, context: GeneratorContext, options: GeneratorOptions) -> None:
        """Nothing to load: the weights are zeros until a sync."""

    def generate(self, prompts: list[list[int]], sampling: Sampling) -> list[Completion]:
        """The version as tokens."""
        return [Completion([self.version], [0.0], [self.version], "length") for _ in prompts]

    def score(self, sequences: Sequences) -> Any:
        """Zeros."""
        return sequences.tokens_BT * 0.0

    def on_each_rank(self, method: str, payload: bytes, tensors: dict[str, list[Any]] | None = None) -> list[bytes]:
        return [s.handle(method, payload, tensors) for s in self.subscribers]

    def invalidate_caches(self) -> None:
        self.invalidated += 1

    def full(self) -> dict[str, torch.Tensor]:
        """The checkpoint tensors put together again out of the ranks' parameters, by hand and not by the plan."""
        ps = self.parameters
        rows = HEADS * HEAD // len(ps)
        found = {name: torch.cat([p["qkv"][i * rows : (i + 1) * rows] for p in ps]) for i, name in enumerate(("q", "k", "v"))}
        found |= {"embed": torch.cat([p["embed"] for p in ps]), "o": torch.cat([p["o"] for p in ps], 1)}
        return found | {n: ps[0][n] for n in ("norm", "scale", "empty", "bulk") if n in ps[0]}


class ToyEngine:
    """A `ToyGenerator` behind the guard, as a party in a process of its own."""

    def __init__(self, index: int, tp: int = 1, dtype: torch.dtype = torch.float32, bulk: int = 0) -> None:
        self.bulk = bulk
        self.generator = ToyGenerator(f"generator[{index}]", tp, dtype, bulk)
        self.engine = Engine(f"generator[{index}]", self.generator)

    def handle(self, method: str, payload: bytes) -> list[bytes]:
        return self.engine.handle(method, payload)

    def matches(self, seed: int, added: float = 0.0, dtype: torch.dtype = torch.float32) -> bool:
        """Whether the parameters are bit for bit what a trainer in `dtype` holds of `seed` plus `added`, rounded to theirs."""
        expected = {n: t + added if added else t for n, t in weights(seed, dtype, self.bulk).items()}
        found = self.generator.full()
        return all(torch.equal(found[n], t.to(found[n].dtype)) for n, t in expected.items())

    def refreshed(self) -> bool:
        """Whether what is derived from the parameters, or tied to them, fits them."""
        pairs = zip(self.generator.parameters, self.generator.doubled, strict=True)
        return all(torch.equal(d, p["norm"] * 2) and torch.equal(p["head"], p["embed"]) for p, d in pairs)

    def served(self) -> int:
        """The version that generating with the engine shows; raises DirtyError like any generate."""
        return self.engine.generate([[1]], Sampling(max_tokens=1))[0].versions[0]

    def scored(self) -> Any:
        """What scoring with the engine gives; raises DirtyError like any score."""
        one = np.zeros((1, 2), dtype=np.int64)
        return self.engine.score(Sequences(one, np.ones(1, dtype=np.int64), np.ones(1, dtype=np.int64)))

    def break_install(self, fail: bool) -> None:
        """Make the next installs fail half-way."""
        self.generator.fail_install = fail

    def skip_install(self, skip: bool) -> None:
        """Make the next installs leave out a tensor, and say nothing."""
        self.generator.skip_install = skip

    def apply(self, function: Callable[..., Any], *args: Any) -> Any:
        """What `function` returns of this object, in this process."""
        return function(self, *args)

    def flip_arena_byte(self) -> None:
        """Corrupt a byte that has arrived, before it is verified."""
        arena = self.generator.subscribers[0]._arena
        assert arena is not None
        arena.tensor[arena.nbytes // 2] ^= 1


class _FailingSink(RecordedSink):
    """A recorded sink whose install can be made to stop half-way, or to leave something out."""

    def __init__(self, generator: ToyGenerator, rank: int, tp: int) -> None:
        self._generator = generator
        self._last = rank == tp - 1  # the ranks before it have installed all of the version by then
        parameters = generator.parameters[rank]

        def refresh() -> None:
            torch.mul(parameters["norm"], 2, out=generator.doubled[rank])

        super().__init__(lambda tensors: _load(parameters, tensors, rank, tp), parameters, refresh)

    def install(self, sources: Any) -> None:
        if self._generator.fail_install and self._last:
            self._views[0].copy_(sources[0])
            raise RuntimeError("the install stopped half-way")
        kept = self._views[-1].clone()
        super().install(sources)
        if self._generator.skip_install:
            self._views[-1].copy_(kept)


def _parameters(tp: int, dtype: torch.dtype, bulk: int) -> dict[str, torch.Tensor]:
    held: dict[str, tuple[int, ...]] = {
        "embed": (VOCAB // tp, HIDDEN),
        "qkv": (3 * HEADS * HEAD // tp, HIDDEN),
        "o": (HIDDEN, HEADS * HEAD // tp),
        "norm": (HIDDEN,),
        "scale": (),
        "empty": (0, HIDDEN),
    }
    if bulk:
        held["bulk"] = (bulk, BULK)
    made = {name: torch.zeros(shape, dtype=dtype) for name, shape in held.items()}
    return made | {"head": made["embed"]}


def _load(parameters: dict[str, torch.Tensor], tensors: Iterable[tuple[str, torch.Tensor]], rank: int, tp: int) -> None:
    rows = HEADS * HEAD // tp
    for name, tensor in tensors:
        if name in ("q", "k", "v"):
            place = parameters["qkv"].narrow(0, "qkv".index(name) * rows, rows)
            place.copy_(tensor.view(HEADS, HEAD, HIDDEN).chunk(tp)[rank].reshape(rows, HIDDEN))
        elif name == "o":
            parameters["o"].copy_(tensor.narrow(1, rank * rows, rows))
        elif name in ("embed", "head"):
            parameters[name].copy_(tensor.chunk(tp)[rank])
        else:
            parameters[name].copy_(tensor)
