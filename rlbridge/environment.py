"""An environment as data: what a role's processes can be given to run in, where the driver's own packages do not do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Environment:
    """A Python environment that rlbridge builds in the user's cache, once, from a lock that the plugin ships.

    Attributes:
        name: What `rlbridge env build` and `<role>.env` call it.
        summary: One line.
        lock: "package:file" of the lock, for example "rlbridge_vllm:vllm-cpu.lock": requirements, each pinned, as uv compiles
            them from `requirements` under `overrides`.
        requirements: What the lock is compiled from. "rlbridge", with or without extras, stands for what the installed one
            requires: rlbridge itself is copied into every environment, and comes from no index.
        overrides: Requirements that take the place of what any package asks for.
        no_deps: Pinned requirements that are installed without what they ask for.
        resolved: Names of pinned distributions of which it depends on the machine what they need: that is resolved when the
            environment is built, and not in the lock. A torch for CUDA brings CUDA's libraries, one for the CPU none.
        variables: Environment variables of every process that runs in it, unless the config sets them.
        site: "package:folder" of modules that only this environment has: it is put on its path, and its .pth files count.
        modules: What must be importable in it: `rlbridge env check` imports them.
        python: Python's minor version, such as "3.11", where what it pins exists for that one alone.
        distribution: The distribution that brings it; it is put into the environment beside rlbridge's own.
    """

    name: str
    summary: str
    lock: str
    requirements: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    no_deps: tuple[str, ...] = ()
    resolved: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    site: str = ""
    modules: tuple[str, ...] = ()
    python: str = ""
    distribution: str = "rlbridge"
