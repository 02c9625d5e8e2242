"""Level contract, the trainer: its steps and its log-probs."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest

from rlbridge.roles.batch import Batch, encode, pad_sequences
from rlbridge_conformance.checks import Mismatch, check, expect, holds
from rlbridge_conformance.oracle import read_checkpoint
from rlbridge_conformance.run import Stages
from rlbridge_conformance.stage import Stage
from rlbridge_conformance.suite.trainer_stages import (
    TOLERANCE,
    Tensors,
    agree,
    claim_ranks,
    each_rank_count,
    moved,
    same,
    stage_of,
    usual_stage,
)

ALIKE = 0.05
"""Steps that differ in the order of additions alone are less apart, as a part of their length: also those of an optimizer that
divides by the size of the gradient, and so makes much of the round-off of gradients near zero."""


@check("contract", "trainer")
def test_every_step_moves_the_weights(stages: Stages) -> None:
    stage = usual_stage(stages)
    before = stage.saved()
    for step in range(1, 4):
        stage.train()
        after = stage.saved()
        expect(f"step {step} moves at least one tensor, and it is saved", True, moved(before, after))
        before = after


@check("contract", "trainer")
def test_a_step_reports_finite_metrics(stages: Stages) -> None:
    stage = usual_stage(stages)
    for rank, metrics in enumerate(stage.train_on(stage.batch(1))):
        for name in ("loss", "grad_norm"):
            value = metrics.get(name)
            finite = isinstance(value, (int, float)) and math.isfinite(value)
            holds(finite, f"{name} of a step, as rank {rank} reports it", "a finite number", value)


@check("contract", "trainer")
@pytest.mark.parametrize(("ranks", "micro_batch"), [(2, 0), (1, 1), (2, 1)])
def test_a_step_is_the_same_however_it_is_cut(stages: Stages, ranks: int, micro_batch: int) -> None:
    """The loss is a sum over the tokens of the global batch: neither ranks nor micro-batches are weighted alike."""
    claim_ranks(stages, ranks)
    whole = stages.fresh(ranks=1, engines=0)
    cut = stages.fresh(ranks=ranks, engines=0, trainer={"micro_batch": micro_batch})
    start = whole.saved()
    batch = _lopsided(whole)
    (norm,), norms = ([m.get("grad_norm", math.nan) for m in stage.train_on(batch)] for stage in (whole, cut))
    step = whole.saved()
    apart = _apart(start, step, cut.saved())
    holds(apart < ALIKE, "the step is that of one rank with the whole batch", f"less than {ALIKE:g} apart", f"{apart:.3g}")
    close = all(math.isclose(norm, n, rel_tol=0.01) for n in norms)
    holds(close, "the gradient norm is that of one rank with the whole batch", f"{norm:.6g}", norms)
    if not micro_batch:
        _tells_batches_apart(cut, start, step, batch)


@check("contract", "trainer")
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_an_engine_with_the_weights(stages: Stages, temperature: float) -> None:
    stage = usual_stage(stages)
    sequences = stage.sequences(temperature=temperature)
    mask_BT = sequences.completion_mask_BT()
    first = stage.trainer_scores(sequences)
    for turn in range(20):
        stage.train()
        stage.sync()
        scores = stage.trainer_scores(sequences)
        agree(stage, sequences, scores)
        moved = float(np.abs(scores - first)[mask_BT].max())
        if turn >= 2 and moved > 100 * TOLERANCE:
            return
    raise Mismatch("training moves the trainer's log-probs", f"more than {100 * TOLERANCE:g} in 20 steps", f"{moved:.3g}")


@check("contract", "trainer")
@each_rank_count
def test_any_number_of_rows_is_scored(stages: Stages, ranks: int) -> None:
    stage = stage_of(stages, ranks)
    stage.sync()
    for rows in (1, 2, 3, 5):
        sequences = stage.sequences(rows, rows=rows)
        agree(stage, sequences, stage.trainer_scores(sequences))


@check("contract", "trainer")
def test_log_probs_are_zero_outside_of_completions(stages: Stages) -> None:
    stage = usual_stage(stages)
    sequences = stage.sequences()
    scores = stage.trainer_scores(sequences)
    mask_BT = sequences.completion_mask_BT()
    expect("dtype of the log-probs", np.dtype(np.float32), scores.dtype)
    expect("shape of the log-probs", sequences.tokens_BT.shape, scores.shape)
    expect("log-probs of prompts and padding", [0.0], sorted({float(value) for value in scores[~mask_BT]}))
    negative = bool((scores[mask_BT] < 0).all() and np.isfinite(scores[mask_BT]).all())
    holds(negative, "log-probs of completions", "finite, and below 0", scores[mask_BT].tolist())


@check("contract", "trainer")
def test_scoring_changes_nothing(stages: Stages) -> None:
    stage = usual_stage(stages)
    stage.train()
    before = stage.saved()
    for rows in (1, 4):
        stage.trainer_scores(stage.sequences(rows, rows=rows))
    same("the weights after scoring are those before", before, stage.saved())


def _apart(start: Tensors, one: Tensors, other: Tensors) -> float:
    """How far apart two steps from `start` end, as a part of the length of the first."""
    squares = sum(float((one[name] - other[name]).double().square().sum()) for name in start)
    length = sum(float((one[name] - start[name]).double().square().sum()) for name in start)
    return math.sqrt(squares / length) if length else math.inf


def _tells_batches_apart(stage: Stage, start: Tensors, step: Tensors, batch: Batch) -> None:
    """The control: a batch that is weighted otherwise gives another step, unless steps depend on no batch at all."""
    weights_B = np.repeat(np.array([1, 4], dtype=np.float32), len(batch.advantages_B) // 2)
    other = msgspec.structs.replace(batch, advantages_B=batch.advantages_B * weights_B)
    path = stage.directory / "saved-of-another-batch"
    with stage.lone_trainer(stage.model) as trainer:
        trainer.ask("train_step", dict[str, float], encode(other))
        trainer.ask("save", None, str(path))
    apart = _apart(start, step, read_checkpoint(path))
    seen = apart > 2 * ALIKE or apart < 1e-4
    holds(seen, "the step of a batch that is weighted otherwise", f"more than {2 * ALIKE:g} apart, or the same", f"{apart:.3g}")


def _lopsided(stage: Stage) -> Batch:
    """A batch whose first rows have many more tokens than the others: a mean of means is another loss."""
    draw = np.random.default_rng(0)
    lengths = [14, 13, 12, 11, 3, 2, 2, 1]
    prompts = [draw.integers(2, 64, size=4).tolist() for _ in lengths]
    sequences = pad_sequences(prompts, [draw.integers(2, 64, size=n).tolist() for n in lengths])
    mask_BT = sequences.completion_mask_BT()
    advantages_B = np.array([1, -0.5, 0.75, 1, -1, 1, 1, -1], dtype=np.float32)
    versions_BT = np.where(mask_BT, 0, -1).astype(np.int32)
    return Batch(sequences, stage.trainer_scores(sequences), advantages_B, versions_BT, int(mask_BT.sum()), 1)
