"""What a trainer needs to go on exactly: parameters, optimizer and random state, each rank its part."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from rlbridge.errors import CheckpointError

State = dict[str, torch.Tensor]
Kind = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of a tensor."""

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW keeps for a parameter."""


def save_state(path: Path, model: Any, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Write it to `path` with torch.distributed.checkpoint. Collective.

    Raises:
        CheckpointError: it could not be written.
    """
    state = _parameters(model) | _moments(model, optimizer) | _random_state() | {"step": torch.tensor(step)}
    with _checkpoint_errors(f"the trainer's state could not be written to {path}", "make room, or save elsewhere"):
        path.mkdir(parents=True, exist_ok=True)
        save(state, checkpoint_id=path)


def load_state(path: Path, model: Any, optimizer: torch.optim.Optimizer) -> int:
    """Read it back into `model` and `optimizer`. Collective. Returns the step.

    Raises:
        CheckpointError: it is damaged, or of another model.
    """
    with _checkpoint_errors(f"the trainer's state in {path} cannot be read", "resume from an earlier checkpoint"):
        found = FileSystemReader(path).read_metadata().state_dict_metadata
    kinds = {k: (tuple(m.size), m.properties.dtype) for k, m in found.items() if isinstance(m, TensorStorageMetadata)}
    parameters = _parameters(model)
    _check_same_model(path, kinds, parameters)
    moments = _empty_moments(model, kinds)
    random_state = {key: value for key, value in _random_state().items() if key in kinds}
    state = parameters | moments | random_state | {"step": torch.tensor(0)}
    with _checkpoint_errors(f"the trainer's state in {path} cannot be read", "resume from an earlier checkpoint"):
        load(state, checkpoint_id=path)
    _set_moments(model, optimizer, moments)
    _set_random_state(random_state)
    return int(state["step"])


def _parameters(model: Any) -> State:
    buffers = {name: value for name, value in model.state_dict().items() if not isinstance(value, DTensor)}
    named = {name: value.detach() for name, value in model.named_parameters()}
    return {f"model.{name}": value for name, value in (named | {n: b for n, b in buffers.items() if n not in named}).items()}


def _moments(model: Any, optimizer: torch.optim.Optimizer) -> State:
    # Not get_optimizer_state_dict: on an optimizer that has not stepped yet it takes a step with zero gradients (torch 2.13),
    # so that saving would change the bias correction of all that follows.
    return {
        f"optimizer.{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _empty_moments(model: Any, kinds: dict[str, Kind]) -> State:
    """Memory for what the checkpoint holds of the optimizer: like its parameter, or a scalar (AdamW's own step)."""
    made: State = {}
    for name, parameter in model.named_parameters():
        for key in (k for k in _MOMENTS if f"optimizer.{name}.{k}" in kinds):
            shape, dtype = kinds[f"optimizer.{name}.{key}"]
            like = torch.zeros(shape, dtype=dtype) if shape == () else torch.zeros_like(parameter.detach(), dtype=dtype)
            made[f"optimizer.{name}.{key}"] = like
    return made


def _set_moments(model: Any, optimizer: torch.optim.Optimizer, moments: State) -> None:
    optimizer.state.clear()
    for name, parameter in model.named_parameters():
        prefix = f"optimizer.{name}."
        own = {key: moments[prefix + key] for key in _MOMENTS if prefix + key in moments}
        if own:
            optimizer.state[parameter] = own


def _random_state() -> State:
    state = {f"random.cpu.{dist.get_rank()}": torch.get_rng_state()}
    if torch.cuda.is_available():
        state[f"random.cuda.{dist.get_rank()}"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: State) -> None:
    for key, value in state.items():
        torch.cuda.set_rng_state(value) if key.startswith("random.cuda.") else torch.set_rng_state(value)


def _check_same_model(path: Path, found: dict[str, Kind], expected: State) -> None:
    theirs = {key: kind for key, kind in found.items() if key.startswith("model.")}
    for key in (*expected, *theirs):
        here = (tuple(expected[key].shape), expected[key].dtype) if key in expected else None
        there = theirs.get(key)
        if here != there:
            name = key.removeprefix("model.")
            raise CheckpointError(
                f"{path} is the state of another model: {name!r} is {_printed(there)} there, {_printed(here)} here",
                todo="resume with the model directory and trainer.dtype that the run began with",
                tensor=name,
            )


def _printed(kind: Kind | None) -> str:
    return "absent" if kind is None else f"{list(kind[0])} {str(kind[1]).removeprefix('torch.')}"


@contextmanager
def _checkpoint_errors(what: str, todo: str) -> Iterator[None]:
    try:
        yield
    except CheckpointException as error:  # derives from BaseException; raised on every rank
        causes = {f"{type(cause).__name__}: {cause}" for cause, _ in error.failures.values()}
        raise CheckpointError(f"{what}: {'; '.join(sorted(causes))}", todo=todo) from error
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{what}: {type(error).__name__}: {error}", todo=todo) from error
