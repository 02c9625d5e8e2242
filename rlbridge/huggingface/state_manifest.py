"""What lies beside a trainer's state that its framework wrote: of which model and how many ranks it is, and its files' sizes.

Frameworks load a state file by file, so one that cannot be loaded would be found when half of it has replaced the weights.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from rlbridge.errors import CheckpointError
from rlbridge.weights.layout import TensorMeta

_NAME = "rlbridge.json"
EARLIER = "resume from an earlier checkpoint"
"""What to do about a state that cannot be read."""


class StateManifest(msgspec.Struct, frozen=True):
    """The tensors of the model's checkpoint, the number of ranks, and the bytes of each file, by its path in the directory."""

    tensors: list[TensorMeta]
    ranks: int
    files: dict[str, int]


def write_manifest(path: Path, tensors: Sequence[TensorMeta], ranks: int) -> None:
    """Describe the state in `path`, which is complete. One rank does.

    Raises:
        OSError: it cannot be written.
    """
    files = {str(file.relative_to(path)): file.stat().st_size for file in _files(path)}
    (path / _NAME).write_bytes(msgspec.json.encode(StateManifest(list(tensors), ranks, files)))


def check_manifest(path: Path, tensors: Sequence[TensorMeta], ranks: int) -> None:
    """Hold the state in `path` to what it was when it was written, and to this model and number of ranks. Each rank does.

    Raises:
        CheckpointError: it is no state, damaged, or of another model or number of ranks.
    """
    try:
        found = msgspec.json.decode((path / _NAME).read_bytes(), type=StateManifest)
    except (OSError, msgspec.DecodeError) as error:
        raise CheckpointError(f"{path} holds no trainer state: {error}", todo=EARLIER) from error
    _check_same_model(path, found.tensors, tensors)
    if found.ranks != ranks:
        raise CheckpointError(
            f"{path} is the state of {found.ranks} trainer ranks, and there are {ranks}",
            todo=f"resume with trainer.workers={found.ranks}",
        )
    for name, size in found.files.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            there = f"has {file.stat().st_size} bytes" if file.is_file() else "is not there"
            raise CheckpointError(f"the state in {path} is damaged: {name} had {size} bytes and {there}", todo=EARLIER)


@contextmanager
def checkpoint_errors(what: str, todo: str) -> Iterator[None]:
    """What a framework raises while it writes or reads a state, as a CheckpointError that begins with `what`."""
    try:
        yield
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, AssertionError, pickle.PickleError) as error:
        raise CheckpointError(f"{what}: {type(error).__name__}: {error}", todo=todo) from error


def _check_same_model(path: Path, found: Sequence[TensorMeta], expected: Sequence[TensorMeta]) -> None:
    theirs, ours = ({meta.name: meta for meta in metas} for metas in (found, expected))
    for name in (*ours, *theirs):
        if ours.get(name) != theirs.get(name):
            raise CheckpointError(
                f"{path} is the state of another model: {name!r} is {_printed(theirs.get(name))} there,"
                f" {_printed(ours.get(name))} here",
                todo="resume with the model directory and trainer.dtype that the run began with",
                tensor=name,
            )


def _files(path: Path) -> Iterator[Path]:
    return (file for file in sorted(path.rglob("*")) if file.is_file() and file.name != _NAME)


def _printed(meta: TensorMeta | None) -> str:
    return "absent" if meta is None else f"{list(meta.shape)} {meta.dtype}"
