"""The reference backends: a trainer, a generator and a transport, small and real, for the suite to put others beside.

They need torch and safetensors only, and no process of theirs takes long to start. Set
`RLBRIDGE_PLUGINS=rlbridge_conformance.reference` to have them by the name `reference`.
"""

from __future__ import annotations

from collections.abc import Sequence

from rlbridge import Backend, Capability, hookimpl

_MODULE = "rlbridge_conformance.reference"


@hookimpl
def rlbridge_trainers() -> Sequence[Backend]:
    """A replica a rank, which publishes its shard."""
    return [
        Backend(
            name="reference",
            load=f"{_MODULE}.trainer:ReferenceTrainer",
            options=f"{_MODULE}.options:ReferenceTrainerOptions",
            summary="Qwen3 in plain torch; weights take a random walk. For tests of other backends.",
            requires=("torch", "safetensors"),
            capabilities=frozenset({Capability.SHARDED, Capability.MULTI_RANK, Capability.LIVE_STORAGE}),
        )
    ]


@hookimpl
def rlbridge_generators() -> Sequence[Backend]:
    """An engine of one or more tensor-parallel ranks in one process."""
    return [
        Backend(
            name="reference",
            load=f"{_MODULE}.generator:ReferenceGenerator",
            options=f"{_MODULE}.options:ReferenceGeneratorOptions",
            summary="Qwen3 in plain torch, tensor-parallel in one process, with a prefix cache. For tests of other backends.",
            requires=("torch", "safetensors"),
            capabilities=frozenset({Capability.PAUSE_KEEP, Capability.PAUSE_ABORT}),
        )
    ]


@hookimpl
def rlbridge_transports() -> Sequence[Backend]:
    """One process reads another's memory."""
    return [
        Backend(
            name="reference",
            load=f"{_MODULE}.transport:ReferenceTransport",
            options=f"{_MODULE}.options:ReferenceTransportOptions",
            summary="process_vm_readv between processes of one Linux host. For tests of other backends.",
            requires=("torch",),
            capabilities=frozenset({Capability.ONE_SIDED, Capability.LIVE_STORAGE, Capability.ABORTABLE}),
            requirements=f"{_MODULE}.requirements:ReferenceTransportRequirements",
        )
    ]
