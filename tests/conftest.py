"""Makes `tests.models` and the like importable here and in the processes that stand for ranks, and quiets what they do."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parents[1]))

# Ray's memory monitor looks at the whole machine, and kills actors for what others use.
os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Processes that start with it compile torch anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# A shell starts what it puts in the background deaf to interrupts, and what a test starts would be so too.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples each time, and no example fails for being slow: how fast a machine is, is no property of the code.
settings.register_profile("rlbridge", deadline=None, derandomize=True)
settings.load_profile("rlbridge")


_LAST_CHARACTERS = 4000


class _AtOnce:
    """Tells a failure when it happens: a run that is cut off for its time would take pytest's own account along."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            terminal = self._config.pluginmanager.getplugin("terminalreporter")
            terminal.write_line("")
            terminal.write_line(f"{report.when} of {report.nodeid} failed after {report.duration:.0f} s")
            terminal.write_line(report.longreprtext[-_LAST_CHARACTERS:])


def pytest_configure(config: pytest.Config) -> None:
    """In CI, whose time is limited."""
    if os.environ.get("CI"):
        config.pluginmanager.register(_AtOnce(config))
