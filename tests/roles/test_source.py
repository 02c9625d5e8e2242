"""Where a snapshot takes its bytes from; `tests/weights/test_plan.py` carries random ones through a plan."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from rlbridge.errors import LayoutError
from rlbridge.roles.source import GatheredSource, ShardedSource
from rlbridge.weights.layout import Piece, Region, TensorMeta

W = TensorMeta("w", (4, 6), "float32")
ROWS = Region("w", (2, 0), (2, 6))
BOX = Region("w", (2, 1), (2, 3))


def sharded(storages: dict[str, torch.Tensor]) -> ShardedSource:
    """The lower half of `w`, as columns of a wider local tensor."""
    return ShardedSource([W], [Piece(ROWS, "shard", 2, (8, 1))], lambda: storages)


def test_a_snapshot_copies_the_bound_boxes_and_casts_them() -> None:
    local = torch.randn(2, 8)
    source = sharded({"shard": local})
    assert source.layout().regions == [ROWS]
    source.bind([BOX, ROWS])
    exact, rounded = torch.zeros(2, 3), torch.zeros(2, 6, dtype=torch.bfloat16)
    source.snapshot([exact, rounded])
    assert torch.equal(exact, local[:, 3:6])
    assert torch.equal(rounded, local[:, 2:8].bfloat16())


def test_live_is_the_parameters_own_memory() -> None:
    local = torch.zeros(2, 8)
    source = sharded({"shard": local})
    source.bind([BOX])
    (view,) = source.live()
    view.fill_(1)
    assert local.sum() == 6


@pytest.mark.parametrize("replace", ["the mapping's tensor", "the parameter's data"])
def test_a_storage_that_an_optimizer_replaced_is_followed(replace: str) -> None:
    storages = {"shard": torch.nn.Parameter(torch.zeros(2, 8))}
    source = sharded(storages)  # type: ignore[arg-type]
    source.bind([ROWS])
    out = torch.zeros(2, 6)
    source.snapshot([out])
    if replace == "the parameter's data":
        storages["shard"].data = torch.ones(2, 8)
    else:
        storages["shard"] = torch.nn.Parameter(torch.ones(2, 8))
    source.snapshot([out])
    assert bool((out == 1).all())


def test_a_second_bind_is_a_new_epoch() -> None:
    source = sharded({"shard": torch.arange(16.0).view(2, 8)})
    for region, expected in [(BOX, [3.0, 4, 5, 11, 12, 13]), (Region("w", (3, 0), (1, 2)), [10.0, 11])]:
        source.bind([region])
        out = torch.zeros(region.shape)
        source.snapshot([out])
        assert out.flatten().tolist() == expected


def test_a_box_that_this_rank_does_not_own_is_named() -> None:
    with pytest.raises(LayoutError, match=r"w\[1:3, 0:6\], which this rank does not own"):
        sharded({}).bind([Region("w", (1, 0), (2, 6))])


def test_a_rank_with_nothing_to_send_takes_part() -> None:
    source = sharded({"shard": torch.zeros(2, 8)})
    source.bind([])
    source.snapshot([])
    assert source.live() == []


TENSORS = {"w": torch.randn(4, 6), "b": torch.randn(5), "s": torch.randn(())}
METAS = [TensorMeta(n, tuple(t.shape), "float32") for n, t in TENSORS.items()]


def test_every_rank_owns_some_of_what_is_gathered_and_no_two_the_same() -> None:
    aliased = [*METAS, TensorMeta("head", (4, 6), "float32", alias_of="w")]
    layouts = [GatheredSource(aliased, lambda: iter(()), rank, 3).layout() for rank in range(3)]
    assert sorted(r.tensor for layout in layouts for r in layout.regions) == ["b", "s", "w"]
    assert all(len(layout.regions) == 1 for layout in layouts)
    assert all(layout.tensors == aliased for layout in layouts)


def test_gathered_tensors_are_copied_while_they_live() -> None:
    def export() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in TENSORS.items():
            gathered = tensor.clone()
            yield name, gathered
            gathered.fill_(-1)  # the exporter reuses its buffer

    source = GatheredSource(METAS, export, 0, 1)
    source.bind([Region("s", (), ()), BOX, Region("b", (1,), (2,)), Region("w", (0, 0), (1, 6))])
    out = [torch.zeros(()), torch.zeros(2, 3, dtype=torch.bfloat16), torch.zeros(2), torch.zeros(1, 6)]
    source.snapshot(out)
    expected = [TENSORS["s"], TENSORS["w"][2:4, 1:4].bfloat16(), TENSORS["b"][1:3], TENSORS["w"][:1]]
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))


def test_a_rank_that_owns_nothing_drains_the_exporter_with_the_others() -> None:
    drained = []

    def export() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in TENSORS.items():
            drained.append(name)
            yield name, tensor

    source = GatheredSource(METAS, export, 0, 1)
    source.bind([])
    source.snapshot([])
    assert drained == ["w", "b", "s"]


def test_a_tensor_that_the_exporter_leaves_out_is_named() -> None:
    source = GatheredSource(METAS, lambda: iter([("w", TENSORS["w"])]), 0, 1)
    source.bind([Region("w", (0, 0), (4, 6)), Region("b", (0,), (5,))])
    with pytest.raises(LayoutError, match="did not yield 'b'"):
        source.snapshot([torch.zeros(4, 6), torch.zeros(5)])


def test_a_gathered_source_has_no_memory_to_read_in_place() -> None:
    with pytest.raises(LayoutError, match="no storage to read in place"):
        GatheredSource(METAS, lambda: iter(()), 0, 1).live()
