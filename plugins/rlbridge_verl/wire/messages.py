"""What the workers of an epoch say to one another."""

from __future__ import annotations

import msgspec

from rlbridge.weights.layout import TensorMeta


class SourceOpened(msgspec.Struct, frozen=True):
    """A trainer rank's arena is registered; the first rank says what the model consists of, in the order of verl's export."""

    address: bytes
    tensors: list[TensorMeta] = []


class SinkOpened(msgspec.Struct, frozen=True):
    """A rollout worker's buckets are registered."""

    address: bytes


class Published(msgspec.Struct, frozen=True):
    """A trainer rank's arena holds all of its part of `version`."""

    version: int


class Digests(msgspec.Struct, frozen=True):
    """One digest for each round of a trainer rank's arena, joined."""

    joined: bytes


class Done(msgspec.Struct, frozen=True):
    """A rollout worker has read, verified and handed on all of `version`, `nbytes` bytes; `wire` is what carried them."""

    version: int
    nbytes: int
    wire: str
