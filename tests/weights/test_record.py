"""What is recorded of a loader, against running that loader for real."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlbridge.errors import LayoutError
from rlbridge.weights.layout import Piece, TensorMeta
from rlbridge.weights.record import record
from tests.weights.programs import DTYPES, Program, box_of, copy_programs, examples, identical, shapes, values

Weights = Iterable[tuple[str, torch.Tensor]]


@dataclass
class Write:
    """One copy of a loader: `source` of the checkpoint tensor into `target` of the parameter."""

    tensor: str
    source: Program
    parameter: str
    target: Program


@dataclass
class Case:
    """Checkpoint tensors, the parameters of an engine, and what its loader writes."""

    tensors: dict[str, torch.Tensor]
    parameters: dict[str, torch.Tensor]
    writes: list[Write]

    def load(self, weights: Weights, parameters: dict[str, torch.Tensor] | None = None) -> None:
        for name, tensor in weights:
            for write in self.writes:
                if write.tensor == name:
                    write.target((parameters or self.parameters)[write.parameter]).copy_(write.source(tensor))

    def record(self) -> list[Piece]:
        return record(self.load, [meta(name, tensor) for name, tensor in self.tensors.items()], self.parameters)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    dtype = draw(st.sampled_from(DTYPES))
    tensors = {f"t{i}": values(draw(shapes()), dtype, i) for i in range(draw(st.integers(1, 3)))}
    case = Case(tensors, {}, [])
    for p in range(draw(st.integers(1, 3))):
        names = draw(st.lists(st.sampled_from(sorted(tensors)), min_size=1, max_size=3))
        programs = [draw(copy_programs(tensors[name])) for name in names]
        parts = [program(tensors[name].to("meta")).shape for name, program in zip(names, programs, strict=True)]
        case.parameters[f"p{p}"], ends = draw(_fused(parts, getattr(torch, dtype)))
        case.writes += [
            Write(name, lambda x, f=program, g=adapt: g(f(x)), f"p{p}", target)
            for name, program, (adapt, target) in zip(names, programs, ends, strict=True)
        ]
    return case


@st.composite
def _fused(draw: st.DrawFn, parts: list[torch.Size], dtype: torch.dtype) -> tuple[torch.Tensor, list[tuple[Program, Program]]]:
    """A parameter with room for `parts`; for each, what its source goes through, and the place it is copied to."""
    sizes = [shape.numel() for shape in parts]
    total, at = sum(sizes), [sum(sizes[:i]) for i in range(len(sizes))]
    padded = draw(st.booleans())
    if len(parts) == 1 and draw(st.booleans()):
        order = draw(st.permutations(range(len(parts[0]))))
        back = [order.index(d) for d in range(len(order))]
        return torch.zeros([parts[0][d] for d in order], dtype=dtype), [(lambda x: x, lambda p: p.permute(back))]
    if all(n % 2 == 0 for n in sizes) and draw(st.booleans()):
        room = torch.zeros(4, total // 2 + 3, dtype=dtype)[1:3, 2:-1] if padded else torch.zeros(2, total // 2, dtype=dtype)
        columns = [(a // 2, n // 2) for a, n in zip(at, sizes, strict=True)]
        return room, [(lambda x: x.reshape(2, -1), lambda p, a=a, n=n: p.narrow(1, a, n)) for a, n in columns]
    room = torch.zeros(total + 3, dtype=dtype)[2:-1] if padded else torch.zeros(total, dtype=dtype)
    rows = zip(at, sizes, parts, strict=True)
    return room, [(lambda x: x, lambda p, a=a, n=n, s=s: p[a : a + n].view(s)) for a, n, s in rows]


def meta(name: str, tensor: torch.Tensor, alias_of: str | None = None) -> TensorMeta:
    return TensorMeta(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), alias_of)


def replay(pieces: list[Piece], tensors: dict[str, torch.Tensor], parameters: dict[str, torch.Tensor]) -> None:
    for piece in pieces:
        piece.view(parameters).copy_(box_of(tensors[piece.region.tensor], piece.region))


@examples(200)
@given(cases())
def test_the_replay_is_what_the_loader_does(case: Case) -> None:
    pieces = case.record()
    assert not any(t.any() for t in case.parameters.values())  # recording leaves them alone
    expected = {name: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype) for name, t in case.parameters.items()}
    case.load(case.tensors.items(), expected)
    for tensor in case.parameters.values():
        tensor.fill_(7)
    replay(pieces, case.tensors, case.parameters)
    assert all(identical(case.parameters[name], tensor) for name, tensor in expected.items())


@examples(60)
@given(cases())
def test_the_pieces_write_each_element_once(case: Case) -> None:
    counts = {
        name: torch.zeros(t.untyped_storage().nbytes() // t.element_size(), dtype=torch.int32).as_strided(
            t.shape, t.stride(), t.storage_offset()
        )
        for name, t in case.parameters.items()
    }
    for piece in case.record():
        piece.view(counts).add_(1)
    assert all(bool((count == 1).all()) for count in counts.values())
    assert all(
        int(c.as_strided((c.untyped_storage().nbytes() // 4,), (1,), 0).sum()) == c.numel() for c in counts.values()
    )  # and nothing beside them


@examples(60)
@given(cases(), st.data())
def test_a_write_that_is_missing_is_told_by_its_parameter(case: Case, data: st.DataObject) -> None:
    left_out = data.draw(st.sampled_from(case.writes))
    case.writes.remove(left_out)
    with pytest.raises(LayoutError, match=rf"parameter '{left_out.parameter}' .* gets \d+ of its \d+ elements"):
        case.record()


@examples(60)
@given(cases(), st.data())
def test_a_second_write_is_told_with_both_regions(case: Case, data: st.DataObject) -> None:
    write = data.draw(st.sampled_from(case.writes))
    case.tensors["other"] = case.tensors[write.tensor]
    case.writes.append(replace(write, tensor="other"))
    with pytest.raises(LayoutError, match=rf"parameter '{write.parameter}' is written twice: by \w+\[.*\] and by \w+\["):
        case.record()


W = TensorMeta("w", (4, 6), "float32")
B = TensorMeta("b", (6,), "float32")


def test_the_same_write_again_is_no_second_write() -> None:
    def load(weights: Weights) -> None:
        for _, tensor in weights:
            parameters["p"].copy_(tensor)
            parameters["p"].copy_(tensor)

    parameters = {"p": torch.zeros(4, 6)}
    assert len(record(load, [W], parameters)) == 1


@pytest.mark.parametrize("tied", [True, False])
def test_an_alias_goes_where_the_engine_puts_it_under_the_name_that_is_published(tied: bool) -> None:
    embed = torch.zeros(4, 6)
    parameters = {"embed": embed, "head": embed if tied else torch.zeros(4, 6)}
    tensors = [W, TensorMeta("head", W.shape, W.dtype, alias_of="w")]

    def load(weights: Weights) -> None:
        for name, tensor in weights:
            parameters["head" if name == "head" else "embed"].copy_(tensor)

    pieces = record(load, tensors, parameters)
    assert [(p.region.tensor, p.storage) for p in pieces] == [("w", "embed")] + [("w", "head")] * (not tied)


def test_tied_parameters_need_one_write_and_a_view_of_a_parameter_none() -> None:
    fused = torch.zeros(4, 6)
    parameters = {"q": fused[:2], "fused": fused, "again": fused, "k": fused[2:], "columns": fused[:, 1:3]}
    (piece,) = record(lambda weights: [fused.copy_(t) for _, t in weights], [W], parameters)
    assert piece.storage == "fused"


@pytest.mark.parametrize(("b", "w"), [(24, 0), (0, 6)])
def test_parameters_that_are_parts_of_one_buffer_are_each_checked(b: int, w: int) -> None:
    buffer = torch.zeros(30)
    parameters = {"b": buffer[b : b + 6], "w": buffer[w : w + 24].view(4, 6)}

    def load(weights: Weights) -> None:
        for name, tensor in weights:
            parameters[name].copy_(tensor)

    pieces = record(load, [W, B], parameters)
    assert {(p.region.tensor, p.storage, p.offset) for p in pieces} == {("w", "w", w), ("b", "b", b)}
    with pytest.raises(LayoutError, match=r"parameter 'b' .* gets 0 of its 6"):
        record(load, [W], parameters)


def test_columns_of_one_buffer_as_parameters_of_their_own() -> None:
    buffer = torch.zeros(4, 6)
    parameters = {"left": buffer[:, :4], "right": buffer[:, 4:]}

    def load(weights: Weights) -> None:
        for _, tensor in weights:
            parameters["left"].copy_(tensor[:, :4])
            for row in range(4):
                parameters["right"][row].copy_(tensor[row, 4:])

    pieces = record(load, [W], parameters)
    assert [p.storage for p in pieces] == ["left"] + ["right"] * 4
    replay(pieces, {"w": torch.arange(24.0).view(4, 6)}, parameters)
    assert buffer.flatten().tolist() == list(range(24))


def one(parameter: torch.Tensor, put: Callable[[torch.Tensor, torch.Tensor], Any], metas: list[TensorMeta]) -> list[Piece]:
    """Record a loader that does `put(parameter, tensor)` with each tensor."""

    def load(weights: Weights) -> None:
        for _, tensor in weights:
            put(parameter, tensor)

    return record(load, metas, {"p": parameter})


@pytest.mark.parametrize(
    ("compute", "op"),
    [
        (lambda p, t: p.copy_(t * 2), "aten.mul"),
        (lambda p, t: p.copy_(torch.cat([t, t + 1])[4:]), "aten.add"),
        (lambda p, t: p.copy_(t.mul_(2)), "aten.mul_"),
        (lambda p, t: p.copy_((t + 1).t().contiguous().t()), "aten.add"),
        (lambda p, t: p.copy_(t[torch.tensor([1, 0, 3, 2])]), "aten.index"),
        (lambda p, t: p.copy_(t.flip(0)), "aten.flip"),
        (lambda p, t: p.copy_(t.view(torch.int32).view(torch.float32).view(torch.int32)), "another dtype"),
        (lambda p, t: p.add_(t), "aten.add_"),
        (lambda p, t: p[0].fill_(t.sum()), "aten.fill_"),
        (lambda p, t: p.fill_(t[0, 0].item()), "aten._local_scalar_dense"),
    ],
)
def test_computing_with_a_tensor_is_refused_with_its_name_and_the_op(compute: Any, op: str) -> None:
    parameter = torch.zeros(4, 6)
    with pytest.raises(LayoutError, match=op) as caught:
        one(parameter, compute, [W])
    assert caught.value.where["tensor"] == "w"
    assert not parameter.any()


def test_what_is_computed_and_not_loaded_is_no_matter() -> None:
    assert one(torch.zeros(4, 6), lambda p, t: (t.abs().max(), p.copy_(t)), [W])


def test_the_tensor_that_is_named_is_the_one_computed_with_not_the_last_one_read() -> None:
    def load(weights: Weights) -> None:
        read = dict(weights)
        parameters["p"].copy_(read["w"] * 2)

    parameters = {"p": torch.zeros(4, 6)}
    with pytest.raises(LayoutError) as caught:
        record(load, [W, B], parameters)
    assert caught.value.where["tensor"] == "w"


def test_constants_are_not_written_and_do_not_count() -> None:
    parameter = torch.full((6, 6), 3.0)

    def put(p: torch.Tensor, t: torch.Tensor) -> None:
        p.zero_()
        p[:4].copy_(t)
        p[4:].fill_(1)
        p[4:].copy_(torch.ones(2, 6))

    with pytest.raises(LayoutError, match=r"'p' .* gets 24 of its 36"):
        one(parameter, put, [W])
    assert bool((parameter == 3.0).all())
    assert one(parameter[:4], lambda p, t: (p.zero_(), p.copy_(t), p[4:].fill_(0)), [W])
    assert bool((parameter == 3.0).all())


def test_a_broadcast_of_one_element_is_a_copy_and_of_more_is_refused() -> None:
    pieces = one(torch.zeros(1, 1, 6), lambda p, t: p.copy_(t), [B])
    assert [p.region.shape for p in pieces] == [(6,)]
    with pytest.raises(LayoutError, match="repeats") as caught:
        one(torch.zeros(4, 6), lambda p, t: p.copy_(t), [B])
    assert caught.value.where["tensor"] == "b"
    with pytest.raises(LayoutError, match=r"copies shape \(6,\) into shape \(4, 5\)"):
        one(torch.zeros(4, 5), lambda p, t: p.copy_(t), [B])


@pytest.mark.parametrize("put", [lambda p, t: p.copy_(t), lambda p, t: p.copy_(t.to(p.dtype)), lambda p, t: p.copy_(t.to(p))])
def test_a_change_to_the_parameters_dtype_and_device_is_a_copy(put: Any) -> None:
    parameter = torch.zeros(4, 6, dtype=torch.bfloat16)
    (piece,) = one(parameter, put, [W])
    assert piece.region.shape == (4, 6)


@pytest.mark.parametrize("put", [lambda p, t: p.copy_(t.half()), lambda p, t: p.copy_(t.bfloat16().float())])
def test_rounding_on_the_way_is_refused(put: Any) -> None:
    with pytest.raises(LayoutError, match=r"rounds this tensor to torch\.b?float16") as caught:
        one(torch.zeros(4, 6), put, [W])
    assert caught.value.where["tensor"] == "w"


def test_a_tensor_in_parameters_of_two_dtypes_is_refused() -> None:
    parameters = {"embed": torch.zeros(4, 6), "head": torch.zeros(4, 6, dtype=torch.bfloat16)}
    with pytest.raises(LayoutError, match=r"float32 .* and as torch\.bfloat16"):
        record(lambda weights: [p.copy_(t) for _, t in weights for p in parameters.values()], [W], parameters)


def test_an_empty_parameter_and_a_scalar_are_followed() -> None:
    parameters = {"e": torch.zeros(0, 6), "s": torch.zeros(())}
    metas = [TensorMeta("e", (0, 6), "float32"), TensorMeta("s", (), "float32")]

    def load(weights: Weights) -> None:
        for name, tensor in weights:
            parameters[name].copy_(tensor)

    assert [(p.region.tensor, p.region.shape) for p in record(load, metas, parameters)] == [("s", ())]


def test_a_parameter_with_gradients_is_recorded() -> None:
    parameter = torch.nn.Parameter(torch.zeros(4, 6))
    assert one(parameter, lambda p, t: p.data.copy_(t), [W])
    assert one(parameter, lambda p, t: p.copy_(t), [W])


def test_a_loader_that_replaces_a_parameter_is_refused() -> None:
    def put(p: torch.Tensor, t: torch.Tensor) -> None:
        p.data = torch.ones(4, 6)

    with pytest.raises(LayoutError, match="in the place of the parameter 'p'"):
        one(torch.nn.Parameter(torch.zeros(4, 6)), put, [W])


def test_a_copy_into_a_scratch_tensor_is_refused() -> None:
    with pytest.raises(LayoutError, match="none of its parameters"):
        one(torch.zeros(4, 6), lambda p, t: torch.zeros(4, 6).copy_(t), [W])


def test_a_copy_into_a_parameters_bytes_is_refused() -> None:
    with pytest.raises(LayoutError, match="none of its parameters"):
        one(torch.zeros(4, 6), lambda p, t: p.view(torch.int32).copy_(t), [TensorMeta("w", (4, 6), "int32")])


def test_a_loaders_own_error_comes_with_the_tensor_it_had() -> None:
    with pytest.raises(LayoutError, match="KeyError: 'unknown'") as caught:
        one(torch.zeros(4, 6), lambda p, t: {}["unknown"], [W])
    assert caught.value.where["tensor"] == "w"


def test_a_name_that_is_like_a_published_one_is_suggested() -> None:
    parameters = {"layers.0.mlp.weights": torch.zeros(2)}
    with pytest.raises(LayoutError, match=r"nearest published names: layers\.0\.mlp\.weight"):
        record(lambda weights: list(weights), [TensorMeta("layers.0.mlp.weight", (2,), "float32")], parameters)


def test_a_parameter_that_overlaps_itself_is_refused() -> None:
    parameter = torch.zeros(6).expand(4, 6)
    with pytest.raises(LayoutError, match="'p' overlaps itself"):
        one(parameter, lambda p, t: None, [W])


@pytest.mark.parametrize("first", [True, False], ids=["zeroed before", "zeroed after"])
def test_what_a_loader_sets_to_zero_is_padding(first: bool) -> None:
    """Engines pad vocabularies, and inner sizes, to what their kernels like."""
    parameter = torch.ones(2, 8, 3)

    def load(weights: Weights) -> None:
        for name, tensor in weights:
            half = parameter["ab".index(name)]
            if first:
                half[5:].zero_()
            half[:5].copy_(tensor)
            if not first:
                half[5:].fill_(0)

    metas = [TensorMeta(name, (5, 3), "float32") for name in "ab"]
    pieces = record(load, metas, {"fused": parameter})
    assert sorted(str(piece.region) for piece in pieces) == ["a[0:5, 0:3]", "b[0:5, 0:3]"]
    assert parameter.unique().tolist() == [1]


def test_a_parameter_that_is_only_zeroed_is_not_written() -> None:
    parameter = torch.ones(4, 3)

    def load(weights: Weights) -> None:
        parameter.zero_()
        for _, tensor in weights:
            parameter[:2].copy_(tensor)

    with pytest.raises(LayoutError, match="gets 6 of its 12 elements"):
        record(load, [TensorMeta("a", (2, 3), "float32")], {"p": parameter})
