"""A trainer state that a framework wrote is looked at whole before any of it replaces the weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from rlbridge.errors import CheckpointError
from rlbridge.huggingface.state_manifest import check_manifest, write_manifest
from rlbridge.weights.layout import TensorMeta

TENSORS = [TensorMeta("a", (2, 3), "float32"), TensorMeta("b", (4,), "bfloat16"), TensorMeta("c", (4,), "bfloat16", "b")]


@pytest.fixture
def state(tmp_path: Path) -> Path:
    path = tmp_path / "state"
    (path / "deeper").mkdir(parents=True)
    (path / "model.pt").write_bytes(b"weights")
    (path / "deeper" / "optimizer.pt").write_bytes(b"moments")
    write_manifest(path, TENSORS, 2)
    return path


def test_a_whole_state_of_this_model_is_accepted_again_and_again(state: Path) -> None:
    check_manifest(state, TENSORS, 2)
    write_manifest(state, TENSORS, 2)
    check_manifest(state, TENSORS, 2)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: (path / "model.pt").write_bytes(b"weig"), "model.pt had 7 bytes and has 4 bytes"),
        (lambda path: (path / "deeper" / "optimizer.pt").unlink(), "optimizer.pt had 7 bytes and is not there"),
        (lambda path: (path / "rlbridge.json").write_bytes(b"{"), "holds no trainer state"),
        (lambda path: (path / "rlbridge.json").unlink(), "holds no trainer state"),
    ],
    ids=["a short file", "a missing file", "a torn manifest", "no manifest"],
)
def test_what_is_damaged_is_said(state: Path, damage: Callable[[Path], None], said: str) -> None:
    damage(state)
    with pytest.raises(CheckpointError, match=said):
        check_manifest(state, TENSORS, 2)


@pytest.mark.parametrize(
    ("tensors", "named", "said"),
    [
        ([TensorMeta("a", (2, 4), "float32"), *TENSORS[1:]], "a", r"\[2, 3\] float32 there, \[2, 4\] float32 here"),
        ([TensorMeta("a", (2, 3), "bfloat16"), *TENSORS[1:]], "a", r"\[2, 3\] float32 there, \[2, 3\] bfloat16 here"),
        (TENSORS[:1], "b", r"\[4\] bfloat16 there, absent here"),
        ([*TENSORS, TensorMeta("d", (), "int64")], "d", r"absent there, \[\] int64 here"),
        ([*TENSORS[:2], msgspec.structs.replace(TENSORS[2], alias_of=None)], "c", "there"),
    ],
    ids=["shape", "dtype", "surplus", "missing", "untied"],
)
def test_the_state_of_another_model_names_the_first_tensor_that_differs(
    state: Path, tensors: list[TensorMeta], named: str, said: str
) -> None:
    with pytest.raises(CheckpointError, match=said) as caught:
        check_manifest(state, tensors, 2)
    assert caught.value.where["tensor"] == named


def test_another_number_of_ranks_is_told_what_to_do(state: Path) -> None:
    with pytest.raises(CheckpointError, match=r"of 2 trainer ranks, and there are 3") as caught:
        check_manifest(state, TENSORS, 3)
    assert "trainer.workers=2" in caught.value.todo
