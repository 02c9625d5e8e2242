"""Makes `tests.models` and the like importable here and in the processes that stand for ranks, and quiets what they do."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

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
