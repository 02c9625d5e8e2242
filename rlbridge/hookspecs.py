"""The hooks that a plugin module may implement, each marked with `rlbridge.hookimpl`.

Role hooks say which backends a plugin brings; they are called once a process, and must import no framework. Lifecycle hooks
tell an observer what happened in a run; they are called in the driver, in turn, and the run waits for them: an observer that
has much to do does it on a thread of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from rlbridge.backend import Backend
    from rlbridge.environment import Environment
    from rlbridge.rl.run import Run
    from rlbridge.sync.report import SyncReport

hookspec = pluggy.HookspecMarker("rlbridge")


@hookspec
def rlbridge_trainers() -> Sequence[Backend]:
    """Trainers that the plugin brings. `Backend.load` names a subclass of `rlbridge.roles.trainer.Trainer`.

    Called when a process first looks a backend up. Since 0.1.
    """
    return ()


@hookspec
def rlbridge_generators() -> Sequence[Backend]:
    """Generators that the plugin brings. `Backend.load` names a subclass of `rlbridge.roles.generator.Generator`.

    Called when a process first looks a backend up. Since 0.1.
    """
    return ()


@hookspec
def rlbridge_transports() -> Sequence[Backend]:
    """Transports that the plugin brings. `Backend.load` names a subclass of `rlbridge.roles.transport.Transport`.

    Called when a process first looks a backend up. Since 0.1.
    """
    return ()


@hookspec
def rlbridge_rewards() -> Sequence[Backend]:
    """Reward functions that the plugin brings. `Backend.load` names the function itself.

    Called when a process first looks a backend up. Since 0.1.
    """
    return ()


@hookspec
def rlbridge_models() -> Sequence[Backend]:
    """Model makers that the plugin brings, for `model.make`: models to try a run with, where there is none to download.

    `Backend.load` names a function `make(path: Path, seed: int, log: Callable[[str], None]) -> None`, which writes a Hugging
    Face model directory at `path`, with `prompts.jsonl` and `held_out.jsonl` in it.

    Called when a process first looks a backend up. Since 0.1.
    """
    return ()


@hookspec
def rlbridge_environments() -> Sequence[Environment]:
    """Environments that the plugin's backends can run in.

    Called when a process first looks one up. Since 0.1.
    """
    return ()


@hookspec
def rlbridge_run_started(run: Run) -> None:
    """Called when the run has its name and its directory, before its first step.

    `run` has `name` (str), `directory` (Path) and `config` (RunConfig). Since 0.1.
    """


@hookspec
def rlbridge_step_finished(run: Run, metrics: Mapping[str, float]) -> None:
    """Called after each step of the optimizer.

    `metrics` maps the names of the step's metrics to numbers. Since 0.1.
    """


@hookspec
def rlbridge_weights_committed(run: Run, report: SyncReport) -> None:
    """Called after each sync that came to its commit: every generator serves the new version.

    `report` holds the version, the bytes, what carried them, and the seconds of each phase. Since 0.1.
    """


@hookspec
def rlbridge_evaluated(run: Run, step: int, reward: float) -> None:
    """Called after each evaluation on the held-out prompts, with the weights of `step` (0: before the first step).

    `reward` is the mean over the prompts. Since 0.1.
    """


@hookspec
def rlbridge_run_finished(run: Run, result: Mapping[str, object]) -> None:
    """Called last, also where a run that had started failed or was interrupted.

    `result` is the run's summary up to there, as summary.json has it; `steps` says how far it came. Since 0.1.
    """
