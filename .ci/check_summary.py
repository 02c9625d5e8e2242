"""Fail unless a run's summary shows that it learned and that every sync was verified."""

import json
import sys
from pathlib import Path

summary = json.loads(Path(sys.argv[1]).read_text())
print(json.dumps(summary, indent=1))
problems = []
if not summary["reward"]["first"] < 0.6:
    problems.append(f"the first held-out reward is {summary['reward']['first']}, not below 0.6")
if not summary["reward"]["last"] > 0.9:
    problems.append(f"the last held-out reward is {summary['reward']['last']}, not above 0.9")
if not summary["verified"] or summary["syncs"] != summary["steps"] + 1:
    problems.append(f"{summary['syncs']} syncs in {summary['steps']} steps, verified: {summary['verified']}")
sys.exit("\n".join(problems) or 0)
