"""Weights that vLLM loads anew: where its kernels keep them in another form (FP8, experts on GPUs, packed weights on CPUs).

Each rank gets whole tensors, and vLLM's own layerwise reload cuts, converts and packs them into the storage that it had. That
is vLLM's public weight transfer (start, update, finish), all within one call of the rank: between start and finish the
parameters have no memory, and a step of the engine would end it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo

from rlbridge.errors import LayoutError
from rlbridge.roles.sink import WeightSink
from rlbridge.weights.digest import digests
from rlbridge.weights.layout import Layout, Region, TensorMeta, whole
from rlbridge.weights.model_files import Checkpoint

Weights = Callable[[], Iterator[tuple[str, torch.Tensor]]]

_SCRAMBLED = 7
_PLAIN = ("float64", "float32", "float16", "bfloat16")


@dataclass
class ReloadInit(WeightTransferInitInfo):  # type: ignore[misc]
    """Nothing has to be known before the first update."""


@dataclass
class ReloadUpdate(WeightTransferUpdateInfo):  # type: ignore[misc]
    """The weights, by their names in the checkpoint. They are of this process: an update never crosses to another."""

    weights: Weights | None = None


class ReloadEngine(WeightTransferEngine[ReloadInit, ReloadUpdate]):  # type: ignore[misc]
    """Loads weights as vLLM loads a checkpoint, layer by layer, into the memory that the kernels use."""

    init_info_cls = ReloadInit
    update_info_cls = ReloadUpdate

    def init_transfer_engine(self, init_info: ReloadInit) -> None:
        """Nothing to do."""

    def start_weight_update(self) -> None:
        """Take the parameters' memory away until their layer is complete."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: ReloadUpdate) -> None:
        """Load all of the weights."""
        assert update_info.weights is not None
        with torch.no_grad():
            self.model.load_weights(update_info.weights())

    def finish_weight_update(self) -> None:
        """Complete what is left, and give it back its memory."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Nothing to free."""


class StreamedSink(WeightSink):
    """Takes whole tensors and lets vLLM load them.

    What kernels hold then cannot be compared with what was sent. So `live` shows what vLLM was given to load, and only as long
    as that is still there: until the next version begins to arrive. That vLLM makes of it what it should is looked at once,
    with the weights that it has just loaded: loaded again they have to become the same bytes. Log-probs have to show the rest.

    Args:
        worker: vLLM's worker, with `ReloadEngine` as its weight transfer, and a model that is just loaded.
        checkpoint: What its model was loaded from: the tensors that have to come.

    Raises:
        LayoutError: vLLM makes something else of the same weights when it loads them again.
    """

    def __init__(self, worker: Any, checkpoint: Checkpoint) -> None:
        self._worker, self._checkpoint = worker, checkpoint
        self._dtype: torch.dtype = worker.model_config.dtype
        self._wide = self._kept_wide()
        self._tensors: list[TensorMeta] = []
        self._boxes: list[tuple[str, Region]] = []
        self._given: Sequence[torch.Tensor] | None = None
        self._check_that_vllm_loads_again()

    def record(self, tensors: Sequence[TensorMeta]) -> Layout:
        self._checkpoint.check_shapes(tensors)
        names, aliases = {meta.name for meta in tensors}, {meta.name for meta in tensors if meta.alias_of}
        wanted = {meta.name for meta in self._checkpoint.tensors()}
        if missing := wanted - names:
            raise LayoutError("the trainer does not publish this tensor of the engine's model", tensor=min(missing))
        if surplus := names - wanted - aliases:
            raise LayoutError("the engine's model has no such tensor", tensor=min(surplus))
        self._tensors = [TensorMeta(t.name, t.shape, self._served(t), t.alias_of) for t in tensors]
        return Layout(self._tensors, [whole(meta) for meta in self._tensors if meta.alias_of is None])

    def bind(self, regions: Sequence[tuple[int, Region]]) -> None:
        own = [meta.name for meta in self._tensors if meta.alias_of is None]
        self._boxes = [(own[index], region) for index, region in regions]
        self._given = None

    def install(self, sources: Sequence[torch.Tensor]) -> None:
        self._given = None
        self._load(lambda: self._weights(sources))
        self._given = list(sources)

    def live(self) -> list[torch.Tensor]:
        if self._given is None:
            raise LayoutError(
                "vLLM keeps its weights in the form of its kernels, and what they were loaded from is no longer there",
                todo="look at a version between its install and the next pull; log-probs can be compared at any time",
            )
        return list(self._given)

    def scramble(self) -> None:
        if not self._boxes:
            raise LayoutError("no epoch is open: nothing has told the shapes of the weights to scramble")
        shapes = [(region.shape, self._meta(name)) for name, region in self._boxes]
        device = self._worker.device
        self.install([torch.full(s, _SCRAMBLED, device=device).to(getattr(torch, meta.dtype)) for s, meta in shapes])

    def arena_changes(self) -> None:
        """New bytes arrive where those lie that were installed."""
        self._given = None

    def _load(self, weights: Weights) -> None:
        self._worker.start_weight_update()
        self._worker.update_weights({"weights": weights})
        self._worker.finish_weight_update()

    def _check_that_vllm_loads_again(self) -> None:
        parameters = dict(self._worker.get_model().named_parameters())
        before = digests([parameter.data for parameter in parameters.values()])
        device = self._worker.device
        self._load(lambda: ((meta.name, self._checkpoint.read(meta.name).to(device)) for meta in self._checkpoint.tensors()))
        parameters = dict(self._worker.get_model().named_parameters())
        after = digests([parameter.data for parameter in parameters.values()])
        changed = [name for name, was, now in zip(parameters, before, after, strict=True) if was != now]
        if changed:
            raise LayoutError(
                f"vLLM makes something else of its own weights when it loads them again: {len(changed)} parameters differ, the"
                f" first is {changed[0]!r}",
                role="generator",
                tensor=changed[0],
                todo="weights of this model cannot be replaced in this vLLM; is there another backend for its kernels?",
            )

    def _weights(self, sources: Sequence[torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor by each of its names. One that arrives in several boxes is put together."""
        parts: dict[str, list[tuple[Region, torch.Tensor]]] = {}
        for (name, region), source in zip(self._boxes, sources, strict=True):
            parts.setdefault(name, []).append((region, source))
        names: dict[str, list[str]] = {}
        for meta in self._tensors:
            names.setdefault(meta.alias_of or meta.name, []).append(meta.name)
        for own, called in names.items():
            tensor = _joined(self._meta(own), parts.get(own, []), self._worker.device)
            for name in called:
                yield name, tensor

    def _meta(self, name: str) -> TensorMeta:
        return next(meta for meta in self._tensors if meta.name == name)

    def _served(self, meta: TensorMeta) -> str:
        """The dtype that vLLM is given: that of the model, except for what is wider, or no plain floating-point number."""
        if meta.dtype not in _PLAIN:
            return meta.dtype
        published, wide = getattr(torch, meta.dtype), self._wide.get(meta.alias_of or meta.name)
        if wide is not None and published.itemsize > self._dtype.itemsize:
            return wide
        return str(self._dtype).removeprefix("torch.")

    def _kept_wide(self) -> dict[str, str]:
        """Tensors of the checkpoint, and their dtypes, that a parameter may hold in a wider dtype than the model's.

        Which parameter a tensor goes to is not known here. So where there is such a parameter (a scale, a router's bias, a
        decay), it may be that of any tensor that the checkpoint has in a wider dtype.
        """

        def is_wide(dtype: torch.dtype) -> bool:
            return dtype.is_floating_point and dtype.itemsize > self._dtype.itemsize

        if not any(is_wide(parameter.dtype) for parameter in self._worker.get_model().parameters()):
            return {}
        metas = [meta for meta in self._checkpoint.tensors() if meta.dtype in _PLAIN]
        return {meta.name: meta.dtype for meta in metas if is_wide(getattr(torch, meta.dtype))}


def _joined(meta: TensorMeta, parts: Sequence[tuple[Region, torch.Tensor]], device: torch.device) -> torch.Tensor:
    if len(parts) == 1 and parts[0][0].shape == meta.shape:
        return parts[0][1]
    tensor = torch.empty(meta.shape, dtype=getattr(torch, meta.dtype), device=device)
    for region, source in parts:
        tensor[tuple(slice(o, o + n) for o, n in zip(region.offset, region.shape, strict=True))].copy_(source)
    return tensor
