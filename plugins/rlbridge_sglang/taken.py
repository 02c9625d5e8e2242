"""Whether the ranks of an engine take all that a trainer publishes.

SGLang's loaders drop what they do not know, and cut what is too long, with no more than a warning: both are refused here. Only
all ranks together can tell: of a vocabulary that is padded, the last rank takes less than its share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from rlbridge.errors import LayoutError, RlbridgeError
from rlbridge.sync.messages import Described, Record, answer, result, unpack
from rlbridge.weights.layout import Layout, TensorMeta


def checked(payload: bytes, replies: list[bytes]) -> list[bytes]:
    """The ranks' answers to `record`, or an error in the place of each where they leave something out."""
    (published, *_) = msgspec.msgpack.decode(payload, type=list[bytes])
    try:
        layouts = [result(reply, Described).layout for reply in replies]
    except RlbridgeError:
        return replies
    try:
        check_taken(unpack(published, Record).tensors, layouts)
    except LayoutError as error:
        failed = error
        return [answer(lambda: _raise(failed))] * len(replies)
    return replies


def check_taken(tensors: Sequence[TensorMeta], layouts: Sequence[Layout]) -> None:
    """All ranks together have to take all of each tensor.

    Raises:
        LayoutError: they do not.
    """
    taken: dict[str, int] = {}
    for region in (region for layout in layouts for region in layout.regions):
        taken[region.tensor] = taken.get(region.tensor, 0) + region.numel
    for meta in tensors:
        size, found = math.prod(meta.shape), taken.get(meta.name, 0)
        if meta.alias_of is not None or found >= size:
            continue
        if not found:
            raise LayoutError(
                f"the engine's loader drops this tensor of shape {tuple(meta.shape)}",
                role="generator",
                tensor=meta.name,
                todo="the trainer publishes a tensor that the engine's model has not",
            )
        raise LayoutError(
            f"the engine's loader takes {found} of the {size} elements of this tensor of shape {tuple(meta.shape)}",
            role="generator",
            tensor=meta.name,
            todo="the trainer publishes a tensor of another shape than the engine's model has",
        )


def _raise(error: LayoutError) -> object:
    raise error
