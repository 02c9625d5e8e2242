"""Results of conformance runs that never were."""

from __future__ import annotations

from typing import Any

from rlbridge_conformance.levels import Level
from rlbridge_conformance.report import BackendInfo, Check, Environment, Result, State, Wire

NO_RDMA = "no RDMA device (/sys/class/infiniband is empty)"

ENVIRONMENT = Environment(
    time="2025-01-02T03:04:05+00:00",
    python="3.11.7",
    platform="Debian GNU/Linux 12 (bookworm), x86_64",
    kernel="6.1.0",
    cpus=2,
    memory=8 * 2**30,
    versions={"rlbridge": "0.1.0", "nixl": "1.3.0", "vllm": None, "ucx": "1.19.0"},
    driver=None,
    gpus=None,
    rdma_devices=[],
    variables={"OMP_NUM_THREADS": "1"},
)


def environment_with(**changes: Any) -> Environment:
    return Environment.model_validate({**ENVIRONMENT.model_dump(), **changes})


def backend(name: str, **changes: Any) -> BackendInfo:
    facts = {"distribution": "rlbridge", "version": "0.1.0", "options": {}, "capabilities": [], "reference": False}
    return BackendInfo(name=name, **{**facts, **changes})


def check(state: State = "pass", level: Level = "contract", name: str = "every_byte_arrives", **more: Any) -> Check:
    return Check(id=name, level=level, state=state, **{"seconds": 0.5, "detail": "", **more})


def result(*checks: Check, levels: tuple[Level, ...] = ("contract",), **changes: Any) -> Result:
    triple = {"trainer": backend("native"), "generator": backend("native"), "transport": backend("nixl")}
    facts: dict[str, Any] = {**triple, "wire": Wire(name="cma", evidence="UCX protocol report"), **changes}
    return Result.of(levels, checks, facts.pop("environment", ENVIRONMENT), **facts)
