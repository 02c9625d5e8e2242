"""A process with an engine, to be killed: prints the pids of the engine's processes, and then does nothing."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from tests.vllm.inside.bridge import started

if __name__ == "__main__":
    generator = started(Path(sys.argv[1]), tensor_parallel=int(sys.argv[2]), engine=sys.argv[3])
    assert generator._watch is not None
    print("pids", *generator._watch.pids.values(), flush=True)
    time.sleep(600)
