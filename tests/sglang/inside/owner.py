"""A process that owns an engine: says what it is made of, and does nothing more. `python owner.py MODEL`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    from tests.sglang.inside.bridge import started

    generator = started(Path(sys.argv[1]))
    sys.stdout.write(json.dumps([process.pid for process in generator._launch.ranks + generator._launch.others]) + "\n")
    sys.stdout.flush()
    time.sleep(600)
