"""Installing through recorded views; `tests/weights` records random loaders and carries random plans."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch

from rlbridge.errors import LayoutError
from rlbridge.roles.sink import RecordedSink
from rlbridge.weights.layout import Region, TensorMeta

TENSORS = [TensorMeta("q", (2, 4), "float32"), TensorMeta("k", (2, 4), "float32"), TensorMeta("n", (4,), "float32")]


class Model:
    def __init__(self) -> None:
        self.qk = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.bfloat16))
        self.norm = torch.zeros(4)
        self.refreshed = 0
        self.sink = RecordedSink(self.load, {"qk": self.qk, "norm": self.norm}, self.refresh)

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            {"q": self.qk.data[:2], "k": self.qk.data[2:], "n": self.norm}[name].copy_(tensor)

    def refresh(self) -> None:
        self.refreshed += 1


def test_the_layout_has_the_engines_dtypes_and_every_tensors_shape() -> None:
    model = Model()
    layout = model.sink.record(TENSORS)
    assert {t.name: t.dtype for t in layout.tensors} == {"q": "bfloat16", "k": "bfloat16", "n": "float32"}
    assert [t.shape for t in layout.tensors] == [t.shape for t in TENSORS]
    assert [r.tensor for r in layout.regions] == ["q", "k", "n"]


def test_installing_writes_the_bound_boxes_and_refreshes() -> None:
    model = Model()
    model.sink.record(TENSORS)
    model.sink.bind([(1, Region("k", (1, 2), (1, 2))), (2, Region("n", (0,), (4,)))])
    model.sink.install([torch.ones(1, 2, dtype=torch.bfloat16), torch.arange(4.0)])
    assert model.qk.nonzero().tolist() == [[3, 2], [3, 3]]
    assert model.norm.tolist() == [0.0, 1.0, 2.0, 3.0]
    assert model.refreshed == 1
    assert [v.data_ptr() for v in model.sink.live()] == [model.qk[3, 2:].data_ptr(), model.norm.data_ptr()]
    assert model.qk.grad_fn is None


def test_scrambling_leaves_nothing_as_it_was() -> None:
    model = Model()
    before = [model.qk.detach().clone(), model.norm.clone()]
    model.sink.scramble()
    assert not any(bool((a == b).any()) for a, b in zip(before, [model.qk, model.norm], strict=True))


def test_a_wrong_number_of_boxes_is_refused_before_any_is_written() -> None:
    model = Model()
    model.sink.record(TENSORS)
    model.sink.bind([(2, Region("n", (0,), (4,)))])
    with pytest.raises(LayoutError, match="2 boxes to install, 1 bound"):
        model.sink.install([torch.ones(4), torch.ones(4)])
    assert not model.norm.any()
    assert model.refreshed == 0


def test_a_rank_that_takes_nothing_takes_part() -> None:
    sink = RecordedSink(lambda weights: list(weights), {})
    assert sink.record(TENSORS).regions == []
    sink.bind([])
    sink.install([])
    assert sink.live() == []


@pytest.mark.parametrize("use", [lambda sink: sink.install([torch.ones(4)]), lambda sink: sink.live()])
def test_a_parameter_that_the_engine_moved_is_not_mistaken_for_what_is_served(use) -> None:
    model = Model()
    model.sink.record(TENSORS)
    model.sink.bind([(2, Region("n", (0,), (4,)))])
    model.qk.data = model.qk.data.clone()
    with pytest.raises(LayoutError, match="moved its parameter 'qk'"):
        use(model.sink)
