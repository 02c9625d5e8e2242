"""The synchronous loop: generate, reward, train, sync; and again.

Everything random follows from the run's seed and the step's number, so a run that is resumed from a checkpoint goes on as if it
had never stopped. Version s + 1 of the weights is what step s made; version 1 is the model as it was loaded.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlbridge.config import RunConfig
from rlbridge.errors import CheckpointError, DeadlineError, PeerLostError, RlbridgeError
from rlbridge.plugins import registry
from rlbridge.rl.advantages import build_batch, group_advantages
from rlbridge.rl.checkpoints import latest_checkpoint, read_state, save_checkpoint
from rlbridge.rl.prompts import Prompt, PromptStream, tokenize
from rlbridge.rl.rewards import RewardFunction, score_completions
from rlbridge.rl.run import Run
from rlbridge.rl.summary import summarise
from rlbridge.rl.workers import Workers
from rlbridge.roles.batch import Completion, Sampling
from rlbridge.sync.report import SyncReport

_log = logging.getLogger(__name__)
_GREEDY_SEED = 0


@dataclass
class Task:
    """What the policy is trained on.

    Attributes:
        prompts: For training.
        held_out: For evaluation.
        tokenizer: Of the model.
        reward: Scores one completion.
    """

    prompts: Sequence[Prompt]
    held_out: Sequence[Prompt]
    tokenizer: Any
    reward: RewardFunction


@dataclass
class Progress:
    """Where a run is: what a checkpoint has to hold of it."""

    step: int = 0
    saved: int = -1
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    reports: list[SyncReport] = field(default_factory=list)


class Loop:
    """One run, from its first sync to its summary. `progress` says where it is."""

    def __init__(self, run: Run, task: Task, workers: Workers) -> None:
        self._run = run
        self._config: RunConfig = run.config
        self._task = task
        self._workers = workers
        self._stream = PromptStream(task.prompts, self._config.seed)
        self._seconds = self._config.cluster.step_seconds
        self.progress = Progress()

    def run(self) -> dict[str, Any]:
        """Train to the last step. Returns the summary.

        After an error the newest step that was finished is checkpointed where that can still be done.
        """
        notify("rlbridge_run_started", run=self._run)
        try:
            self._begin()
            while self.progress.step < self._config.algorithm.steps:
                self._step(self.progress.step + 1)
            self._save()
        except (Exception, KeyboardInterrupt) as error:
            self._rescue(error)
            raise
        finally:
            summary = self._summary()
            notify("rlbridge_run_finished", run=self._run, result=summary)
        return summary

    def _begin(self) -> None:
        """Load the checkpoint of a resumed run, and bring the engines to the trainer's weights."""
        if self._run.resumed_step:
            self._resume()
        self._sync(self.progress.step + 1)
        if not self.progress.evaluations:
            self._evaluate()

    def _resume(self) -> None:
        checkpoint = latest_checkpoint(self._run.directory / "checkpoints")
        if checkpoint is None:
            raise CheckpointError(f"{self._run.directory} has no checkpoint to go on from", todo="start a new run")
        state = read_state(checkpoint)
        self._workers.trainer.each("load_state", str(checkpoint / "trainer"), self._seconds)
        self.progress.step = self.progress.saved = state["step"]
        self.progress.evaluations = [(int(s), float(r)) for s, r in state["evaluations"]]

    def _step(self, step: int) -> None:
        config = self._config
        start = time.monotonic()
        prompts = self._stream.batch(step, config.algorithm.prompts_per_step)
        tokens = tokenize(prompts, self._task.tokenizer, config.data.chat)
        group = config.algorithm.samples_per_prompt
        repeated = [t for t in tokens for _ in range(group)]
        completions = self._workers.generator.generate(repeated, self._sampling(step), self._seconds)
        generated = time.monotonic()
        rewards_B = self._rewards([p for p in prompts for _ in range(group)], completions)
        advantages_PG = group_advantages(rewards_B.reshape(len(prompts), group), config.algorithm.normalise)
        batch = build_batch(
            repeated,
            completions,
            advantages_PG,
            temperature=config.sampling.temperature,
            pad=self._task.tokenizer.pad_token_id or 0,
            step=step,
        )
        rewarded = time.monotonic()
        metrics = self._workers.trainer.train_step(batch, self._seconds)
        trained = time.monotonic()
        self.progress.step = step
        report = self._sync(step + 1)
        seconds = time.monotonic() - start
        lengths = [len(c.token_ids) for c in completions]
        self._finished(
            step,
            metrics
            | {
                "reward_mean": float(rewards_B.mean()),
                "reward_std": float(rewards_B.std()),
                "completion_tokens": float(batch.total_tokens),
                "completion_length": float(np.mean(lengths)),
                "truncated": float(np.mean([c.finish_reason == "length" for c in completions])),
                "tokens_per_second": batch.total_tokens / (generated - start),
                "generate_seconds": generated - start,
                "reward_seconds": rewarded - generated,
                "train_seconds": trained - rewarded,
                "sync_seconds": report.seconds,
                "step_seconds": seconds,
                "version": float(report.version),
            },
        )

    def _finished(self, step: int, metrics: Mapping[str, float]) -> None:
        """What follows a step: observers, evaluation, and then the checkpoint, which holds that evaluation."""
        notify("rlbridge_step_finished", run=self._run, metrics={"step": step, **metrics})
        if step == self._config.algorithm.steps or _is_due(step, self._config.evaluation.every):
            self._evaluate()
        if _is_due(step, self._config.checkpoint.every):
            self._save()

    def _sync(self, version: int) -> SyncReport:
        report = self._workers.session.sync(version)
        self.progress.reports.append(report)
        notify("rlbridge_weights_committed", run=self._run, report=report)
        return report

    def _evaluate(self) -> None:
        """Mean reward of one greedy completion of each held-out prompt."""
        if not self._task.held_out:
            return
        tokens = tokenize(self._task.held_out, self._task.tokenizer, self._config.data.chat)
        sampling = Sampling(
            max_tokens=self._config.sampling.max_tokens,
            temperature=0.0,
            stop=tuple(self._config.sampling.stop),
            seed=_GREEDY_SEED,
        )
        completions = self._workers.generator.generate(tokens, sampling, self._seconds)
        reward = float(self._rewards(self._task.held_out, completions).mean())
        self.progress.evaluations.append((self.progress.step, reward))
        notify("rlbridge_evaluated", run=self._run, step=self.progress.step, reward=reward)

    def _rewards(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> np.ndarray[Any, Any]:
        texts = self._task.tokenizer.batch_decode([c.token_ids for c in completions], skip_special_tokens=True)
        return score_completions(self._task.reward, prompts, texts)

    def _sampling(self, step: int) -> Sampling:
        sampling = self._config.sampling
        return Sampling(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            stop=tuple(sampling.stop),
            seed=self._config.seed * 1_000_003 + step,
        )

    def _save(self) -> None:
        progress = self.progress
        if progress.step == progress.saved:
            return
        save_checkpoint(
            self._run.directory / "checkpoints",
            progress.step,
            {"evaluations": progress.evaluations, "model": str(self._config.model.path)},
            lambda method, path: self._workers.trainer.each(method, path, self._seconds),
            self._config.checkpoint.keep,
        )
        progress.saved = progress.step

    def _rescue(self, error: BaseException) -> None:
        """Keep the work of a run that fails, unless it is the checkpoint that failed or a trainer that does not answer."""
        if isinstance(error, CheckpointError) or _trainer_is_silent(error) or self.progress.step < 1:
            return
        try:
            self._save()
        except RlbridgeError as second:
            _log.warning("after this error no checkpoint could be written: %s", second)

    def _summary(self) -> dict[str, Any]:
        return summarise(
            steps=self.progress.step,
            rewards=[reward for _, reward in self.progress.evaluations],
            reports=self.progress.reports,
            trainer=self._config.trainer.backend,
            generator=self._config.generator.backend,
            transport=self._workers.transport,
            wall_seconds=time.monotonic() - self._run.started,
        )


def notify(hook: str, **arguments: Any) -> None:
    """Tell the observers, the last registered first. One that fails is reported; the others are told, and the run goes on."""
    for observer in reversed(getattr(registry().manager.hook, hook).get_hookimpls()):
        try:
            observer.function(**{name: arguments[name] for name in observer.argnames})
        except Exception:
            _log.exception("the observer %s failed in %s; the run goes on", observer.plugin_name, hook)


def _trainer_is_silent(error: BaseException) -> bool:
    return isinstance(error, (DeadlineError, PeerLostError)) and error.where.get("peer", "").startswith("trainer")


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
