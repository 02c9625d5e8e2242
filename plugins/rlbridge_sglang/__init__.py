"""SGLang as a generator, with an environment in which it runs on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

from rlbridge import Backend, Capability, Environment, hookimpl
from rlbridge_sglang.cpu_environment import SGLANG_CPU


@hookimpl
def rlbridge_generators() -> Sequence[Backend]:
    """Serving with SGLang."""
    return [
        Backend(
            name="sglang",
            load="rlbridge_sglang.generator:SglangGenerator",
            options="rlbridge_sglang.options:SglangGeneratorOptions",
            summary="SGLang's engine, its weights replaced in place in each tensor-parallel rank; CUDA or CPU.",
            extra="sglang",
            requires=("sglang",),
            capabilities=frozenset({Capability.CUDA, Capability.PAUSE_KEEP, Capability.PAUSE_ABORT}),
            requirements="rlbridge_conformance.ours:ServedElsewhere",
            environments=(SGLANG_CPU.name,),
            tested=("sglang>=0.5.21,<0.6",),
        )
    ]


@hookimpl
def rlbridge_environments() -> Sequence[Environment]:
    """SGLang on a CPU."""
    return [SGLANG_CPU]
