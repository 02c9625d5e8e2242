"""`rlbridge env check`: whether an environment is what its stamp says, and what it was built for."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rlbridge.env.location import directory, python_of
from rlbridge.env.placing import differences, variables_of
from rlbridge.env.state import WHY, State, state_of
from rlbridge.environment import Environment

_SECONDS = 600.0
_MARK = "rlbridge-env-check "

# Runs in the environment, with the mark and the modules. What a module prints when it is imported goes before the mark.
_CODE = """
import importlib, json, sys
failed = {}
for name in sys.argv[2:]:
    try:
        importlib.import_module(name)
    except BaseException as error:
        failed[name] = " ".join(f"{type(error).__name__}: {error}".split())
print()
print(sys.argv[1] + json.dumps({"prefix": sys.prefix, "failed": failed}))
"""


@dataclass(frozen=True)
class Checked:
    """What was found: `problems` is empty where all is well, `todo` is the cure."""

    problems: tuple[str, ...]
    todo: str = ""


def check(environment: Environment) -> Checked:
    """Look at the stamp and the metadata, and import its modules and rlbridge under its own interpreter."""
    name, state = environment.name, state_of(environment)
    if state is State.NO_LOCK:
        return Checked((f"it {WHY[state]}",), f"the plugin's author makes one: rlbridge env lock {name}")
    if state is not State.BUILT:
        return Checked((f"it {WHY[state]}",), f"rlbridge env build {name}")
    prefix = directory(environment)
    problems = differences(prefix)
    if python_of(prefix).exists():
        problems += _import_problems(environment, prefix)
    return Checked(tuple(problems), f"rlbridge env remove {name}, then rlbridge env build {name}" if problems else "")


def _import_problems(environment: Environment, prefix: Path) -> list[str]:
    modules = ["rlbridge", *environment.modules]
    variables: Mapping[str, str] = {**os.environ, **variables_of(environment, prefix)}
    # Isolated: neither the folder that this runs in nor PYTHONPATH lends it a module that it lacks.
    command = [str(python_of(prefix)), "-I", "-c", _CODE, _MARK, *modules]
    try:
        ran = subprocess.run(command, env=variables, capture_output=True, text=True, errors="replace", timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        return [f"importing {', '.join(modules)} took more than {_SECONDS:.0f} s"]
    except OSError as error:
        return [f"its interpreter does not start: {error}"]
    said = [line for line in ran.stdout.splitlines() if line.startswith(_MARK)]
    if not said:
        last = (ran.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return [f"importing {', '.join(modules)} ended its interpreter ({ran.returncode}): {last}"]
    found = json.loads(said[-1].removeprefix(_MARK))
    problems = [f"{module} cannot be imported: {reason}" for module, reason in found["failed"].items()]
    if Path(found["prefix"]).resolve() != prefix.resolve():
        problems.append(f"its interpreter works for {found['prefix']}")
    return problems
