"""What a transformers model's checkpoint on disk consists of, and where each of its tensors lies in the module.

A parameter is not always a checkpoint tensor: since transformers 5 the experts of a mixture are fused into one parameter. The
names and cuts below come from transformers' own reverse mapping, run over placeholders, so no model is named here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from rlbridge.errors import LayoutError
from rlbridge.weights.layout import Piece, TensorMeta
from rlbridge.weights.provenance import Provenance

Tensors = Mapping[str, torch.Tensor]
Gather = Callable[[Sequence[str]], AbstractContextManager[Tensors]]
"""The full tensors of those names, for as long as the context lasts. Collective where the model is sharded."""


def checkpoint_pieces(model: Any, tensors: Tensors | None = None) -> tuple[list[TensorMeta], list[Piece]]:
    """Every tensor of `model`'s checkpoint on disk, and where it lies in the model's parameters and persistent buffers.

    A piece's storage is the parameter's name; its offset and strides are those of the full parameter, also where the model is
    sharded. Tensors without `alias_of` are exactly those that `save_pretrained` writes.

    Args:
        model: A transformers model.
        tensors: What `module_tensors` gives, where the module's own parameters do not have their full shapes; of these only
            shapes, strides and dtypes count.

    Raises:
        LayoutError: a checkpoint tensor is computed from parameters, and so lies nowhere; it is named.
    """
    live = module_tensors(model) if tensors is None else tensors
    traced = _trace(model, live)
    pieces = []
    for tensor in traced.tensors:
        if tensor.alias_of is None:
            found = traced.provenance.pieces_of(traced.results[tensor.name], tensor.name)
            pieces += [_placed(live[piece.storage], piece) for piece in found]
    return traced.tensors, pieces


def checkpoint_tensors(model: Any, tensors: Tensors | None = None) -> list[TensorMeta]:
    """Every tensor of `model`'s checkpoint on disk, in the order in which `export_full` yields them, then the aliases."""
    return _trace(model, module_tensors(model) if tensors is None else tensors).tensors


def module_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by every name they have in the module; DTensors where the model is sharded."""
    state = model.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def export_full(model: Any, tensors: Tensors | None = None, gather: Gather | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """Each checkpoint tensor, full, through transformers' reverse mapping. Collective where the model is sharded.

    Only the parameters of one conversion (a layer's experts, or a single tensor) are gathered at a time, by `gather` where they
    are no DTensors; aliases are skipped.
    """
    live = module_tensors(model) if tensors is None else tensors
    for names in _trace(model, live).groups:
        with torch.no_grad(), (gather or _gather_from(live))(names) as full:
            yield from revert_weight_conversion(model, dict(full)).items()


@dataclass
class _Traced:
    tensors: list[TensorMeta]
    results: dict[str, torch.Tensor]
    provenance: Provenance
    groups: list[list[str]]
    """Names of parameters that the reverse mapping converts together."""


def _trace(model: Any, live: Tensors) -> _Traced:
    """The reverse mapping of the whole model, run over placeholders."""
    placeholders = _placeholders(live)
    kept = _written(model, placeholders)
    provenance = Provenance({name: placeholders[name] for name in kept})
    with _mapping_errors(), provenance:
        results = revert_weight_conversion(model, dict(kept))
        with_aliases = revert_weight_conversion(model, dict(placeholders)) if len(kept) < len(placeholders) else results
    groups = _groups(results, provenance)
    order = {name: index for index, group in enumerate(groups) for name in group}
    names = sorted(results, key=lambda n: min((order[root] for root in provenance.roots_of(results[n])), default=-1))
    tensors = [_meta(name, results[name]) for name in names]
    aliases = [
        _meta(name, value, _twin(value, results, provenance)) for name, value in with_aliases.items() if name not in results
    ]
    return _Traced(tensors + aliases, results, provenance, groups)


def _placeholders(live: Tensors) -> dict[str, torch.Tensor]:
    """A meta tensor for each parameter; names of one parameter share one."""
    made: dict[int, torch.Tensor] = {}
    for tensor in live.values():
        if id(tensor) not in made:
            made[id(tensor)] = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return {name: made[id(tensor)] for name, tensor in live.items()}


def _written(model: Any, placeholders: Tensors) -> dict[str, torch.Tensor]:
    """What `save_pretrained` keeps of the state dict: no ignored keys, and one name of each tied tensor."""
    ignored = set(model._keys_to_ignore_on_save or ())
    state = {name: value for name, value in placeholders.items() if name not in ignored}
    return dict(remove_tied_weights_from_state_dict(state, model))


def _groups(results: Tensors, provenance: Provenance) -> list[list[str]]:
    """Parameters that meet in a checkpoint tensor, directly or through others, in one group."""
    group_of: dict[str, list[str]] = {}
    for value in results.values():
        merged: list[str] = []
        for root in sorted(provenance.roots_of(value)):
            group = group_of.get(root, [root])
            merged += [name for name in group if name not in merged]
        group_of.update(dict.fromkeys(merged, merged))
    return list({id(group): group for group in group_of.values()}.values())


def _twin(value: torch.Tensor, results: Tensors, provenance: Provenance) -> str:
    """The name of the written tensor that an alias is the same as."""
    roots = provenance.roots_of(value)
    same = [n for n, t in results.items() if provenance.roots_of(t) == roots and t.shape == value.shape]
    where = [p.offset for p in provenance.pieces_of(value, "")]
    for name in same:
        if [p.offset for p in provenance.pieces_of(results[name], "")] == where:
            return name
    raise LayoutError(f"a tied tensor of {sorted(roots)} is not written under any other name")


def _meta(name: str, value: torch.Tensor, alias_of: str | None = None) -> TensorMeta:
    return TensorMeta(name, tuple(value.shape), str(value.dtype).removeprefix("torch."), alias_of)


def _placed(tensor: torch.Tensor, piece: Piece) -> Piece:
    """The piece with its offset counted from the start of the storage, as `Piece.view` counts."""
    start = 0 if isinstance(tensor, DTensor) else int(tensor.storage_offset())
    return Piece(piece.region, piece.storage, piece.offset + start, piece.strides)


def _gather_from(live: Tensors) -> Gather:
    @contextmanager
    def gather(names: Sequence[str]) -> Iterator[Tensors]:
        yield {name: _full(live[name]) for name in names}

    return gather


def _full(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


@contextmanager
def _mapping_errors() -> Iterator[None]:
    """A conversion that needs values fails on placeholders with whatever its library raises."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        raise LayoutError(
            f"transformers' reverse mapping of this model cannot run without values: {error}",
            todo="save the model with save_pretrained(save_original_format=False) and use that directory",
        ) from error
