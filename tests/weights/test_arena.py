from __future__ import annotations

import pytest
import torch

from rlbridge.errors import ResourceError
from rlbridge.weights.arena import Arena
from rlbridge.weights.layout import DTYPE_BYTES


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
def test_a_view_lies_at_its_byte_offset_in_its_dtype(dtype: str) -> None:
    arena = Arena(256)
    nbytes = 6 * DTYPE_BYTES[dtype]
    view = arena.view(64, nbytes, dtype, (2, 3))
    assert view.shape == (2, 3)
    assert view.dtype == getattr(torch, dtype)
    assert view.element_size() == DTYPE_BYTES[dtype]
    assert view.data_ptr() == arena.tensor.data_ptr() + 64
    view.view(torch.uint8).fill_(0xAB)
    assert arena.tensor.tolist() == [1] * 64 + [0xAB] * nbytes + [1] * (192 - nbytes)


def test_scalars_and_the_arena_of_a_rank_that_holds_nothing() -> None:
    assert Arena(64).view(0, 4, "float32", ()).shape == ()
    assert Arena(0).tensor.numel() == 1  # transports register an address, which nothing does not have


def test_memory_that_cannot_be_had_is_named_with_its_size() -> None:
    with pytest.raises(ResourceError, match=r"1099511627776 MiB cannot be allocated on cpu"):
        Arena(2**60)
