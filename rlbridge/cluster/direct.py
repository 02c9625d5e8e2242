"""The pattern that Ray made simple, with our backends: `generator.set_weights.remote(trainer.get_weights.remote())`.

One trainer rank, one engine, and Ray Direct Transport in between: the smallest way to put two backends together. A
`SyncSession` is the way for many ranks, for one-sided transfers into registered arenas, and for publishing while training goes
on. Weights are copied when they are got, verified when they arrive, and again when they are installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

import msgspec
import torch

from rlbridge.errors import DigestError, LayoutError
from rlbridge.plugins import registry
from rlbridge.roles.batch import Batch, Completion, Sampling
from rlbridge.roles.generator import Generator, GeneratorContext
from rlbridge.roles.trainer import AlgorithmOptions, OptimizerOptions, Trainer, TrainerContext
from rlbridge.roles.transport import Copy
from rlbridge.sync.engine import Engine
from rlbridge.sync.messages import (
    Connect,
    Described,
    Installed,
    Nothing,
    Opened,
    OpenSink,
    Pull,
    Pulled,
    Record,
    Timed,
    TransportSpec,
    Update,
    Verify,
    Wait,
    pack,
    result,
)
from rlbridge.weights.digest import digests
from rlbridge.weights.layout import Layout, TensorMeta, whole
from rlbridge.weights.plan import Plan, compile_plan

_SECONDS = 60.0


class Weights(TypedDict):
    """What `get_weights` returns: a version of every checkpoint tensor, and a digest of each."""

    version: int
    tensors: dict[str, torch.Tensor]
    aliases: dict[str, str]
    digests: dict[str, bytes]


class DirectTrainer:
    """A trainer backend as one Ray actor: decorate `get_weights` with `@ray.method(tensor_transport=...)` in a subclass.

    Args:
        backend: Name of the trainer backend.
        model_path: A Hugging Face model directory.
        rendezvous: "tcp://host:port", free on the node, for the backend's process group.
        lr: Learning rate of AdamW.
    """

    def __init__(self, backend: str, model_path: str, rendezvous: str, lr: float = 1e-4, device: str = "cpu") -> None:
        self._trainer: Trainer[Any] = registry().load("trainer", backend)()
        options = registry().options_model("trainer", backend)(backend=backend)
        context = TrainerContext(
            rank=0,
            world_size=1,
            device=device,
            model_path=str(Path(model_path).absolute()),
            seed=0,
            rendezvous=rendezvous,
            timeout_seconds=_SECONDS,
            trust_remote_code=False,
            algorithm=AlgorithmOptions(0.2, 0.2, 0.0),
            optimizer=OptimizerOptions(lr, (0.9, 0.95), 1e-8, 0.0, 1.0, 0),
            options=options.model_dump(mode="json"),
        )
        self._trainer.setup(context, options)
        self._source = self._trainer.weights()
        self._layout = self._source.layout()
        self._source.bind(self._layout.regions)
        self._version = 0
        self._device = device

    def train_step(self, batch: Batch) -> dict[str, float]:
        """`Trainer.train_step`."""
        return self._trainer.train_step(batch)

    def get_weights(self) -> Weights:
        """The current weights, copied: training may go on while they are read."""
        metas = self._layout.meta()
        taken = {
            region.tensor: torch.empty(region.shape, dtype=getattr(torch, metas[region.tensor].dtype), device=self._device)
            for region in self._layout.regions
        }
        missing = [m.name for m in self._layout.tensors if m.alias_of is None and m.name not in taken]
        if missing or any(whole(metas[r.tensor]) != r for r in self._layout.regions):
            raise LayoutError(
                "get_weights needs a trainer whose one rank holds every tensor whole", tensor=(missing or [None])[0]
            )
        self._source.snapshot([taken[region.tensor] for region in self._layout.regions])
        self._version += 1
        return Weights(
            version=self._version,
            tensors=taken,
            aliases={m.name: m.alias_of for m in self._layout.tensors if m.alias_of is not None},
            digests=dict(zip(taken, digests(list(taken.values())), strict=True)),
        )


class DirectGenerator:
    """A generator backend as one Ray actor with `set_weights`."""

    def __init__(self, backend: str, model_path: str, device: str = "cpu") -> None:
        generator: Generator[Any] = registry().load("generator", backend)()
        options = registry().options_model("generator", backend)(backend=backend)
        path = str(Path(model_path).absolute())
        generator.setup(GeneratorContext(0, 1, device, path, 0, False, options.model_dump(mode="json")), options)
        self._engine = Engine("generator[0]", generator)
        self._plan: Plan | None = None

    def generate(self, prompts: list[list[int]], sampling: Sampling) -> list[Completion]:
        """`Generator.generate`, refused while the weights are torn."""
        return self._engine.generate(prompts, sampling)

    def set_weights(self, weights: Weights) -> int:
        """Verify what arrived, install it, verify what is installed. Returns the version that is served.

        Raises:
            DigestError: a tensor is not what the trainer sent; nothing is installed.
            LayoutError: the trainer's tensors are not those that this engine needs.
        """
        tensors, version = weights["tensors"], weights["version"]
        arrived = digests(list(tensors.values()))
        for name, found in zip(tensors, arrived, strict=True):
            if found != weights["digests"][name]:
                raise DigestError("a tensor changed on its way", tensor=name, version=version, phase="wire", role="generator")
        plan = self._plan or self._attach(tensors, weights["aliases"])
        parts = plan.sinks[0].parts
        boxes = [_box(tensors, part.region.tensor, part.region.offset, part.region.shape, part.dtype) for part in parts]
        by_segment = {part.segment: box for part, box in zip(parts, boxes, strict=True)}
        self._each(
            "start_pull", Pull(version, 0, _SECONDS), Nothing, {"trainer[0]": [b.view(-1).view(torch.uint8) for b in boxes]}
        )
        self._each("wait_pull", Wait(version, _SECONDS), Pulled)
        joined = b"".join(digests([by_segment[i] for i in range(len(plan.sources[0].segments))]))
        self._each("verify", Verify(version, [joined]), Timed)
        result(self._engine.handle("update", pack(Update(version, _SECONDS)))[0], Installed)
        return self._engine.version

    def _attach(self, tensors: Mapping[str, torch.Tensor], aliases: Mapping[str, str]) -> Plan:
        metas = [TensorMeta(n, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in tensors.items()]
        described = {m.name: m for m in metas}
        metas += [msgspec.structs.replace(described[of], name=name, alias_of=of) for name, of in aliases.items()]
        layout = Layout(metas, [whole(m) for m in metas if m.alias_of is None])
        recorded = self._each("record", Record(metas), Described)
        if len(recorded) != 1:
            raise LayoutError(f"set_weights is for engines of one rank, this one has {len(recorded)}", todo="use a SyncSession")
        plan = compile_plan([layout], [recorded[0].layout])
        share = plan.sinks[0]
        self._each("open", OpenSink(1, TransportSpec("object_store", {"backend": "object_store"}), share), Opened)
        copies = [Copy("trainer[0]", recorded[0].name, 0, 0, 0, 0, p.offset, p.nbytes) for p in share.parts]
        self._each("connect", Connect({}, copies), Timed)
        self._plan = plan
        return plan

    def _each(self, method: str, message: object, kind: type[Any], tensors: dict[str, list[Any]] | None = None) -> list[Any]:
        payload = msgspec.msgpack.encode([pack(message)])
        return [result(reply, kind) for reply in self._engine.handle(method, payload, tensors)]


def _box(
    tensors: Mapping[str, torch.Tensor], name: str, offset: tuple[int, ...], shape: tuple[int, ...], dtype: str
) -> torch.Tensor:
    index = tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))
    return tensors[name][index].to(getattr(torch, dtype)).contiguous()
