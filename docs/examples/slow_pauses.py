"""An observer: says so when a sync kept an engine paused for long."""

from __future__ import annotations

from rlbridge import hookimpl
from rlbridge.rl.run import Run
from rlbridge.sync.report import SyncReport

LIMIT_SECONDS = 0.5


@hookimpl
def rlbridge_weights_committed(run: Run, report: SyncReport) -> None:
    """One line for each sync whose pause was too long."""
    if report.phases["pause"] > LIMIT_SECONDS:
        print(f"{run.name}: version {report.version} paused the slowest engine for {report.phases['pause']:.2f} s")
