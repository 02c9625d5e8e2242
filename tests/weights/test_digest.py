from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from rlbridge.weights.digest import BYTES, digests
from tests.weights.programs import DTYPES, examples, shapes, values


@examples(60)
@given(shapes(), st.sampled_from(DTYPES), st.data())
def test_any_flipped_byte_changes_the_digest(shape: tuple[int, ...], dtype: str, data: st.DataObject) -> None:
    tensor = values(shape, dtype, 1)
    raw = tensor.view(-1).view(torch.uint8)
    at = data.draw(st.integers(0, raw.numel() - 1))
    (before,) = digests([tensor])
    assert len(before) == BYTES
    raw[at] ^= 1
    assert digests([tensor]) != [before]
    raw[at] ^= 1
    assert digests([tensor]) == [before]


@examples(60)
@given(shapes(dims=(1, 4)), st.sampled_from(DTYPES), st.data())
def test_the_digest_is_of_the_elements_in_order_not_of_the_memory(
    shape: tuple[int, ...], dtype: str, data: st.DataObject
) -> None:
    tensor = values(shape, dtype, 2)
    order = data.draw(st.permutations(range(len(shape))))
    strided = tensor.permute(order).contiguous().permute([order.index(d) for d in range(len(shape))])
    assert digests([strided, tensor]) == digests([tensor, strided])


def test_swapped_elements_change_the_digest() -> None:
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])
    assert digests([a]) != digests([b])


def test_one_digest_a_tensor_empty_and_differentiable_ones_too() -> None:
    found = digests([torch.empty(0, 3), torch.zeros((), requires_grad=True), torch.zeros(1)])
    assert len(found) == 3
    assert found[1] == found[2] != found[0]


def test_an_element_of_any_stride_has_a_digest() -> None:
    base = torch.arange(8.0)
    views = [base.as_strided(shape, strides, 3) for shape, strides in [((1,), (0,)), ((1,), (2,)), ((1, 1), (0, 5)), ((), ())]]
    assert set(digests(views)) == set(digests([torch.tensor(3.0)]))
