"""What a run shows while it goes: one line that is updated on a terminal, one line a step elsewhere, and a verdict."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from rlbridge import hookimpl
from rlbridge.rl.run import Run
from rlbridge.rl.summary import Report


class ProgressObserver:
    """Shows step, mean reward, held-out reward, the last sync, tokens a second and the time since the start.

    Reads `reward_mean` and `tokens_per_second` of a step's metrics, where they are given.

    Args:
        console: Where to; standard output by default.
        every_seconds: Where it is no terminal, at most one line in this time, but always the first and the last step's.
    """

    def __init__(self, console: Console | None = None, every_seconds: float = 1.0) -> None:
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._every = every_seconds
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._started = time.monotonic()
        self._printed = float("-inf")
        self._sync: Report | None = None
        self._held_out: float | None = None

    @hookimpl
    def rlbridge_run_started(self, run: Run) -> None:
        """Say where the run is, and start the bar on a terminal."""
        self._started = time.monotonic()
        going_on = f", going on after step {run.resumed_step}" if run.resumed_step else ""
        self._print(f"run {run.name} in {run.directory}{going_on}")
        if self._console.is_terminal:
            columns = (
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
            )
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task("starting", total=run.steps, completed=run.resumed_step)
            self._bar.start()

    @hookimpl
    def rlbridge_step_finished(self, run: Run, metrics: Mapping[str, float]) -> None:
        """Move the bar, or print a line."""
        step, now = int(metrics["step"]), time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=self._describe(metrics))
        elif step in (run.resumed_step + 1, run.steps) or now - self._printed >= self._every:
            self._printed = now
            self._print(f"step {step}/{run.steps}  {self._describe(metrics)}  {now - self._started:.1f} s")

    @hookimpl
    def rlbridge_weights_committed(self, report: Report) -> None:
        """Keep the report for the next line."""
        self._sync = report

    @hookimpl
    def rlbridge_evaluated(self, step: int, reward: float) -> None:
        """Say the held-out reward, and keep it for the next line."""
        self._held_out = reward
        if self._bar is None:
            self._print(f"held-out reward after step {step}: {reward:.3f}")

    @hookimpl
    def rlbridge_run_finished(self, run: Run, result: Mapping[str, Any]) -> None:
        """Stop the bar, and print the verdict."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        for line in verdict(result):
            self._print(line)
        self._print(f"all of it is in {run.directory}")

    def _describe(self, metrics: Mapping[str, float]) -> str:
        parts = (
            f"reward {metrics['reward_mean']:.3f}" if "reward_mean" in metrics else "",
            f"held-out {self._held_out:.3f}" if self._held_out is not None else "",
            f"sync {self._sync.seconds * 1e3:.0f} ms" if self._sync is not None else "",
            f"{metrics['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in metrics else "",
        )
        return "  ".join(filter(None, parts))

    def _print(self, line: str) -> None:
        # markup=False: a path or a name may well hold square brackets.
        self._console.print(line, markup=False, soft_wrap=True)


def verdict(result: Mapping[str, Any]) -> list[str]:
    """A summary (see `rlbridge.rl.summary`) in a few lines; what a run that failed early does not have is left out."""
    return [*_reward_lines(result), *_sync_lines(result), *_time_lines(result)]


def _reward_lines(result: Mapping[str, Any]) -> list[str]:
    reward = result.get("reward") or {}
    if reward.get("first") is None:
        return []
    return [f"reward {reward['first']:.3f} -> {reward['last']:.3f} (best {reward['best']:.3f}) in {result['steps']} steps"]


def _sync_lines(result: Mapping[str, Any]) -> list[str]:
    if not result.get("syncs"):
        return []
    proven = "every one verified" if result["verified"] else "NOT ALL VERIFIED"
    seconds = result["sync_seconds"]
    return [
        f"{result['syncs']} syncs, {proven}, {decimal(result['bytes_per_sync'])} each, "
        f"{seconds['p50'] * 1e3:.0f} ms (p50), {seconds['p95'] * 1e3:.0f} ms (p95)",
        f"{result['trainer']} -> {result['transport']} -> {result['generator']}, wire {result['wire']}",
    ]


def _time_lines(result: Mapping[str, Any]) -> list[str]:
    return [f"{result['wall_seconds']:.1f} s in all"] if "wall_seconds" in result else []
