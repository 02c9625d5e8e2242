"""Makes `tests.models` and `tests.native.ranks` importable here and in the processes that stand for ranks."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
