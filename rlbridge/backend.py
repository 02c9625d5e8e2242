"""A backend as data: how it is named, where it is loaded from, what it can do. Listing backends imports no framework."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Capability(enum.StrEnum):
    """What a backend declares that it can do, or that it needs. The conformance suite holds it to this."""

    ONE_SIDED = "one_sided"
    """transport: only one end acts in a transfer"""
    CROSS_HOST = "cross_host"
    """transport: the two ends may be on different hosts"""
    CUDA = "cuda"
    """works on CUDA memory without a copy through the host"""
    RDMA = "rdma"
    """transport: uses RDMA where the host has it"""
    ABORTABLE = "abortable"
    """transport: a transfer that ran out of time is known not to write any more"""
    NEEDS_RAY_ACTORS = "needs_ray_actors"
    """transport: both ends must be Ray actors, since Ray moves the bytes"""
    LIVE_STORAGE = "live_storage"
    """transport: reads a trainer's parameters in place (publish: barrier); trainer: its parameters can be read in place"""
    SHARDED = "sharded"
    """trainer: publishes local shards without a gather"""
    MULTI_RANK = "multi_rank"
    """trainer: more than one worker"""
    RANKS_ARE_ACTORS = "ranks_are_actors"
    """generator: every engine rank is itself a Ray actor"""
    PAUSE_KEEP = "pause_keep"
    """generator: `pause("keep")` holds running requests, and they go on after `resume` with the weights of that moment"""
    PAUSE_ABORT = "pause_abort"
    """generator: `pause("abort")` ends running requests with what they have"""


@dataclass(frozen=True)
class Backend:
    """One named implementation of a role.

    Attributes:
        name: What the config calls it.
        load: "module:Class" of the implementation, imported only when a run uses it.
        options: "module:Class" of its pydantic options model; the module must import no framework.
        summary: One line.
        extra: The extra of rlbridge (or the requirement) that installs what it needs.
        requires: Modules that must be importable here for it to run.
        capabilities: What it declares.
        distribution: The distribution whose version is shown; rlbridge's own by default.
        requirements: "module:Class" of what it claims of the conformance suite; by default what its capabilities say.
        environments: Names of the environments that it has been tested in, best first.
        tested: Requirements of the framework's versions that it has been tested with, for example "verl>=0.9,<0.10"; a config
            is refused where another version is installed.
    """

    name: str
    load: str
    summary: str
    options: str = ""
    extra: str = ""
    requires: tuple[str, ...] = ()
    capabilities: frozenset[Capability] = frozenset()
    distribution: str = "rlbridge"
    requirements: str = ""
    environments: tuple[str, ...] = ()
    tested: tuple[str, ...] = ()
