"""What the workers of an epoch say to one another."""

from __future__ import annotations

import msgspec

from rlbridge.weights.layout import TensorMeta


class SourceOpened(msgspec.Struct, frozen=True):
    """A trainer rank's arena is registered.

    `listing` is the digest of what verl exports on this rank; the first rank gives the list itself.
    """

    address: bytes
    bucket_bytes: int
    listing: bytes
    tensors: list[TensorMeta]


class SinkOpened(msgspec.Struct, frozen=True):
    """A rollout worker's buckets are registered."""

    address: bytes


class Filled(msgspec.Struct, frozen=True):
    """A trainer rank's stripes of a bucket hold `version`: one digest for each of them, joined."""

    version: int
    digests: bytes


class Done(msgspec.Struct, frozen=True):
    """A rollout worker has read, verified and handed on all of `version`, `nbytes` bytes; `wire` is what carried them."""

    version: int
    nbytes: int
    wire: str
