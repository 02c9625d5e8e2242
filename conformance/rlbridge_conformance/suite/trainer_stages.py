"""What the checks of trainers share: their stages, and how weights and log-probs are compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from rlbridge.errors import LeaseError
from rlbridge.roles.batch import Sequences
from rlbridge_conformance.checks import expect, holds
from rlbridge_conformance.members import errors_of
from rlbridge_conformance.run import Stages
from rlbridge_conformance.stage import Stage

TOLERANCE = 2e-3
"""Log-probs of a trainer and an engine that compute in float32 differ by less, whatever order each adds in."""

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"

Tensors = Mapping[str, torch.Tensor]

# With the scope of a module pytest runs the checks of one number of ranks after one another, on the same stage.
each_rank_count = pytest.mark.parametrize("ranks", [1, 2, 3], scope="module")


def most_ranks(stages: Stages) -> int:
    """Two ranks, where the trainer has so many."""
    return 2 if stages.triple.claims("trainer").claims("multi_rank") else 1


def usual_stage(stages: Stages, **scene: Any) -> Stage:
    """The stage of most checks; its engine is cut in both dimensions."""
    return stages(ranks=most_ranks(stages), generator={"tp": 2}, **scene)


def stage_of(stages: Stages, ranks: int, *, tp: int = 2) -> Stage:
    claim_ranks(stages, ranks)
    return stages(ranks=ranks, generator={"tp": tp})


def claim_ranks(stages: Stages, ranks: int) -> None:
    """Skip a case of several ranks, if the trainer has but one."""
    claims = stages.triple.claims("trainer")
    if ranks > 1 and not claims.claims("multi_rank"):
        pytest.skip(f"not claimed by the trainer {claims.backend.name}: multi_rank")


def publishes_in_place(stage: Stage) -> None:
    """Hold weights that are read where they lie to be those published, and training to be refused meanwhile."""
    with stage.another_session(publish="barrier"):
        for _ in range(3):
            stage.train()
            stage.scramble()
            stage.sync()
            stage.holds(stage.saved())
        stage.version += 1
        stage.session.publish(stage.version)
        error = errors_of(stage.train)
        expect("training while the weights are read in place", LeaseError.__name__, type(error).__name__)
        stage.session.pull(stage.version)
        stage.session.install(stage.version)
        stage.train()
        stage.sync()
        stage.holds(stage.saved())


def moved(before: Tensors, after: Tensors) -> bool:
    """Whether any tensor differs."""
    return any(not torch.equal(tensor, after[name]) for name, tensor in before.items())


def same(what: str, wanted: Tensors, got: Tensors) -> None:
    """Hold tensors to be bit for bit equal."""
    expect(f"{what}: their names", sorted(wanted), sorted(got))
    differing = [name for name, tensor in wanted.items() if _bytes(tensor) != _bytes(got[name])]
    expect(f"{what}: tensors that differ", [], differing)


def _bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def kind_of(tensor: torch.Tensor) -> tuple[tuple[int, ...], str]:
    return tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")


def agree(stage: Stage, sequences: Sequences, scores: np.ndarray[Any, Any]) -> None:
    """Hold the trainer's log-probs to those of the engine, which has its weights."""
    expect("shape of the log-probs", sequences.tokens_BT.shape, scores.shape)
    apart = float(np.abs(scores - stage.engine_scores(sequences))[sequences.completion_mask_BT()].max())
    holds(
        apart < TOLERANCE,
        f"log-probs of {len(scores)} rows at temperature {sequences.temperature:g} are those of an engine with the weights",
        f"less than {TOLERANCE:g} apart",
        f"{apart:.3g}",
    )
