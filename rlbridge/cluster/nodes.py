"""The nodes of a cluster that was joined: each that may be given a role's actors has to have the role's environment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlbridge.env import Place
from rlbridge.env.stamp import STAMP
from rlbridge.errors import ResourceError
from rlbridge.roles.options import Resources

_SECONDS = 60.0


def check_nodes(role: str, place: Place, resources: Resources) -> None:
    """Ask every node that has an actor's resources whether the environment is there, with the driver's Ray in it.

    Raises:
        ResourceError: names the nodes that lack it, or that did not answer.
    """
    if place.python is None or place.prefix is None:
        return
    task = ray.remote(num_cpus=0, max_retries=0)(_asked())
    asked = {}
    for node in ray.nodes():
        if node["Alive"] and _fits(node["Resources"], resources) and node["NodeID"] != _own_node():
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            reference = task.options(scheduling_strategy=there).remote(
                str(place.python), str(place.prefix / STAMP), ray.__version__
            )
            asked[reference] = str(node["NodeManagerHostname"])
    done, late = ray.wait(list(asked), num_returns=len(asked), timeout=_SECONDS) if asked else ([], [])
    problems = [*_problems(done, asked), *(f"{asked[ref]}: it did not answer within {_SECONDS:.0f} s" for ref in late)]
    if problems:
        raise ResourceError(
            f"the environment {place.name!r} cannot be used on every node:\n    " + "\n    ".join(sorted(problems)),
            role=role,
            todo=f"build it there, at the same path: rlbridge env build {place.name} on that node; or have all nodes share"
            " a directory, and name it by RLBRIDGE_ENVS",
        )


def _problems(done: Sequence[Any], asked: dict[Any, str]) -> list[str]:
    found = []
    for reference in done:
        try:
            problem = ray.get(reference)
        except ray.exceptions.RayError as error:
            problem = f"it could not be asked: {str(error).splitlines()[-1]}"
        if problem:
            found.append(f"{asked[reference]}: {problem}")
    return found


def _own_node() -> str:
    """The driver's node: what is there has been looked at before Ray started."""
    return str(ray.get_runtime_context().get_node_id())


def _fits(has: dict[str, float], asks: Resources) -> bool:
    accelerator = asks.accelerator is None or f"accelerator_type:{asks.accelerator}" in has
    return accelerator and has.get("CPU", 0.0) >= asks.cpus and has.get("GPU", 0.0) >= asks.gpus


def _asked() -> Callable[[str, str, str], str | None]:
    # A function within a function travels as code: a node need not have rlbridge outside of its environments.
    def problem_here(python: str, stamp: str, ray_version: str) -> str | None:
        import subprocess
        from pathlib import Path

        if not Path(python).exists():
            return f"there is no {python}"
        if not Path(stamp).exists():
            return f"it is unfinished there: it has no {stamp}"
        code = "import importlib.metadata, rlbridge; print(importlib.metadata.version('ray'))"
        asked = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=False)
        if asked.returncode:
            return (asked.stderr.strip().splitlines() or ["its interpreter does not start"])[-1]
        there = asked.stdout.strip()
        return None if there == ray_version else f"its Ray is {there}, and the driver's {ray_version}"

    return problem_here
