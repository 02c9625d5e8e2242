"""A checkpoint appears whole or not at all, and never costs the one before it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlbridge.errors import CheckpointError
from rlbridge.rl.checkpoints import latest_checkpoint, read_state, save_checkpoint


def good(method: str, path: str) -> None:
    Path(path).mkdir()
    (Path(path) / "file").write_text(method)


def full_disk(method: str, path: str) -> None:
    good(method, path)
    if method == "save":
        raise OSError(28, "No space left on device")


def test_the_newest_is_found_by_its_number(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    for step in (9, 10, 100):
        save_checkpoint(tmp_path, step, {"evaluations": [[0, 0.5]]}, good, keep=9)
    newest = latest_checkpoint(tmp_path)
    assert newest is not None
    assert read_state(newest) == {"step": 100, "evaluations": [[0, 0.5]]}
    assert (newest / "trainer" / "file").read_text() == "save_state"
    assert (newest / "model" / "file").read_text() == "save"


def test_old_ones_go_when_the_new_one_is_whole(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, {}, good, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000002", "step-000003"]


def test_one_that_fails_leaves_nothing_and_takes_nothing(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, {}, good, keep=1)
    with pytest.raises(CheckpointError, match="No space left") as caught:
        save_checkpoint(tmp_path, 2, {}, full_disk, keep=1)
    assert "step-000001" in caught.value.todo
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]


def test_what_a_killed_run_left_half_written_is_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "step-000005.partial" / "trainer").mkdir(parents=True)
    assert latest_checkpoint(tmp_path) is None
    save_checkpoint(tmp_path, 5, {}, good, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000005"]


def test_a_damaged_one_is_said_to_be(tmp_path: Path) -> None:
    (tmp_path / "step-000001").mkdir()
    (tmp_path / "step-000001" / "run.json").write_text('{"st')
    with pytest.raises(CheckpointError, match="damaged"):
        read_state(tmp_path / "step-000001")
