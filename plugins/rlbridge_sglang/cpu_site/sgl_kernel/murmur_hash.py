"""MurmurHash3 (32 bits) of a seed, a position and a column: where SGLang's sampler takes its noise from."""

from __future__ import annotations

import torch

_LOW = 0xFFFFFFFF


def murmur_hash32(seed: torch.Tensor, positions: torch.Tensor, col_indices: torch.Tensor) -> torch.Tensor:
    """The hash [N, M] uint32 of each of N pairs of a seed (64 bits) and a position (32 bits) with each of M columns (32 bits).

    The same as SGLang's Triton kernel (sglang/kernels/ops/sampling/murmur_hash.py): 16 bytes, low half of the seed first.
    int64 products wrap, which leaves their low halves right.
    """
    seed_N1, position_N1 = seed.to(torch.int64)[:, None], positions.to(torch.int64)[:, None] & _LOW
    hash_NM = torch.zeros((), dtype=torch.int64)
    for block in (seed_N1 & _LOW, (seed_N1 >> 32) & _LOW, position_N1, col_indices.to(torch.int64)[None, :] & _LOW):
        hash_NM = _mixed(hash_NM, block)
    hash_NM = hash_NM ^ 16
    hash_NM = ((hash_NM ^ (hash_NM >> 16)) * 0x85EBCA6B) & _LOW
    hash_NM = ((hash_NM ^ (hash_NM >> 13)) * 0xC2B2AE35) & _LOW
    return (hash_NM ^ (hash_NM >> 16)).to(torch.uint32)


def _mixed(state: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    block = (block * 0xCC9E2D51) & _LOW
    block = (_rotated(block, 15) * 0x1B873593) & _LOW
    return (_rotated(state ^ block, 13) * 5 + 0xE6546B64) & _LOW


def _rotated(value: torch.Tensor, by: int) -> torch.Tensor:
    return ((value << by) | (value >> (32 - by))) & _LOW
